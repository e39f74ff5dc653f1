"""Packed weights: the same bits as plain ones, only in a run, never older than it, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config

from upturn.engines import local, sampling
from upturn.models import chat, load, packed
from upturn.models.native import ops
from upturn.strategies import chain
from upturn.types import Attempt, Prompt, Requests

PROMPTS = [Prompt(f"p{i}", "abcdefghij"[: 2 + i]) for i in range(7)]
SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,  # has biases
    "qwen3": Qwen3Config,
    "gemma2": partial(Gemma2Config, sliding_window=6, query_pre_attn_scalar=24),
}
only_where_packed = pytest.mark.skipif(
    not packed.available(), reason="oneDNN packs no bfloat16 weights on this machine"
)
same_bits = pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="bits were compared on AVX-512 only")


def made(family: str = "llama", seed: int = 0) -> nn.Module:
    """A random model with weights large enough to be packed."""
    torch.manual_seed(seed)
    config = FAMILIES[family](vocab_size=102, **SHAPE, pad_token_id=0, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config).bfloat16()


@pytest.fixture
def loaded(tiny_model: Path) -> load.Loaded:
    return replace(load.load(str(tiny_model), "bfloat16", device="cpu"), model=made())


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "has_product", lambda dtype: False)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "PATIENCE", 0)


def engine_of(loaded: load.Loaded) -> local.Local:
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))
    return local.Local(loaded.model, talk, sampling.Config(max_new_tokens=12, temperature=1.0), seed=0, slots=4)


def drafts_of(engine: local.Local) -> list[Attempt]:
    return engine.run(PROMPTS, partial(chain.generate, cfg=chain.Config(turns=3)))


def own_forwards(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if "forward" in layer.__dict__]


def both(layer: nn.Module, *inputs: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a layer gives, plain and packed."""
    with torch.inference_mode():
        plain = [layer(x) for x in inputs]
        with packed.packed(nn.Sequential(layer)):
            return plain, [layer(x) for x in inputs]


@pytest.mark.skipif(not (packed.available() or ops.has_product(torch.bfloat16)), reason="nothing packs weights here")
@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 64, 300])
def test_a_packed_layer_computes_the_same(rows: int, bias: bool):
    torch.manual_seed(0)
    layer = nn.Linear(96, 80, bias=bias, dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randint(-3, 4, weight.shape))
    whole = [torch.randint(-3, 4, shape).bfloat16() for shape in ((1, rows, 96), (96, rows))]
    x, across = whole[0], whole[1].T
    plain, ours = both(layer, x, across)  # sums of whole numbers have no rounding, in whatever order
    assert all(torch.equal(one, other) for one, other in zip(plain, ours, strict=True))
    exact = x.double() @ layer.weight.detach().double().T + (layer.bias.detach().double() if bias else 0)
    assert torch.equal(ours[0], exact.bfloat16())


@same_bits
@only_where_packed
@pytest.mark.usefixtures("at_once", "by_onednn")
@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_a_packed_layer_rounds_the_same(rows: int):
    torch.manual_seed(0)
    plain, ours = both(nn.Linear(96, 80, dtype=torch.bfloat16), *torch.randn(50, rows, 96).bfloat16())
    assert all(torch.equal(one, other) for one, other in zip(plain, ours, strict=True))


@same_bits
@only_where_packed
@pytest.mark.usefixtures("at_once", "by_onednn")
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_are_the_same_to_the_bit(loaded: load.Loaded, family: str, monkeypatch: pytest.MonkeyPatch):
    loaded.model = made(family)
    ours = drafts_of(engine_of(loaded))
    monkeypatch.setattr(packed, "available", lambda: False)
    assert ours == drafts_of(engine_of(loaded))


@pytest.mark.usefixtures("at_once")
def test_the_model_is_as_it_was_after_a_run(loaded: load.Loaded, tmp_path: Path):
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    engine = engine_of(loaded)
    seen: list[int] = []
    rule = partial(chain.generate, cfg=chain.Config(turns=2))
    engine.run(PROMPTS, rule, lambda _: seen.append(len(own_forwards(loaded.model))))
    assert max(seen) >= (1 if packed.available() or ops.has_product(torch.bfloat16) else 0)
    assert own_forwards(loaded.model) == []
    after = loaded.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    loaded.model(input_ids=torch.tensor([[1, 5, 9]]), upturn_plan=_Causal()).logits.float().sum().backward()
    assert all(weight.grad is not None for weight in loaded.model.parameters())
    load.save(loaded, tmp_path / "saved", "# card")


class _Causal:
    """Plain causal attention, as training would have it."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Any) -> torch.Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@pytest.mark.usefixtures("at_once")
def test_a_run_sees_weights_that_changed_since_the_last_one(loaded: load.Loaded):
    engine, other = engine_of(loaded), made(seed=1)
    first = drafts_of(engine)
    loaded.model.load_state_dict(other.state_dict())
    again = drafts_of(engine)
    assert again != first
    assert again == drafts_of(engine_of(replace(loaded, model=other)))


@pytest.mark.usefixtures("at_once")
def test_a_failed_run_leaves_the_model_alone(loaded: load.Loaded):
    async def broken(prompt: Prompt, sample: Any) -> Any:
        await sample(prompt, ())
        raise ValueError(prompt.id)

    with pytest.raises(ValueError, match=r"^p\d"):
        engine_of(loaded).run(PROMPTS, broken)
    assert own_forwards(loaded.model) == []


class _Adapted(nn.Linear):
    """A layer that computes something of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def test_only_plain_layers_are_packed():
    hooked = nn.Linear(80, 80, dtype=torch.bfloat16)
    hooked.forward = lambda input: input
    tiny = nn.Linear(64, 64, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(80, 80, dtype=torch.float16), _Adapted(80, 80, dtype=torch.bfloat16), hooked, tiny)
    with packed.packed(model):
        assert own_forwards(model) == [hooked]
    assert own_forwards(model) == [hooked]


@only_where_packed
@pytest.mark.usefixtures("by_onednn")
def test_weights_are_packed_once_and_only_when_that_pays():
    layer, x = nn.Linear(80, 80, dtype=torch.bfloat16), torch.ones(1, 80, dtype=torch.bfloat16)
    held = []
    with torch.inference_mode(), packed.packed(nn.Sequential(layer)):
        forward: Any = layer.forward
        for _ in range(packed.PATIENCE + 3):
            layer(x)
            held.append(forward._product)
    assert held[: packed.PATIENCE] == [None] * packed.PATIENCE
    assert len({id(weight) for weight in held[packed.PATIENCE :]}) == 1


@pytest.mark.skipif(not ops.usable(torch.zeros(1)), reason="no C compiler, or not Linux")
@pytest.mark.parametrize("biased", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("width", [96, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers_side_by_side(width: int, biased: tuple[bool, bool], dtype: torch.dtype):
    torch.manual_seed(0)
    gate, up = (nn.Linear(width, 164 if width == 100 else 160, bias=bias, dtype=dtype) for bias in biased)
    x = torch.randn(5, width).to(dtype)
    with torch.inference_mode():
        both = torch.cat([gate(x), up(x)], 1)
        torch.testing.assert_close(packed.Product((gate, up))(x), both)
        torch.testing.assert_close(packed.Gated(gate, up)(x), ops.silu_mul(both))
