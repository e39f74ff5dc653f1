"""What trains on CUDA, as far as a CPU can tell: masks of blocks, halves of layers, passes over logits; what compiles
when."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_fused_training import COMMON, TYPES, assert_learns_as_plain, assert_near, forest, learnt, tiny
from torch import nn
from transformers import Gemma2Config, LlamaConfig

from upturn import numerics, trees
from upturn.models import _common, _compiled, _compiled_logits, _flex, _output_layer, fused_training, policy
from upturn.models._attention import How
from upturn.models._compiled_layer import Compiled
from upturn.models._tree_plan import TreePlan
from upturn.types import Sample

HEADS = 15
"""As many as the first tree has blocks."""


@pytest.fixture(name="graphs")
def _graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Every graph that is compiled; it then runs op by op."""
    from torch._dynamo.backends.debugging import aot_eager

    made: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        made.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(_compiled, "BACKEND", backend)
    monkeypatch.setattr(_compiled, "_MADE", {})
    yield made
    assert not any(function.failed for function in _compiled._MADE.values())


@pytest.fixture(name="compiled")
def _compiled_here(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Layers and the output layer compute as on CUDA; the attention as on a CPU."""
    monkeypatch.setitem(fused_training.KINDS, "cpu", Compiled)
    monkeypatch.setattr(_output_layer, "_passes", lambda hidden: _compiled_logits)
    monkeypatch.setattr(_output_layer.ops, "usable", lambda like: like.dtype in _compiled_logits.TYPES)
    return graphs


def wood(seed: int, scale: int = 1) -> trees.TokenTree:
    """Some trees of many sizes."""
    rng = random.Random(seed)

    def words(most: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(3, 96), k=rng.randint(1, most * scale)))

    rows = []
    for root in [words(300) for _ in range(rng.randint(1, 3))]:
        for stem in [root + words(200) for _ in range(rng.randint(1, 4))]:
            rows += [Sample(stem, words(150)) for _ in range(rng.randint(1, 3))]
    return trees.build(rows)


def blocks(count: torch.Tensor, places: torch.Tensor) -> list[set[int]]:
    return [set(places[0, 0, row, : count[0, 0, row]].tolist()) for row in range(count.shape[-1])]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("seed", range(6))
def test_blocks_are_those_of_the_table_of_queries_and_keys(seed: int, window: int | None):
    from torch.nn.attention.flex_attention import create_block_mask

    tree = wood(seed)
    size, ends, depth = len(tree.ids_T), tree.ends_T, tree.positions_T

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen = (k <= q) & (q < ends[k])
        return seen if window is None else seen & (depth[q] - depth[k] < window)

    expected = create_block_mask(visible, None, None, size, size, device="cpu")
    found = _flex.block_mask(tree, window)
    sides = [f"{kind}{side}" for kind in ("", "full_") for side in ("kv", "q")]
    assert size % _flex.BLOCK and expected.shape == found.shape
    for side in sides:
        mine, theirs = (
            blocks(getattr(m, f"{side}_num_blocks"), getattr(m, f"{side}_indices")) for m in (found, expected)
        )
        if window is None:
            assert mine == theirs
        else:  # blocks out of the window are masked, and none is whole
            assert all(a >= b for a, b in zip(mine, theirs, strict=True)) or side.startswith("full")
            assert not side.startswith("full") or not any(mine)
    places = torch.arange(found.kv_indices.shape[-1] * _flex.BLOCK)
    q, k = places[:, None], places[None]
    inside = (q < size) & (k < size)
    seen = found.mask_mod(torch.tensor(0), torch.tensor(0), q, k)
    assert torch.equal(seen & inside, visible(0, 0, q.clamp(max=size - 1), k.clamp(max=size - 1)) & inside)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_attention_by_blocks_is_that_by_units_and_compiles_once_for_a_kind(graphs: list[Any]):
    torch.manual_seed(0)
    kinds = [How(0.125, None, None), How(0.125, 40, None), How(0.3, None, 20.0)]
    made = {how: _compiled.Function(_flex.run, dynamic=True) for how in kinds}
    for seed in range(2):
        tree = wood(seed)
        size = len(tree.ids_T)
        assert seed or -(-size // _flex.BLOCK) == HEADS  # two equal sizes must not be taken for the same
        q, k, v = (torch.randn(size, heads, 16).transpose(0, 1)[None].detach() for heads in (HEADS, 5, 5))
        for how, run in made.items():
            expected = TreePlan(tree, flex=False).attend(0, q, k, v, how)
            _flex.only_tokens_vary(q, k, v)
            numbers = (repr(how.scaling), repr(how.softcap or 0.0))
            found = run(q, k, v, _flex.block_mask(tree, how.window), *numbers).transpose(1, 2)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == len(kinds)


@pytest.mark.parametrize("is_view", [False, True])
def test_what_the_kernel_gets_is_no_view_whether_it_learns_or_not(is_view: bool):
    whole = torch.randn(5, 3, 16, requires_grad=True)
    x = whole.transpose(0, 1)[None] if is_view else whole[None] * 1
    found = _flex._apart(x)
    assert found._base is None and found.requires_grad and found.stride() == x.stride()
    assert found.data_ptr() == x.data_ptr()
    found.square().sum().backward()
    assert whole.grad is not None and torch.equal(whole.grad, 2 * whole)
    still = whole.detach().transpose(0, 1)[None]
    apart = _flex._apart(still)
    assert apart._base is None and apart.requires_grad and not still.requires_grad


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_window_that_hides_nothing_is_none():
    tree = wood(0)
    deepest = int(tree.positions_T.max()) + 1
    q, k, v = (torch.randn(1, 2, len(tree.ids_T), 16) for _ in range(3))
    for window, held in ((deepest, None), (deepest - 1, deepest - 1)):
        plan = TreePlan(tree, flex=True)
        found = plan.attend(0, q, k, v, How(0.25, window, None))
        expected = TreePlan(tree, flex=False).attend(0, q, k, v, How(0.25, window, None))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert list(plan._blocks) == [held]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_compiled_layers_learn_as_plain_ones_do(
    family: str, dtype: torch.dtype, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
):
    model = tiny(COMMON[family], dtype, tie_word_embeddings=family == "qwen2")
    assert_learns_as_plain(model, forest(), dtype, monkeypatch)
    assert len(compiled) == 4 + 2


def test_another_number_of_tokens_compiles_nothing(compiled: list[Any]):
    model = tiny(COMMON["qwen3"], torch.bfloat16)
    learnt(model, forest())
    before = len(compiled)
    for sizes in ((30, 11), (64, 16), (5, 2), (90, 32)):
        learnt(model, forest(*sizes))
    with torch.no_grad():
        policy.tree_logprobs(model, forest(41, 12))
    assert len(compiled) == before == 4 + 2


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_a_function_compiles_for_any_number_of_shapes(graphs: list[Any]):
    for width in range(2, 14):  # torch gives up after eight
        for tokens in (3, 4, 5):
            x = torch.ones(tokens, width)
            _compiled.by_tokens(x)
            assert torch.equal(_compiled.function(_doubled, width)(x), 2 * x)
    assert len(graphs) == 12


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("is_frozen", [False, True])
def test_policy_and_reference_run_the_same_code(dtype: torch.dtype, is_frozen: bool, compiled: list[Any]):
    model, tree = tiny(LlamaConfig, dtype), forest()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen or "v_proj" in name)
    with torch.no_grad():
        still = policy.tree_logprobs(model, tree)
    forward = len(compiled)
    found = policy.tree_logprobs(model, tree)
    assert forward == len(compiled) == 2 + 1
    assert torch.equal(found.detach(), still)
    found.sum().backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_gates_kept_or_made_again_give_the_same_gradients(compiled: list[Any], monkeypatch: pytest.MonkeyPatch):
    model, tree, found = tiny(LlamaConfig, torch.float32), forest(), []
    for free in (2**40, 0):
        monkeypatch.setattr(fused_training._memory, "free_on", lambda device, free=free: free)
        found.append(learnt(model, tree)[1])
    assert len(compiled) == 4 + 2 + 1
    for name, grad in found[0].items():
        assert_near(found[1][name], grad, torch.float32, name)


def test_other_layers_keep_their_own_forward(compiled: list[Any]):
    gemma = tiny(lambda **shape: Gemma2Config(**shape, query_pre_attn_scalar=16), torch.float32)
    assert not any(map(fused_training._fusable, _common.layers_of(gemma)))
    learnt(gemma, forest())
    bent = tiny(LlamaConfig, torch.float32)
    for layer in _common.layers_of(bent):
        layer.mlp.act_fn = nn.Sigmoid()  # type: ignore[union-attr]
        layer.mlp.act_fn.__class__ = type("SiLU", (nn.Sigmoid,), {})  # type: ignore[union-attr]
    assert not any(map(fused_training._fusable, _common.layers_of(bent)))
    assert not compiled


def test_where_nothing_compiles_it_is_said_once_and_all_is_computed(
    compiled: list[Any], monkeypatch: pytest.MonkeyPatch
):
    model, tree, said = tiny(LlamaConfig, torch.float32), forest(), list[str]()
    expected = learnt(model, tree)

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here\nand more lines")

    with monkeypatch.context() as patch:
        patch.setattr(_compiled, "BACKEND", broken)
        patch.setattr(_compiled, "_MADE", {})
        patch.setattr(_compiled, "_TOLD", [])
        patch.setattr(_compiled.progress, "say", said.append)
        found = learnt(model, tree)
        assert all(function.failed for function in _compiled._MADE.values())
    assert len(said) == 1 and "no compiler here" in said[0] and "\n" not in said[0]
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    for name, grad in expected[1].items():
        assert_near(found[1][name], grad, torch.float32, name)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [30, 1])
def test_the_output_layer_equals_the_plain_one(
    dtype: torch.dtype, count: int, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    monkeypatch.setattr(_compiled_logits, "IDS", 40)  # the last part is smaller
    inputs = [torch.randn(count, 16).to(dtype).requires_grad_(), torch.randn(100, 16).to(dtype).requires_grad_()]
    targets, g = torch.randint(100, (count,)), torch.randn(count)
    found = _output_layer.logprobs(inputs[0], inputs[1], targets)
    expected = numerics.token_logprobs(inputs[0], targets, lambda hidden: hidden @ inputs[1].t())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*(torch.autograd.grad(y, inputs, g) for y in (found, expected)), strict=True):
        assert_near(mine, theirs, dtype)


def test_parts_of_the_vocabulary_shrink_with_many_targets():
    assert _compiled_logits.ids_of(1) == _compiled_logits.ids_of(2**15) == _compiled_logits.IDS
    assert _compiled_logits.ids_of(2**15 + 1) == _compiled_logits.IDS // 2
    assert _compiled_logits.ids_of(2**40) == 128


def test_a_target_out_of_the_vocabulary_is_no_number():
    sums = [torch.full((2,), value) for value in (-1e30, 0.0, torch.nan)]
    _compiled_logits._seen_(torch.randn(2, 5), torch.tensor([4, 5]), *sums)
    assert sums[2].isnan().tolist() == [False, True]
