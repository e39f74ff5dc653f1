"""A model that computes something else over a tree than over rows is refused, whatever its kind and type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from upturn.errors import ModelError
from upturn.models import _faithful, load

SHAPE: dict[str, Any] = {
    "vocab_size": len(tiny.tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
GRANITE = {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5}
WINDOWS = {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2}
FAITHFUL: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in sorted(_faithful.PROVEN)),
    ("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 4}),
    ("gemma3_text", {"query_pre_attn_scalar": 8}),
    ("cohere", {"logit_scale": 0.25}),
    ("granite", GRANITE),
    ("olmo2", {}),
    ("phi3", {}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, "by convolutions"),
    ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "attends on its own"),
    ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux"),
    ("diffllama", {}, "not each of its layers attends once"),
    ("qwen2_moe", WINDOWS, "by its masks alone"),
    ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "are not those that its config tells of"),
]
TYPES = [torch.float32, torch.bfloat16]


def made(kind: str, dtype: torch.dtype, **more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | more)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def saved(folder: Path, kind: str, **more: Any) -> str:
    made(kind, torch.bfloat16, **more).save_pretrained(folder)  # type: ignore[operator]
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("kind", "more"), FAITHFUL)
def test_models_that_attend_by_plan(kind: str, more: dict[str, Any], dtype: torch.dtype):
    """Those that are not asked when they are loaded are asked here."""
    assert not _faithful._fault(made(kind, dtype, **more), SHAPE["vocab_size"])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("kind", "more", "why"), REFUSED)
def test_models_that_do_not(kind: str, more: dict[str, Any], why: str, dtype: torch.dtype):
    assert why in _faithful._fault(made(kind, dtype, **more), SHAPE["vocab_size"])


def test_a_scale_that_nobody_knows_is_found(monkeypatch: pytest.MonkeyPatch):
    """As Granite's was not known for long: every log-prob was that of another temperature."""
    model = made("granite", torch.float32, **GRANITE)
    monkeypatch.setattr("upturn.models._output_layer._bend", lambda model: (None, 1.0))
    assert "log-probs are not those of each text" in _faithful._fault(model, SHAPE["vocab_size"])


def test_a_folder_that_cannot_be_used_is_a_message(tmp_path: Path):
    kind, more, _ = REFUSED[0]
    with pytest.raises(ModelError, match="lfm2 cannot be trained or sampled here"):
        load.load(saved(tmp_path, kind, **more), device="cpu")


def test_a_model_without_the_attention_of_torch_is_loaded(tmp_path: Path):
    """Gemma 2 has its own, until a plan takes its place; what is saved of it loads again."""
    kind, more = FAITHFUL[len(_faithful.PROVEN)]
    loaded = load.load(saved(tmp_path / "given", kind, **more), device="cpu")
    load.save(loaded, tmp_path / "saved", "a card")
    again = load.load(str(tmp_path / "saved"), device="cpu")
    for one, other in zip(loaded.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_one_config_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    monkeypatch.setattr(_faithful, "_ASKED", set())
    monkeypatch.setattr(_faithful, "_fault", lambda model, num_ids: asked.append(num_ids) or "")
    folder = saved(tmp_path, "olmo2")
    for _ in range(2):
        load.load(folder, device="cpu")
    load.load(folder, "float32", device="cpu")
    assert len(asked) == 2
