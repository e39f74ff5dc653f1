"""Tree = rows: the same log-probs and the same gradients, for any folding."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config

from upturn import trees
from upturn.models import _tree_plan, policy
from upturn.types import Sample

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, sliding_window=6, query_pre_attn_scalar=8),
}


def tiny(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).to(dtype).eval()
    policy.use_plans(model)
    return model


def forest(rng: random.Random, depth: int) -> list[Sample]:
    """Random samples that share prefixes to any depth, with neighbours, empty and one-token targets."""
    samples = []
    for _ in range(2):
        rows: list[tuple[int, ...]] = [tuple(rng.choices(range(3, 50), k=rng.randint(1, 6)))]
        for _ in range(depth):
            rows += [
                row + tuple(rng.choices(range(3, 50), k=rng.randint(1, 5)))
                for row in rng.sample(rows, k=min(3, len(rows)))
                for _ in range(2)
            ]
        for row in rng.sample(rows, k=min(6, len(rows))):
            cut = rng.randint(1, len(row))
            samples.append(Sample(row[:cut], row[cut:]))
    return samples


def gradients(model: torch.nn.Module, batches: list[list[Sample]], weights: list[float], share: bool):
    model.zero_grad()
    sums, offset = [], 0
    for batch in batches:
        tree = trees.build(batch, share=share)
        logprobs = policy.tree_logprobs(model, tree)
        scale = torch.tensor(weights[offset : offset + len(batch)], dtype=logprobs.dtype)[tree.owner_N]
        (logprobs * scale).sum().backward()
        sums.append(trees_sum(logprobs.detach(), tree))
        offset += len(batch)
    return torch.cat(sums), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trees_sum(logprobs: torch.Tensor, tree: trees.TokenTree) -> torch.Tensor:
    return logprobs.new_zeros(tree.num_samples).index_add(0, tree.owner_N, logprobs)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("unit", [1, 8, 1000])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_tree_equals_separate_rows(family: str, depth: int, unit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_tree_plan, "UNIT_TOKENS", unit)
    rng = random.Random(depth)
    model, samples = tiny(family), forest(rng, depth)
    weights = [rng.uniform(-1, 1) for _ in samples]
    tree_sums, tree_grads = gradients(model, [samples], weights, share=True)
    row_sums, row_grads = gradients(model, [[s] for s in samples], weights, share=False)
    torch.testing.assert_close(tree_sums, row_sums, rtol=1e-5, atol=1e-4)
    for name, grad in row_grads.items():
        assert (tree_grads[name] - grad).norm() <= 1e-5 * grad.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("family", CONFIGS)
def test_own_attention_equals_the_models_own(family: str):
    ids = list(range(5, 25))
    model = tiny(family)
    tree = trees.build([Sample(tuple(ids[:4]), tuple(ids[4:]))])
    ours = policy.tree_logprobs(model, tree).detach()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    theirs = logits[3:-1].log_softmax(-1).gather(-1, torch.tensor(ids[4:])[:, None]).squeeze(-1)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_path_equals_dense_path():
    model, samples = tiny("llama"), forest(random.Random(1), 3)
    tree = trees.build(samples)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        dense = policy.tree_logprobs(model, tree, flex=False)
        flex = policy.tree_logprobs(model, tree, flex=True)
    torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-5)


def test_the_pair_tree_has_the_token_count_of_the_formula():
    # x=2, w=3, l=3, z=1 without chance overlaps: tree x + 3w + 3l + 2z, rows 6x + 5w + 5l + 4z
    x, w, low, z = (1, 2), (10, 11, 12), (20, 21, 22), (30,)
    rows = [Sample(x, w), Sample(x, low)]
    rows += [Sample(x + low + z, w), Sample(x + low + z, low), Sample(x + w + z, w), Sample(x + w + z, low)]
    tree = trees.build(rows)
    assert len(tree.ids_T) == 2 + 3 * 3 + 3 * 3 + 2 * 1
    assert tree.num_row_tokens == 6 * 2 + 5 * 3 + 5 * 3 + 4 * 1


def test_a_long_tree_becomes_several_with_the_same_logprobs():
    model, begin = tiny("llama"), (1, 2)
    rows = [Sample(begin, (3,))]
    rows += [Sample((*begin, 10 + place), (30 + turn, 5, 6)) for place in range(6) for turn in range(2)]
    whole, cut = trees.build(rows), trees.build(rows, root_tokens=16)
    assert [span.length for span in whole.spans if span.parent < 0] == [2]
    sizes = [span.stop - span.start for span in cut.spans if span.parent < 0]
    assert sizes == [2 + 1 + 2 * 7, 2 + 2 * 7, 2 + 2 * 7]
    torch.testing.assert_close(policy.tree_logprobs(model, cut), policy.tree_logprobs(model, whole))
    assert torch.equal(cut.targets_N, whole.targets_N)
    assert torch.equal(cut.owner_N, whole.owner_N)


@pytest.mark.parametrize("options", [{}, {"share": False}, {"root_tokens": 24}])
def test_each_target_is_predicted_by_the_tokens_before_it_in_its_row(options: dict[str, Any]):
    for seed in range(20):
        samples = forest(random.Random(seed), depth=1 + seed % 4)
        tree = trees.build(samples, **options)
        places_T = torch.arange(len(tree.ids_T))
        expected = [(owner, s.context + s.target[:n]) for owner, s in enumerate(samples) for n in range(len(s.target))]
        found = []
        for owner, place in zip(tree.owner_N.tolist(), tree.predictors_N, strict=True):
            seen_T = (places_T <= place) & (place < tree.ends_T)
            found.append((owner, tuple(tree.ids_T[seen_T].tolist())))
            assert torch.equal(tree.positions_T[seen_T], torch.arange(int(seen_T.sum())))
        assert found == expected
        assert tree.targets_N.tolist() == [token for sample in samples for token in sample.target]


def test_what_fills_a_layout_changes_nothing():
    model, tree = tiny("gemma2"), trees.build([Sample((1, 2), (3, 4, 5)), Sample((1, 2, 3), (7,))])
    filled = trees.filled(tree, 150)
    assert len(filled.ids_T) == len(filled.positions_T) == len(filled.ends_T) == 150
    assert sum(span.length for span in filled.spans) == 150
    assert trees.filled(tree, len(tree.ids_T)) is tree
    torch.testing.assert_close(policy.tree_logprobs(model, filled), policy.tree_logprobs(model, tree))


def test_a_tree_with_a_long_root_stays_whole():
    rows = [Sample(tuple(range(10, 20)), (30 + place, 5)) for place in range(9)]
    assert len(trees.build(rows, root_tokens=40).ids_T) == len(trees.build(rows).ids_T)


def test_a_changed_neighbour_changes_nothing():
    model = tiny("llama")
    mine = Sample((5, 6, 7), (8, 9))
    for other in (Sample((5, 6), (40, 41, 42)), Sample((30, 31), (32,))):
        tree = trees.build([mine, other])
        torch.testing.assert_close(
            trees_sum(policy.tree_logprobs(model, tree), tree)[0],
            trees_sum(policy.tree_logprobs(model, trees.build([mine])), trees.build([mine]))[0],
        )


def test_an_empty_context_is_refused():
    with pytest.raises(ValueError, match="sample 1 has an empty context"):
        trees.build([Sample((1,), (2,)), Sample((), (2,))])


def test_divergence_equals_that_of_plain_forward_passes():
    model, other = tiny("llama"), tiny("llama")
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    for plain in (model, other):
        plain.set_attn_implementation("eager")  # type: ignore[operator]
    samples = forest(random.Random(3), depth=2)
    expected = []
    for sample in samples:
        ids = torch.tensor([[*sample.context, *sample.target]])
        with torch.no_grad():
            logp, logq = (m(ids).logits[0, len(sample.context) - 1 : -1].log_softmax(-1) for m in (model, other))
        expected.append((logp.exp() * (logp - logq)).sum(-1))
    found = policy.tree_kl(model, other, trees.build(samples))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-6)
    assert policy.tree_kl(model, model, trees.build(samples)).abs().max() == 0
