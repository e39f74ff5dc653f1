"""Fused layers: the same results as the model's own, only for layers that compute that, and gone after a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from upturn.engines import local, sampling
from upturn.engines._slots import Slots, Span, StepPlan
from upturn.errors import ModelError
from upturn.models import _common, _slow, chat, fused, load, policy
from upturn.models.native import ops
from upturn.strategies import chain
from upturn.types import Attempt, Prompt, Requests

SHAPE = {
    "vocab_size": 102,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": LlamaConfig,
    "mistral": partial(MistralConfig, sliding_window=4),
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
MORE = {"smollm3": {"no_rope_layers": [1, 0]}}
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
needs_kernels = pytest.mark.skipif(not ops.usable(torch.zeros(1)), reason="no C compiler, or not Linux")


def made(family: str, dtype: torch.dtype, **more: Any) -> Any:
    torch.manual_seed(0)
    config = (FAMILIES | {"gemma2": Gemma2Config, "smollm3": SmolLM3Config})[family](**SHAPE | more)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
    policy.use_plans(model)
    return model


def outputs(model: Any) -> list[Tensor]:
    """Hidden states of three steps: two contexts, two tokens behind them, and one with a guess of three."""
    slots = Slots(model.config, 3, next(model.parameters()))
    found = []
    steps = (
        [Span(2, 0, 9, 1), Span(0, 0, 4, 1)],
        [Span(2, 9, 1, 1), Span(0, 4, 1, 1)],
        [Span(0, 5, 4, 4), Span(2, 10, 1, 1)],
    )
    for spans in steps:
        plan = StepPlan(slots, spans)
        ids = torch.arange(sum(span.count for span in spans)) * 7 % 100
        found.append(policy.hidden_states(model, ids, plan.place_T, plan))
    return found


@needs_kernels
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_computes_the_same(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    model = made(family, dtype)
    with torch.inference_mode():
        with fused.fused(model):
            ours = outputs(model)
            assert all(are_fused(model))
        monkeypatch.setattr(ops, "usable", lambda like: False)
        plain = outputs(model)
    for one, other in zip(ours, plain, strict=True):
        assert (one - other).abs().max() <= CLOSE[dtype] * other.abs().max()


@needs_kernels
def test_a_step_does_not_depend_on_its_neighbours_to_the_bit():
    model = made("llama", torch.float32)
    slots = Slots(model.config, 3, next(model.parameters()))
    q, k, v = (torch.randn(1, 5, heads, 32).transpose(1, 2) for heads in (6, 2, 2))
    how = fused.How(0.2, None, None)

    def attended(spans: list[Span], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return StepPlan(slots, spans).attend(0, q, k, v, how)[0]

    together = attended([Span(1, 0, 4, 1), Span(0, 0, 1, 1)], q, k, v)
    alone = [attended([Span(2, place, 1, 1)], *(x[:, :, place : place + 1] for x in (q, k, v))) for place in range(4)]
    assert torch.equal(together[:4], torch.cat(alone))


def are_fused(model: Any) -> list[bool]:
    return [getattr(layer.__dict__.get("forward"), "_fused", None) is not None for layer in model.model.layers]


def layer_of(model: Any) -> Any:
    return model.model.layers[0]


def _twice(model: Any) -> None:
    class Twice(type(layer_of(model).mlp)):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer_of(model).mlp.__class__ = Twice


def _hooked(model: Any) -> None:
    layer_of(model).mlp.down_proj.register_forward_hook(lambda *args: None)


def _adapted(model: Any) -> None:
    class Adapted(nn.Linear):
        pass

    layer_of(model).self_attn.q_proj.__class__ = Adapted


def _gelu(model: Any) -> None:
    layer_of(model).mlp.act_fn = nn.GELU()


def _another_part(model: Any) -> None:
    layer_of(model).extra = nn.Linear(4, 4)


@needs_kernels
@pytest.mark.parametrize("change", [_twice, _hooked, _adapted, _gelu, _another_part])
def test_a_layer_that_computes_something_else_keeps_its_forward(change: Callable[[Any], None]):
    model = made("llama", torch.bfloat16)
    change(model)
    with torch.inference_mode(), fused.fused(model):
        outputs(model)
        assert are_fused(model) == [False, True]


@needs_kernels
def test_layers_without_rotary_embedding_are_told_apart():
    model = made("smollm3", torch.bfloat16, no_rope_layers=[1, 0], initializer_range=0.02)
    with torch.inference_mode(), fused.fused(model):
        outputs(model)
        assert are_fused(model) == [True, False]


@needs_kernels
def test_only_calls_of_the_kind_that_was_tried_are_fused():
    layer = layer_of(made("llama", torch.bfloat16))
    x, whole, half = (
        torch.zeros(1, 3, 96).bfloat16(),
        torch.zeros(1, 3, 32).bfloat16(),
        torch.zeros(1, 3, 16).bfloat16(),
    )
    assert _common.is_usual(layer, x, {"position_embeddings": (whole, whole)})
    for around in ((half, half), (whole.float(), whole.float()), (whole[0], whole[0]), whole, None):
        assert not _common.is_usual(layer, x, {"position_embeddings": around})
    assert not _common.is_usual(layer, x.repeat(2, 1, 1), {"position_embeddings": (whole, whole)})


@needs_kernels
def test_values_that_lie_unlike_keys_are_stored_right():
    model = made("llama", torch.float32)
    joined = torch.randn(1, 4, 10, 32)  # six queries, two keys and two values a token
    q, k = joined[:, :, :6].transpose(1, 2), joined[:, :, 6:8].clone().transpose(1, 2)
    v, how = joined[:, :, 8:].transpose(1, 2), fused.How(0.2, None, None)
    found = []
    for values in (v, v.transpose(1, 2).clone().transpose(1, 2)):
        slots = Slots(model.config, 1, next(model.parameters()))
        found.append(StepPlan(slots, [Span(0, 0, 4, 1)]).attend(0, q, k, values, how))
        assert torch.equal(slots.values[0, 0, :, :4], v[0])
    torch.testing.assert_close(*found)


def test_gemma_keeps_its_forward():
    model = made("gemma2", torch.bfloat16, query_pre_attn_scalar=32)
    with fused.fused(model):
        assert not any("forward" in layer.__dict__ for layer in model.model.layers)


@needs_kernels
def test_a_first_short_context_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "has_product", lambda dtype: False)
    model = made("llama", torch.float32)
    ids = torch.arange(fused.SHORT + 1) % 100
    with torch.inference_mode(), fused.fused(model):
        slots = Slots(model.config, 2, next(model.parameters()))
        for start, count, expected in [(0, 5, False), (5, 1, True)]:
            plan = StepPlan(slots, [Span(0, start, count, 1)])
            policy.hidden_states(model, ids[:count], plan.place_T, plan)
            assert are_fused(model) == [expected] * 2
    with torch.inference_mode(), fused.fused(model):
        slots.reserve(len(ids))
        plan = StepPlan(slots, [Span(1, 0, len(ids), 1)])
        policy.hidden_states(model, ids, plan.place_T, plan)
        assert all(are_fused(model))


def test_a_slow_type_is_told_once(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(_slow.progress, "say", said.append)
    monkeypatch.setattr(_slow, "is_slow", lambda weight: weight.dtype == torch.bfloat16)
    model = made("llama", torch.bfloat16)
    for usable in (True, False, False):
        monkeypatch.setattr(ops, "usable", lambda like, usable=usable: usable)
        with fused.fused(model):
            assert len(said) == (not usable)


@needs_kernels
def test_layers_are_as_they_were_after_an_error():
    model = made("llama", torch.float32)
    with pytest.raises(ValueError, match="stop"), fused.fused(model):
        raise ValueError("stop")
    assert not any("forward" in layer.__dict__ for layer in model.modules())


@needs_kernels
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_drafts_with_and_without_kernels(
    tiny_model: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
):
    loaded = load.load(str(tiny_model), "float32", device="cpu")
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))
    prompts = [Prompt(f"p{place}", "abcdefghij"[: 2 + place]) for place in range(7)]

    def drafts(*, speculate: bool = True, slots: int = 4) -> list[Attempt]:
        how = sampling.Config(max_new_tokens=12, temperature=temperature)
        engine = local.Local(loaded.model, talk, how, seed=0, slots=slots, speculate=speculate)
        return engine.run(prompts, partial(chain.generate, cfg=chain.Config(turns=3)))

    def ids(attempts: list[Attempt]) -> list[tuple[int, ...]]:
        return [draft.token_ids for attempt in attempts for draft in attempt.drafts]

    ours = ids(drafts())
    assert ids(drafts(speculate=False)) == ours
    assert ids(drafts(slots=1)) == ours
    monkeypatch.setattr(ops, "usable", lambda like: False)
    assert ids(drafts()) == ours


@needs_kernels
@pytest.mark.parametrize("dtype", CLOSE)
def test_copied_and_grown_slots(dtype: torch.dtype):
    """A slot that takes over what another holds, from and to places within a block, attends like it."""
    slots = Slots(made("llama", dtype).config, 2, torch.zeros(1, dtype=dtype), length=40)
    how = fused.How(0.2, None, None)
    q, k, v = (torch.randn(1, heads, 60, 32).to(dtype) for heads in (6, 2, 2))

    def attended(slot: int, start: int, count: int) -> Tensor:
        a, b, c = (x[:, :, start : start + count] for x in (q, k, v))
        return StepPlan(slots, [Span(slot, start, count, 1)]).attend(0, a, b, c, how)[0, -1]

    attended(0, 0, 45)
    attended(1, 0, 7)
    slots.copy(0, 1, 7, 45)
    slots.reserve(200)
    assert torch.equal(attended(1, 45, 15), attended(0, 45, 15))


@needs_kernels
def test_heads_that_the_config_did_not_promise_are_refused():
    slots, how = Slots(made("llama", torch.bfloat16).config, 1, torch.zeros(1).bfloat16()), fused.How(0.2, None, None)
    for heads, width, dtype in [(2, 64, torch.bfloat16), (1, 32, torch.bfloat16), (2, 32, torch.float32)]:
        q, k, v = (torch.randn(1, count, 4, width).to(dtype) for count in (6, heads, heads))
        with pytest.raises(ModelError, match="promises"):
            StepPlan(slots, [Span(0, 0, 4, 1)]).attend(0, q, k, v, how)


@pytest.mark.parametrize("dtype", [dtype for dtype in (torch.bfloat16, torch.float32) if ops.has_product(dtype)])
@pytest.mark.parametrize("family", [*FAMILIES, "smollm3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_our_own_products_drafts_are_the_same_in_any_batch(
    tiny_model: Path, family: str, temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    model = made(family, dtype, **MORE.get(family, {}))
    loaded = replace(load.load(str(tiny_model), "float32", device="cpu"), model=model)
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))
    prompts = [Prompt(f"p{place}", "abcdefghij"[: 2 + place]) for place in range(7)]

    def drafts(slots: int, *, speculate: bool) -> list[tuple[Any, ...]]:
        how = sampling.Config(max_new_tokens=12, temperature=temperature)
        engine = local.Local(loaded.model, talk, how, seed=0, slots=slots, speculate=speculate)
        attempts = engine.run(prompts, partial(chain.generate, cfg=chain.Config(turns=3)))
        return [(draft.token_ids, draft.sampler_logprobs) for attempt in attempts for draft in attempt.drafts]

    together = drafts(7, speculate=True)
    for slots, speculate in ((7, True), (7, False), (1, True), (3, False)):
        assert drafts(slots, speculate=speculate) == together  # also: no layer changes its way after its first run
    monkeypatch.setattr(StepPlan, "run", lambda *args: 1 / 0)
    if family != "smollm3":
        with pytest.raises(ZeroDivisionError):
            drafts(7, speculate=True)
    monkeypatch.setattr(StepPlan, "takes", lambda *args: False)
    assert drafts(7, speculate=True) == together  # kernel by kernel instead of layers in one call
