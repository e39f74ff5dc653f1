"""Models of the common kind in plain torch, to answer with at once.

`transformers` takes 1.5 to 3 seconds to import what its models are made of, which somebody who asks one question waits
for. The layers here have the names and the arithmetic of its Llama, Mistral, Qwen2 and Qwen3, to the bit, so kernels
take them as they take those. A folder that says anything else is none of this file's business.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from upturn.models import _common
from upturn.models._attention import NAME, How, Plan

BIASES = {"llama": ("", "all"), "mistral": ("", ""), "qwen2": ("qkv", "qkv"), "qwen3": ("", "all")}
"""Model type -> which products of the attention have a bias: without `attention_bias` in the config, and with it."""

_FOLLOWED = """
attention_bias dtype head_dim hidden_act hidden_size intermediate_size layer_types max_position_embeddings mlp_bias
model_type num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters rope_theta
sliding_window tie_word_embeddings torch_dtype use_sliding_window vocab_size
"""
_IDLE = """
_model_name_or_path _name_or_path architectures attention_dropout bos_token_id eos_token_id initializer_range
is_llama_config max_window_layers pad_token_id pretraining_tp transformers.js_config transformers_version unk_token_id
use_cache
"""
SAID = {*_FOLLOWED.split(), *_IDLE.split()}
"""What a config may say: the layers below follow it, or it is nothing to them."""


class Config(SimpleNamespace):
    """`config.json`, with what else is asked of a config."""

    _attn_implementation = NAME

    def get_text_config(self) -> Config:
        """Itself: there is nothing but text."""
        return self


class Lean(nn.Module):
    """A causal language model as `policy` and the engine see one: it learns nothing, and is not saved."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = _Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_decoder(self) -> nn.Module:
        """All but the output layer."""
        return self.model

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer."""
        return self.lm_head


def load(folder: Path) -> Lean | None:
    """The model of a folder in the type of its weights, where it is known here in every respect."""
    return _common.tried(lambda: _load(folder))  # where it fails, `transformers` may know better, or says what is wrong


def ends(folder: Path) -> int | list[int] | None:
    """What ends an answer by the folder's files: the generation config, and the model's where there is none."""
    own = folder / "generation_config.json"
    return json.loads((own if own.exists() else folder / "config.json").read_text()).get("eos_token_id")


def _load(folder: Path) -> Lean | None:
    raw = json.loads((folder / "config.json").read_text())
    if not _is_known(raw) or (folder / "adapter_config.json").exists():
        return None
    if "tokenizer_class" not in json.loads((folder / "tokenizer_config.json").read_text()):
        return None  # then it is that of the model's own config, which would import what all this is to spare
    config = _config(raw)
    with torch.device("meta"):
        model = Lean(config)
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        tensors |= load_file(path)
    tensors = {name: tensor.to(config.dtype) for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        if "lm_head.weight" in tensors:  # another one, perhaps
            return None
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def _files(folder: Path) -> list[Path]:
    if (whole := folder / "model.safetensors").exists():
        return [whole]
    index = folder / "model.safetensors.index.json"
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _is_known(raw: dict[str, Any]) -> bool:
    """Whether a config says nothing that the layers below do not do."""
    rope = raw.get("rope_parameters") or {"rope_type": "default"}
    return (
        raw["model_type"] in BIASES
        and raw.get("hidden_act", "silu") == "silu"
        and not any(raw[name] for name in raw.keys() - SAID)
        and set(rope) <= {"rope_theta", "rope_type"}
        and rope["rope_type"] == "default"
        and not _has_window(raw)
    )


def _has_window(raw: dict[str, Any]) -> bool:
    if raw["model_type"] == "mistral":  # where nothing is said it has one
        return raw.get("sliding_window", 0) is not None
    return bool(raw.get("use_sliding_window")) or bool(set(raw.get("layer_types") or ()) - {"full_attention"})


def _config(raw: dict[str, Any]) -> Config:
    heads = raw["num_attention_heads"]
    asked = {
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "num_key_value_heads": raw.get("num_key_value_heads") or heads,
        "rope_theta": (raw.get("rope_parameters") or raw)["rope_theta"],
        "attention_biases": BIASES[raw["model_type"]][bool(raw.get("attention_bias"))],
        "mlp_bias": raw["model_type"] == "llama" and bool(raw.get("mlp_bias")),
        "dtype": getattr(torch, raw.get("dtype") or raw["torch_dtype"]),
        "max_position_embeddings": raw["max_position_embeddings"],  # must be there: the engine asks for it
    }
    return Config(**raw | asked)


class _Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        size = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(*size, _weight=torch.empty(size))  # to fill it imports torch's compiler
        self.layers = nn.ModuleList(_Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = _Norm(config.hidden_size, config)
        self._turns = config.rope_theta, config.head_dim

    def forward(self, input_ids: Tensor, position_ids: Tensor, upturn_plan: Plan, **_: Any) -> SimpleNamespace:
        """`[1, T]` ids and places -> `last_hidden_state [1, T, d]`."""
        x = self.embed_tokens(input_ids)
        around = self._turned(position_ids, x)
        for layer in self.layers:
            x = layer(x, position_embeddings=around, upturn_plan=upturn_plan)
        return SimpleNamespace(last_hidden_state=self.norm(x))

    def _turned(self, places: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary embeddings, `[1, T, D]` each."""
        theta, width = self._turns
        speeds = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.int64, device=like.device).float() / width))
        angles = (places[..., None].float() * speeds).repeat(1, 1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class _Layer(nn.Module):
    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.self_attn = _Attention(config, index)
        self.mlp = _Gated(config)
        self.input_layernorm = _Norm(config.hidden_size, config)
        self.post_attention_layernorm = _Norm(config.hidden_size, config)

    def forward(self, x: Tensor, *, position_embeddings: tuple[Tensor, Tensor], upturn_plan: Plan) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), position_embeddings, upturn_plan)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Attention(nn.Module):
    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        d, width, biases = config.hidden_size, config.head_dim, config.attention_biases
        inner, keys = config.num_attention_heads * width, config.num_key_value_heads * width
        has_norms = config.model_type == "qwen3"
        self.layer_idx, self.head_dim = index, width
        self.q_proj = nn.Linear(d, inner, bias=bool(biases))
        self.k_proj = nn.Linear(d, keys, bias=bool(biases))
        self.v_proj = nn.Linear(d, keys, bias=bool(biases))
        self.o_proj = nn.Linear(inner, d, bias=biases == "all")
        self.q_norm = _Norm(width, config) if has_norms else None
        self.k_norm = _Norm(width, config) if has_norms else None

    def forward(self, x: Tensor, around: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
        """`[1, T, d] -> [1, T, d]`."""
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        how = How(self.head_dim**-0.5, None, None)
        out = plan.attend(self.layer_idx, _turn(q, *around), _turn(k, *around), v, how)
        return self.o_proj(out.reshape(*x.shape[:-1], -1))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embeddings of heads `[1, H, T, D]`."""
    left, right = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-right, left), -1) * sin[:, None]


class _Gated(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj, self.up_proj = nn.Linear(d, f, bias=bias), nn.Linear(d, f, bias=bias)
        self.down_proj = nn.Linear(f, d, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _Norm(nn.Module):
    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.variance_epsilon = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)
