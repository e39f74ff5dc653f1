"""Layers that learn fused: the plain values and gradients, the same each time, and a model left as it was."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from upturn import trees
from upturn.models import _common, _fused_layer, _kept, _memory, _output_layer, _slow, fused_training, policy
from upturn.models.native import back, ops
from upturn.types import Sample

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
COMMON: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": partial(MistralConfig, sliding_window=4),
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
TYPES = list(CLOSE)
both_widths = pytest.mark.parametrize("width", [16, 32])
"""Of a head: the kernel for attention takes multiples of 32."""
native = pytest.mark.skipif(not ops.usable(torch.zeros(1)), reason="no kernels on this machine")
pytestmark = native


def tiny(config: Any, dtype: torch.dtype, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SHAPE | more)).to(dtype).eval()
    policy.use_plans(model)
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(bias, std=0.3)
    return model


def forest(stem: int = 20, branch: int = 9) -> trees.TokenTree:
    rng = random.Random(0)
    root = tuple(rng.choices(range(3, 96), k=stem))
    branches = [tuple(rng.choices(range(3, 96), k=branch)) for _ in range(4)]
    rows = [Sample(root, answer) for answer in branches]
    return trees.build([*rows, *(Sample(root + branches[0] + (5,), answer) for answer in branches)])


def learnt(model: nn.Module, tree: trees.TokenTree) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logprobs = policy.tree_logprobs(model, tree)
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return logprobs.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_training, "_fusable", lambda layer: None)
    monkeypatch.setattr(_output_layer, "usable", lambda *args: False)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str = "") -> None:
    assert (found.double() - expected.double()).abs().max() <= CLOSE[dtype] * expected.abs().max(), what


def error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The largest one of each gradient, relative to its largest number, in the mean."""
    parts = [float((found[name] - grad).abs().max() / grad.abs().max()) for name, grad in exact.items()]
    return sum(parts) / len(parts)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", COMMON)
@pytest.mark.parametrize("tied", [False, True])
@both_widths
def test_fused_layers_learn_as_plain_ones_do(
    family: str, dtype: torch.dtype, tied: bool, width: int, monkeypatch: pytest.MonkeyPatch
):
    model, tree = tiny(COMMON[family], dtype, tie_word_embeddings=tied, head_dim=width), forest()
    assert_learns_as_plain(model, tree, dtype, monkeypatch)


def assert_learns_as_plain(
    model: Any, tree: trees.TokenTree, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(map(fused_training._fusable, _common.layers_of(model)))
    logprobs, grads = learnt(model, tree)
    plain(monkeypatch)
    expected, plain_grads = learnt(model, tree)
    assert_near(logprobs, expected, dtype)
    assert set(grads) == set(plain_grads) == {name for name, _ in model.named_parameters()}
    exact = learnt(model.float(), tree)[1]
    if dtype == torch.float32:
        for name, grad in exact.items():
            assert_near(grads[name], grad, dtype, name)
    else:  # both round, up to a tenth of the largest number: neither is nearer to the truth than the other
        assert error(grads, exact) <= 1.5 * error(plain_grads, exact)


@pytest.mark.parametrize("dtype", TYPES)
@both_widths
def test_what_is_kept_or_made_again_has_the_same_bits(dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch):
    model, tree, found = tiny(LlamaConfig, dtype, head_dim=width), forest(), []
    learnt(model, tree)  # each layer is tried once
    for free in (2**40, 0):
        monkeypatch.setattr(_memory, "free", lambda free=free: free)
        made = Counter[str]()
        monkeypatch.setattr(_fused_layer, "_gate_up", partial(counted, made, _fused_layer._gate_up))
        found.append(learnt(model, tree)[1])
        monkeypatch.undo()
        assert made["calls"] == (2 if free else 4)  # of two layers, once forward and once again
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_layers_keep_in_pieces_as_large_as_needed(family: str, monkeypatch: pytest.MonkeyPatch):
    model, tree, taken = tiny(COMMON[family], torch.bfloat16), forest(), list[tuple[int, int]]()
    expected = learnt(model, tree)[1]

    class Noted(_kept.Piece):
        def close(self) -> None:
            if self._memory is not None:
                taken.append((self._taken, len(self._memory)))
            super().close()

    monkeypatch.setattr(_kept, "Piece", Noted)
    found = learnt(model, tree)[1]
    assert len(taken) == 2 and all(used == room for used, room in taken)
    with torch.no_grad():
        policy.tree_logprobs(model, tree)
    assert len(taken) == 2  # nothing is kept without a backward pass
    monkeypatch.setattr(_kept, "pieces", lambda sizes: [_kept.Piece() for _ in sizes])
    apart = learnt(model, tree)[1]
    assert all(torch.equal(grad, found[name]) and torch.equal(grad, apart[name]) for name, grad in expected.items())


def test_a_piece_never_gives_the_same_memory_twice():
    (piece,) = _kept.pieces([[10, 70]])
    one, two, three = (piece.empty(torch.empty(0, dtype=torch.bfloat16), *shape) for shape in ((5,), (5, 7), (1,)))
    assert two.data_ptr() - one.data_ptr() == _kept.STEP and two.shape == (5, 7) and two.is_contiguous()
    assert one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr() != three.untyped_storage().data_ptr()
    piece.close()
    assert piece.empty(one, 1).untyped_storage().data_ptr() != one.untyped_storage().data_ptr()


def counted(made: Counter[str], work: Callable[..., Any], *args: Any) -> Any:
    made["calls"] += 1
    return work(*args)


def test_a_model_that_is_first_seen_without_gradients_is_fused_too():
    model, still = tiny(LlamaConfig, torch.float32), tiny(LlamaConfig, torch.float32)
    policy.tree_kl(model, still, forest())  # in inference mode
    assert all(map(fused_training._fusable, _common.layers_of(model)))


def test_kernels_that_err_are_not_used(monkeypatch: pytest.MonkeyPatch):
    right = back.silu_mul_back

    def wrong(gate_up: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grad, product = right(gate_up, g)
        return (grad * 1.5, product) if g.dtype == torch.bfloat16 else (grad, product)

    monkeypatch.setattr(back, "silu_mul_back", wrong)
    assert not any(map(fused_training._fusable, _common.layers_of(tiny(LlamaConfig, torch.bfloat16))))
    assert all(map(fused_training._fusable, _common.layers_of(tiny(LlamaConfig, torch.float32))))


def test_a_model_without_plans_yet_is_fused_at_once():
    model = tiny(LlamaConfig, torch.float32)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    policy.tree_logprobs(model, forest())
    assert all(map(fused_training._fusable, _common.layers_of(model)))


@pytest.mark.parametrize("dtype", TYPES)
def test_without_gradients_the_bits_are_those_of_training(dtype: torch.dtype):
    model, tree = tiny(LlamaConfig, dtype), forest()
    with torch.no_grad():
        still = policy.tree_logprobs(model, tree)
    assert torch.equal(still, policy.tree_logprobs(model, tree).detach())


@pytest.mark.parametrize("dtype", TYPES)
@both_widths
def test_gradients_repeat_to_the_bit_on_any_number_of_threads(dtype: torch.dtype, width: int):
    model, tree = tiny(LlamaConfig, dtype, head_dim=width), forest(stem=210)
    before = torch.get_num_threads()
    first = learnt(model, tree)[1]
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            again = learnt(model, tree)[1]
            assert all(torch.equal(again[name], grad) for name, grad in first.items())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["model.norm", "model.layers.0.input_layernorm", "model.layers.1.mlp.down_proj"])
@both_widths
def test_a_weight_that_is_no_number_shows_in_the_loss(name: str, dtype: torch.dtype, width: int):
    model = tiny(LlamaConfig, dtype, head_dim=width)
    with torch.no_grad():
        model.get_submodule(name).weight.view(-1)[0] = float("nan")  # type: ignore[union-attr,operator]
    assert torch.isnan(policy.tree_logprobs(model, forest())).any()


def test_frozen_weights_get_no_gradient():
    model, tree = tiny(Qwen2Config, torch.float32), forest()
    everything = learnt(model, tree)[1]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("o_proj" in name or "v_proj" in name)
    some = learnt(model, tree)[1]
    assert some and all("o_proj" in name or "v_proj" in name for name in some)
    assert all(torch.equal(grad, everything[name]) for name, grad in some.items())


def test_other_layers_keep_their_own_forward():
    gemma = tiny(lambda **shape: Gemma2Config(**shape, query_pre_attn_scalar=16), torch.float32)
    assert not any(map(fused_training._fusable, _common.layers_of(gemma)))
    assert not _output_layer.usable(gemma, torch.zeros(1))
    adapted, hooked = (tiny(LlamaConfig, torch.float32) for _ in range(2))
    for layer in _common.layers_of(adapted):
        layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj)  # type: ignore[union-attr]
    for layer in _common.layers_of(hooked):
        layer.mlp.register_forward_hook(lambda *args: None)  # type: ignore[union-attr,operator]
    for model in (adapted, hooked, tiny(LlamaConfig, torch.float64)):
        assert not any(map(fused_training._fusable, _common.layers_of(model)))
        assert torch.isfinite(learnt(model, forest())[0]).all()


@pytest.mark.parametrize("is_slow", [True, False])
def test_a_slow_type_is_told_once(is_slow: bool, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(_slow.progress, "say", said.append)
    monkeypatch.setattr(_slow, "is_slow", lambda weight: is_slow and weight.dtype == torch.bfloat16)
    for dtype, config in ((torch.bfloat16, Gemma2Config), (torch.float32, Gemma2Config), (torch.bfloat16, LlamaConfig)):
        model = tiny(config, dtype)
        for _ in range(2):
            policy.tree_logprobs(model, forest())
    assert len(said) == is_slow
    assert not is_slow or "float32" in said[0]


def test_the_model_is_left_as_it_was_also_after_a_fault(monkeypatch: pytest.MonkeyPatch):
    model, tree = tiny(LlamaConfig, torch.float32), forest()
    learnt(model, tree)
    assert not any("forward" in part.__dict__ for part in model.modules())
    monkeypatch.setattr(_fused_layer, "attend", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy.tree_logprobs(model, tree)
    assert not any("forward" in part.__dict__ for part in model.modules())


def test_without_kernels_everything_is_as_ever():
    program = "import torch; from upturn.models.native import ops\nassert not ops.usable(torch.zeros(1))\n"
    program += "from upturn.models import _common\nfrom test_fused_training import *\n"
    program += "model = tiny(LlamaConfig, torch.bfloat16)\n"
    program += "assert not any(map(fused_training._fusable, _common.layers_of(model)))\n"
    program += "assert torch.isfinite(learnt(model, forest())[0]).all()"
    here = os.environ | {"UPTURN_NATIVE": "0", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    assert subprocess.run([sys.executable, "-c", program], env=here).returncode == 0
