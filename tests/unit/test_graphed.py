"""Layers as graphs: what goes in and out of them, with graphs that compute again instead of being replayed."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from upturn import trees
from upturn.models import _compiled, _flex, _graphed, _slow, fused_training, policy
from upturn.models._attention import How
from upturn.models._compiled_layer import Compiled
from upturn.types import Sample

SIZES = (128, 256)
SHAPE: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16}


def forest(seed: int, rows: int = 10) -> trees.TokenTree:
    """Ten rows are of the smaller size, twenty of the larger one."""
    rng = random.Random(seed)

    def some() -> tuple[int, ...]:
        return tuple(rng.choices(range(50), k=rng.randint(3, 8)))

    return trees.build([Sample(some(), some()) for _ in range(rows)])


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Any, how: How) -> Tensor:
    """FlexAttention has no backward pass on a CPU."""
    (ends,), places = mask.mask_mod.reads, torch.arange(q.shape[2])
    seen = (places <= places[:, None]) & (places[:, None] < ends[: len(places)])
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None], scale=how.scaling)
    return out.transpose(1, 2)


class AgainAndAgain:
    """In place of graphs: a replay runs the work again, into the tensors that the first time gave."""

    def __init__(self, like: Tensor) -> None:
        self.latest: dict[int, Tensor] = {}

    def captured(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        first = work()

        def replay() -> None:
            with torch.enable_grad():
                again = work()
            LATEST[first.data_ptr()] = again
            first.data.copy_(again.detach())

        return first, replay


LATEST: dict[int, Tensor] = {}
"""What stands where with its history, which a detached tensor lacks."""


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[_graphed.Graphs]:
    """Captures on a CPU."""
    real: Any = torch.autograd.grad

    def grad(outputs: Any, inputs: Any, *g: Any) -> Any:
        return real(LATEST.get(outputs.data_ptr(), outputs) if g else outputs, inputs, *g)

    def padded(tree: trees.TokenTree, model: Any) -> trees.TokenTree:
        return trees.filled(tree, SIZES[len(tree.ids_T) > SIZES[0]]) if _graphed._OPEN else tree

    LATEST.clear()
    monkeypatch.setitem(fused_training.KINDS, "cpu", Compiled)
    monkeypatch.setattr(_compiled, "BACKEND", "eager")
    monkeypatch.setattr(_flex, "attend", dense)
    monkeypatch.setattr(_graphed, "padded", padded)
    monkeypatch.setattr(_graphed, "may_capture", lambda *of: True)
    monkeypatch.setattr(_graphed, "Pool", AgainAndAgain)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    with policy.captured_layers():
        yield _graphed._OPEN[-1]


def learnt(model: Any, tree: trees.TokenTree) -> list[Tensor]:
    model.zero_grad()
    logprobs = policy.tree_logprobs(model, tree)
    (logprobs * torch.arange(len(logprobs))).sum().backward()
    return [logprobs.detach(), *(weight.grad.clone() for weight in model.parameters())]


def test_captured_layers_learn_the_same(graphs: _graphed.Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    for seed, rows in enumerate((10, 20, 10, 20, 20, 10)):
        found = learnt(model, forest(seed, rows))
        with monkeypatch.context() as without:
            without.setattr(_graphed, "_OPEN", [])
            wanted = learnt(model, forest(seed, rows))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert sorted(size for _, size, _ in graphs.made) == [*SIZES]
    assert graphs.number == 4, "the first batch of a size is not captured"


def test_a_captured_pass_has_leaves_of_its_own(graphs: _graphed.Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is alive holds nodes of the parameters, made on another stream than that of the capture."""
    asked, grad = list[Any](), torch.autograd.grad

    def noted(out: Any, of: Any, *g: Any) -> Any:
        asked.extend(of if g else ())
        return grad(out, of, *g)

    monkeypatch.setattr(torch.autograd, "grad", noted)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    for seed in range(3):
        learnt(model, forest(seed))
    parameters = {weight.data_ptr(): weight for weight in model.parameters()}
    shared = [parameters[leaf.data_ptr()] for leaf in asked if leaf.data_ptr() in parameters]
    assert len(shared) == 3 * 9 * SHAPE["num_hidden_layers"], "once captured, twice replayed"
    assert not {*map(id, asked)} & {*map(id, parameters.values())}


@pytest.mark.usefixtures("graphs")
def test_graphs_go_when_the_training_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        AgainAndAgain, "captured", lambda self, work: (work(), lambda: None)
    )  # as a graph: without work
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    gc.disable()
    try:
        with policy.captured_layers():
            for seed in range(3):
                learnt(model, forest(seed))
            [captured] = _graphed._OPEN[-1].made.values()
            left = [weakref.ref(captured), weakref.ref(captured.graphs)]
            del captured
        assert [ref() for ref in left] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("rows", [10, 20])
def test_a_backward_pass_after_another_forward_pass_is_refused(graphs: _graphed.Graphs, rows: int) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    for seed in range(2):
        learnt(model, forest(seed))
        learnt(model, forest(seed, rows))
    late = policy.tree_logprobs(model, forest(2)).sum()
    policy.tree_logprobs(model, forest(3, rows))
    with pytest.raises(RuntimeError, match="before the next forward pass"):
        late.backward()


def test_what_cannot_be_captured_goes_on_without(graphs: _graphed.Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(_slow.progress, "say", said.append)

    def fails(self: Any, work: Any) -> Any:
        raise RuntimeError("a layer waits")

    monkeypatch.setattr(AgainAndAgain, "captured", fails)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    for seed in range(3):
        learnt(model, forest(seed))
    assert not graphs.made
    assert not graphs.works
    assert len(said) == 1
    assert "a layer waits" in said[0]


def test_sizes_are_few_and_near() -> None:
    sizes = {(size, -(-size // step) * step) for size in range(128, 20000, 37) for step in [_graphed.step_of(size)]}
    assert len({rounded for _, rounded in sizes}) < 60
    assert all(size <= rounded <= max(size + 128, 1.126 * size) for size, rounded in sizes)
