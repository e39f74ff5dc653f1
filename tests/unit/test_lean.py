"""A lean model computes what the model of `transformers` computes, to the bit, or is none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from upturn.engines import local, sampling
from upturn.errors import ModelError
from upturn.models import chat, lean, load
from upturn.models.native import ops
from upturn.strategies import chain
from upturn.types import Attempt, Prompt, Requests

SHAPE = {
    "vocab_size": 103,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
KNOWN: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama, biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "rope_theta": 500.0}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "qwen3, biases": (Qwen3Config, {"attention_bias": True}),
}
OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "another family": (GemmaConfig, {}),
    "a window": (MistralConfig, {"sliding_window": 4}),
    "a window in some layers": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "stretched places": (LlamaConfig, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "another gate": (LlamaConfig, {"hidden_act": "gelu"}),
}


def saved(folder: Path, kind: Any, more: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SHAPE | more)).to(dtype)
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder, **options)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "place_of", lambda device: "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "model", *KNOWN["llama"])


def drafts(model: Any, loaded: load.Loaded) -> list[Attempt]:
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("Refine."))
    engine = local.Local(model, talk, sampling.Config(max_new_tokens=12), seed=0, slots=3)
    prompts = [Prompt(str(n), "x" * (n + 1)) for n in range(5)]
    return engine.run(prompts, partial(chain.generate, cfg=chain.Config(turns=3)))


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KNOWN)
def test_drafts_are_the_same_to_the_bit(
    kind: str, dtype: torch.dtype, has_kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = saved(tmp_path / "model", *KNOWN[kind], dtype=dtype)
    if not has_kernels:
        monkeypatch.setattr(ops, "usable", lambda like: False)
    theirs, ours = load.load(str(folder), device="cpu"), lean.load(folder)
    assert ours is not None
    assert drafts(ours, theirs) == drafts(theirs.model, theirs)


def test_a_model_in_several_files_is_one(tmp_path: Path):
    folder = saved(tmp_path / "model", *KNOWN["llama"], max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    theirs, ours = load.load(str(folder), device="cpu"), lean.load(folder)
    assert ours is not None
    for name, weight in theirs.model.named_parameters():
        assert torch.equal(ours.get_parameter(name), weight)


def test_one_file_comes_before_several(tmp_path: Path):
    folder = saved(tmp_path / "model", *KNOWN["llama"], max_shard_size="30KB")
    other = saved(tmp_path / "other", *KNOWN["llama"])
    tensors = {name: tensor + 1 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    theirs, ours = load.load(str(folder), device="cpu"), lean.load(folder)
    assert ours is not None
    assert torch.equal(ours.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(ours.lm_head.weight, theirs.model.get_output_embeddings().weight)  # type: ignore[operator]


@pytest.mark.parametrize("missing", ["dtype", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps"])
def test_a_config_that_leaves_something_open_is_left_to_transformers(missing: str, folder: Path):
    path = folder / "config.json"
    known = json.loads(path.read_text())
    del known[missing]
    path.write_text(json.dumps(known))
    assert lean.load(folder) is None


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_tokenizer_is_that_of_transformers(kind: str, is_named: bool, tmp_path: Path):
    folder = saved(tmp_path / "model", *KNOWN[kind])
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text())
    if not is_named:
        del said["tokenizer_class"]
    path.write_text(json.dumps(said))
    theirs, ours = load.load(str(folder), device="cpu"), load.load_to_answer(str(folder))
    assert isinstance(ours.model, lean.Lean) == is_named
    assert type(ours.tokenizer) is type(theirs.tokenizer)
    assert ours.tokenizer("Say 1 + 1!")["input_ids"] == theirs.tokenizer("Say 1 + 1!")["input_ids"]
    assert ours.end_ids == theirs.end_ids
    assert ours.tokenizer.eos_token_id == theirs.tokenizer.eos_token_id


@pytest.mark.parametrize("kind", OTHER)
def test_another_model_is_left_to_transformers(kind: str, tmp_path: Path):
    assert lean.load(saved(tmp_path / "model", *OTHER[kind])) is None


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"per_layer_config": {"0": {"skip": ["mlp"]}}},
        {"transformers_weights": "others.safetensors"},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"auto_map": {"AutoModelForCausalLM": "own.Model"}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"head_dim": 16},
        {"model_type": "olmo2"},
    ],
)
def test_a_config_that_says_more_is_left_to_transformers(change: dict[str, Any], folder: Path):
    path = folder / "config.json"
    assert lean.load(folder) is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert lean.load(folder) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("model.norm.weight"),
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(4)}),
    ],
)
def test_weights_that_do_not_fit_are_left_to_transformers(change: Callable[[Any], object], folder: Path):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert lean.load(folder) is None


def test_an_adapter_is_left_to_transformers(folder: Path):
    (folder / "adapter_config.json").write_text("{}")
    assert lean.load(folder) is None


@pytest.mark.parametrize("own", ['{"eos_token_id": [3, 4]}', '{"eos_token_id": 3}', "{}", "{", None])
def test_an_answer_ends_where_transformers_says(own: str | None, folder: Path):
    path = folder / "generation_config.json"
    path.unlink()
    if own is not None:
        path.write_text(own)
    assert load.load_to_answer(str(folder)).end_ids == load.load(str(folder), device="cpu").end_ids


def test_what_is_not_known_is_loaded_as_ever(tmp_path: Path):
    folder = saved(tmp_path / "model", *OTHER["a window"])
    theirs, ours = load.load(str(folder), device="cpu"), load.load_to_answer(str(folder))
    assert type(ours.model) is type(theirs.model)
    assert drafts(ours.model, ours) == drafts(theirs.model, theirs)


def test_a_broken_tokenizer_is_named(folder: Path):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=str(folder)):
        load.load_to_answer(str(folder))


def test_one_question_imports_no_model_of_transformers(tiny_model: Path):
    program = (
        "import sys; from upturn.cli.main import app\n"
        f"app(['refine', 'Say a.', '--model', {str(tiny_model)!r}, '--max-new-tokens', '4'], standalone_mode=False)\n"
        "slow = ('transformers.modeling_utils', 'torch._dynamo', 'sympy', 'scipy', 'pandas', 'matplotlib')\n"
        "sys.exit(', '.join(name for name in slow if name in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
