"""Training on a CUDA device: the values and gradients of a CPU, one code for policy and reference, compiled once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_compiled_training import wood
from test_fused_training import COMMON, assert_near, error, forest, learnt, plain, tiny
from test_training import fresh, job

from upturn import numerics, trees
from upturn.models import _common, _compiled, _flex, _graphed, _memory, _output_layer, fused_training, policy
from upturn.training import plan, train
from upturn.training.optimizer import MasterAdamW
from upturn.types import Sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # compilers warn of much that is not ours
]
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
"""Sizes that tensor cores take; two key heads of four."""


def here(family: str, dtype: torch.dtype, **more: Any) -> Any:
    return tiny(COMMON[family], dtype, **WIDE | more).cuda()


def nothing_failed() -> bool:
    return bool(_compiled._MADE) and not any(function.failed for function in _compiled._MADE.values())


@pytest.mark.parametrize("window", [None, 40])
def test_attention_has_the_values_and_gradients_of_a_cpu(window: int | None):
    from upturn.models._attention import How
    from upturn.models._tree_plan import TreePlan

    torch.manual_seed(0)
    for tree in (wood(1), forest(), wood(0)):
        size, how = len(tree.ids_T), How(0.2, window, None)
        heads = [torch.randn(1, count, size, 64) for count in (4, 2, 2)]
        g = torch.randn(1, size, 4, 64)
        found = []
        for device, flex in (("cpu", False), ("cuda", True)):
            inputs = [x.to(device).requires_grad_() for x in heads]
            out = TreePlan(tree.to(device), flex=flex).attend(0, inputs[0], inputs[1], inputs[2], how)
            found.append([out.detach(), *torch.autograd.grad(out, inputs, g.to(device))])
        for one, two in zip(*found, strict=True):
            assert_near(two.cpu(), one, torch.float32)
    assert nothing_failed()


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_tree_has_the_gradients_of_its_rows(family: str):
    model, rows = here(family, torch.float32), []
    for root in (tuple(range(3, 90)), tuple(range(9, 70))):
        rows += [Sample(root, (5, last, 7)) for last in (20, 30)] + [Sample((*root, 8), (50, 60, 70, 71))]
    (tree_logps, tree_grads), (row_logps, row_grads) = (
        learnt_by_sample(model, trees.build(rows, share=share).to("cuda")) for share in (True, False)
    )
    assert nothing_failed()
    torch.testing.assert_close(tree_logps, row_logps, rtol=1e-5, atol=1e-4)
    for name, grad in row_grads.items():
        assert (tree_grads[name] - grad).norm() <= 1e-5 * grad.norm().clamp(min=1e-3), name


def learnt_by_sample(model: Any, tree: trees.TokenTree) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    sums = numerics.sum_by_sample(policy.tree_logprobs(model, tree), tree.owner_N, tree.num_samples)
    (sums * torch.linspace(-1, 1, len(sums), device="cuda")).sum().backward()
    return sums.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_compiled_layers_learn_as_plain_ones_do_on_a_cpu():
    tree = forest(200, 90)
    model = here("qwen2", torch.float32)
    assert all(map(fused_training._fusable, _common.layers_of(model)))
    logprobs, grads = on_cuda(model, tree)
    expected, plain_grads = learnt(model.cpu(), tree)
    assert nothing_failed()
    torch.testing.assert_close(logprobs.cpu(), expected, rtol=1e-4, atol=1e-4)
    for name, grad in plain_grads.items():
        assert (grads[name].cpu() - grad).abs().max() <= 1e-4 * grad.abs().max(), name


def on_cuda(model: Any, tree: trees.TokenTree) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logprobs = policy.tree_logprobs(model, tree.to("cuda"))
    (logprobs * torch.linspace(-1, 1, len(logprobs), device="cuda")).sum().backward()
    return logprobs.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_compiled_layers_err_in_bfloat16_no_more_than_plain_ones(family: str, monkeypatch: pytest.MonkeyPatch):
    model, tree = here(family, torch.bfloat16), forest(200, 90)
    found = on_cuda(model, tree)[1]
    plain(monkeypatch)
    theirs = on_cuda(model, tree)[1]
    exact = on_cuda(model.float(), tree)[1]
    assert error(found, exact) <= 1.5 * error(theirs, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_policy_and_reference_have_the_same_bits(dtype: torch.dtype):
    model = here("qwen3", dtype)
    trees_here = [tree.to("cuda") for tree in (wood(0), forest(), wood(2), forest(108, 5))]  # the last one: 128 tokens
    with torch.no_grad():
        still = [policy.tree_logprobs(model, tree) for tree in trees_here]
    for tree, expected in zip(reversed(trees_here), reversed(still), strict=True):
        found = policy.tree_logprobs(model, tree)
        found.sum().backward()
        assert torch.equal(found.detach(), expected)
    assert nothing_failed()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_captured_layers_have_the_logprobs_of_those_launched_one_by_one_and_their_gradients(dtype: torch.dtype):
    model, trees_ = here("qwen2", dtype), [wood(seed).to("cuda") for seed in range(3)]
    with policy.captured_layers():
        graphs = _graphed._OPEN[-1]
        graphs.works = False
        with torch.no_grad():
            references = [policy.tree_logprobs(model, tree) for tree in trees_]
        wanted = [on_cuda(model, tree) for tree in trees_]
        graphs.works = True
        for _ in range(_graphed.SEEN):
            for tree in trees_:
                on_cuda(model, tree)
        found = [on_cuda(model, tree) for tree in trees_]
        assert graphs.works
        assert {size for _, size, _ in graphs.made} == {len(_graphed.padded(tree, model).ids_T) for tree in trees_}
        with torch.no_grad():
            again = [policy.tree_logprobs(model, tree) for tree in trees_]
    for reference, late, (logprobs, grads), (there, expected) in zip(references, again, found, wanted, strict=True):
        assert torch.equal(reference, logprobs)
        assert torch.equal(reference, late)
        assert torch.equal(reference, there)
        assert error(grads, expected) < 1e-2


def test_a_training_of_several_micro_batches_is_captured_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The loss of a micro-batch is still alive when the next one is captured."""
    made = list[_graphed.Graphs]()

    class Recorded(_graphed.Graphs):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(_graphed, "Graphs", Recorded)
    loaded, entries = fresh(tiny_model, "bfloat16"), list[dict[str, float]]()
    loaded.model.cuda()
    train.run(loaded.model, job(loaded, tmp_path, num_train_epochs=6.0, max_tree_tokens=64), entries.append)
    assert made[-1].works
    assert made[-1].number > 0
    assert not made[-1].made
    assert set(_memory._OF_GRAPHS) <= {made[-1].pool}, "those of earlier trainings are gone"
    assert entries[-1]["loss"] < entries[0]["loss"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_output_layer_equals_the_plain_one(dtype: torch.dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(n, 64, device="cuda").to(dtype).requires_grad_() for n in (700, 40_000)]
    targets, g = torch.randint(40_000, (700,), device="cuda"), torch.randn(700, device="cuda")
    found = _output_layer.logprobs(inputs[0], inputs[1], targets)
    expected = numerics.token_logprobs(inputs[0], targets, lambda hidden: hidden @ inputs[1].t())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3 if dtype == torch.float32 else 0.1)
    for mine, theirs in zip(*(torch.autograd.grad(y, inputs, g) for y in (found, expected)), strict=True):
        assert_near(mine, theirs, dtype)
    assert nothing_failed()


def test_another_number_of_tokens_compiles_nothing():
    from torch._dynamo.utils import counters

    model = here("qwen2", torch.bfloat16, num_attention_heads=6, num_key_value_heads=3)
    on_cuda(model, wood(0))
    assert len(wood(0).ids_T) % _flex.BLOCK  # multiples of it are a kind of their own
    before = counters["stats"]["unique_graphs"]
    for seed in range(1, 6):
        on_cuda(model, wood(seed))
        with torch.no_grad():
            policy.tree_logprobs(model, wood(seed).to("cuda"))
    assert counters["stats"]["unique_graphs"] == before > 0


def test_updates_wait_for_no_device_and_are_those_of_a_cpu():
    models = [tiny(COMMON["llama"], torch.bfloat16).to(device) for device in ("cuda", "cpu")]
    optimizers = [MasterAdamW(model, plan.Config(weight_decay=0.1)) for model in models]
    torch.manual_seed(0)
    for _ in range(3):
        grads = [torch.randn(weight.shape).bfloat16() for weight in models[0].parameters()]
        norms = []
        for optimizer in optimizers:
            device = optimizer.weights[0].device
            optimizer.grads = {place: grad.to(device) for place, grad in enumerate(grads)}
            torch.cuda.set_sync_debug_mode("error" if device.type == "cuda" else "default")
            try:
                norms.append(optimizer.step(3.0, 1e-2))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-4)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.cpu().float(), two.float(), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_begins_at_its_own_reference(tiny_model: Path, tmp_path: Path, dtype: str):
    loaded, entries = fresh(tiny_model, dtype), []
    loaded.model.cuda()
    train.run(loaded.model, job(loaded, tmp_path, num_train_epochs=6.0, max_tree_tokens=None), entries.append)
    assert entries[0]["improve/rewards/margins"] == 0
    assert entries[-1]["loss"] < entries[0]["loss"]
