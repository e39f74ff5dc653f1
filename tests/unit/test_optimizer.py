"""AdamW over fp32 masters: the arithmetic of torch, masters in halves without loss, gradients summed in parts."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from upturn import trees
from upturn.models import load, policy
from upturn.models.native import back, ops
from upturn.training import _masters, plan
from upturn.training.optimizer import MasterAdamW
from upturn.types import Sample

CFG = plan.Config(weight_decay=0.1, max_grad_norm=0.5)
needs_kernels = pytest.mark.skipif(
    not ops.usable(torch.zeros(1, dtype=torch.bfloat16)), reason="no kernels on this machine"
)


def net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 80), nn.Linear(80, 3, bias=False)).to(dtype)


def take_steps(
    model: nn.Module, optimizer: MasterAdamW, count: int = 4, first: int = 0, batches: int = 2
) -> list[float]:
    """Steps of some micro-batches and a weight of 3; the second layer is left out of the second step."""
    norms = []
    for step in range(first, first + count):
        for batch in range(batches):
            x = torch.randn(5, 70, generator=torch.Generator().manual_seed(10 * step + batch))
            part = model[:1] if step == 1 else model  # type: ignore[index]
            loss = part(x.to(next(model.parameters()).dtype)).float().square().sum()
            optimizer.backward(loss, is_only=batches == 1)
        norms.append(float(optimizer.step(3.0, 1e-2)))
    return norms


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_updates_are_those_of_torch(native: bool, batches: int, monkeypatch: pytest.MonkeyPatch):
    if not native:
        monkeypatch.setattr(_masters.ops, "usable", lambda like: False)
    ours, theirs = net(torch.float32), net(torch.float32)
    optimizer = MasterAdamW(ours, CFG)
    adam = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    for step, norm in enumerate(take_steps(ours, optimizer, batches=batches)):
        for parameter in theirs.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for batch in range(batches):
            x = torch.randn(5, 70, generator=torch.Generator().manual_seed(10 * step + batch))
            ((theirs[:1] if step == 1 else theirs)(x).square().sum() / 3).backward()  # type: ignore[index,operator]
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)), rel=1e-4)
        adam.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_kernels_and_torch_update_alike_and_read_each_others_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mine, other = net(torch.bfloat16), net(torch.bfloat16)
    ours = MasterAdamW(mine, CFG)
    take_steps(mine, ours)
    ours.save(tmp_path / "state.safetensors")
    monkeypatch.setattr(_masters.ops, "usable", lambda like: False)
    theirs = MasterAdamW(other, CFG)
    theirs.load(tmp_path / "state.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a.value(), b.value()) for a, b in zip(ours.masters, theirs.masters, strict=True))
    take_steps(mine, ours, 2, first=4)
    take_steps(other, theirs, 2, first=4)
    for a, b in zip(ours.masters, theirs.masters, strict=True):
        torch.testing.assert_close(a.value(), b.value(), rtol=2e-3, atol=1e-4)


@needs_kernels
def test_an_update_reads_gradient_and_first_moment_of_either_type():
    found = []
    for dtype, first_dtype in product((torch.bfloat16, torch.float32), repeat=2):
        torch.manual_seed(0)
        weight, grad, first = (torch.randn(9, 600).bfloat16() for _ in range(3))
        low, first, second = torch.zeros_like(weight, dtype=torch.int16), first.to(first_dtype), torch.zeros(9, 600)
        back.adamw(weight, low, (grad.to(dtype), first, second), (0.5, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.999))
        found.append((weight, low, first.bfloat16(), second))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize(("beta1", "dtype"), [(0.9, torch.bfloat16), (0.99, torch.float32)])
def test_a_first_moment_is_as_short_as_rounding_allows(beta1: float, dtype: torch.dtype):
    cfg = CFG.model_copy(update={"adam_beta1": beta1})
    assert {first.dtype for first in MasterAdamW(net(torch.bfloat16), cfg).exp_avg} == {dtype}
    assert {first.dtype for first in MasterAdamW(net(torch.float32), cfg).exp_avg} == {torch.float32}
    assert {second.dtype for second in MasterAdamW(net(torch.bfloat16), cfg).exp_avg_sq} == {torch.float32}


@needs_kernels
def test_a_short_first_moment_takes_the_same_way(monkeypatch: pytest.MonkeyPatch):
    """Masters after fifty steps: rounding costs a hundredth of the way."""
    begun, ways = net(torch.bfloat16), []
    for most in (0.95, 0.0):
        monkeypatch.setattr("upturn.training.optimizer.SHORT_BETA1", most)
        optimizer = MasterAdamW(model := net(torch.bfloat16), CFG)
        take_steps(model, optimizer, 50)
        pairs = zip(optimizer.masters, begun.parameters(), strict=True)
        ways.append(torch.cat([(master.value() - weight.detach().float()).flatten() for master, weight in pairs]))
    short, long = ways
    assert float((short - long).norm() / long.norm()) < 0.03


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 4096, 70_001])
def test_the_norm_of_a_gradient_is_that_of_torch(dtype: torch.dtype, size: int):
    grad = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert back.norm_of(grad) == pytest.approx(float(torch.linalg.vector_norm(grad.double())), rel=1e-6)


@pytest.mark.parametrize("batches", [1, 2])
def test_tied_weights_get_both_their_gradients(tiny_model: Path, batches: int):
    """That of the output layer comes in parts, before that of the embedding."""
    loaded = load.load(str(tiny_model), "float32", device="cpu")
    tree = trees.build([Sample((1, 5, 9), (3, 4)), Sample((1, 5, 9), (6,))])
    weight = loaded.model.get_input_embeddings().weight  # type: ignore[operator]
    assert weight is loaded.model.get_output_embeddings().weight  # type: ignore[operator]
    optimizer = MasterAdamW(loaded.model, CFG)
    (expected,) = torch.autograd.grad(policy.tree_logprobs(loaded.model, tree).sum(), [weight])
    for _ in range(batches):
        optimizer.backward(policy.tree_logprobs(loaded.model, tree).sum(), is_only=batches == 1)
    found = optimizer.grads[next(place for place, own in enumerate(optimizer.weights) if own is weight)]
    torch.testing.assert_close(found, batches * expected)


@needs_kernels
def test_halves_keep_a_value_to_the_bit():
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[values.isfinite() & values.bfloat16().isfinite()]
    halfway = values.view(torch.int32) & 0xFFFF == 0x8000
    master = _masters.master_of(torch.zeros(len(values), dtype=torch.bfloat16))
    assert master.rest is not None and master.rest.element_size() == 2
    master.set(values)
    assert torch.equal(master.value()[~halfway], values[~halfway])
    master.set(torch.tensor(1 + 2**-8).expand(len(values)).contiguous())  # halfway between two bf16 numbers
    assert master.value().sub(1 + 2**-8).abs().max() <= 2**-23
    assert torch.equal(master.weight, master.value().bfloat16())


def test_small_updates_are_not_lost():
    model = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = MasterAdamW(model, plan.Config())
    for _ in range(50):
        optimizer.backward(model(torch.ones(1, 8, dtype=torch.bfloat16)).sum())
        optimizer.step(1.0, 1e-4)  # a fortieth of what bf16 can tell from 1
    torch.testing.assert_close(model.weight.float(), torch.full((8, 8), 1 - 50e-4), rtol=0, atol=2**-8)


@needs_kernels
def test_a_tied_weight_sums_its_parts_in_fp32_where_more_passes_come(tiny_model: Path):
    loaded = load.load(str(tiny_model), "bfloat16", device="cpu")
    tree = trees.build([Sample((1, 5, 9), (3, 4)), Sample((1, 5, 9), (6,))])
    weight = loaded.model.get_input_embeddings().weight  # type: ignore[operator]
    for is_only, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        optimizer = MasterAdamW(loaded.model, CFG)
        optimizer.backward(policy.tree_logprobs(loaded.model, tree).sum(), is_only=is_only)
        found = optimizer.grads[next(place for place, own in enumerate(optimizer.weights) if own is weight)]
        assert found.dtype == dtype
        assert is_only or not torch.equal(found, found.bfloat16().float())  # what bf16 would have lost is there


@needs_kernels
def test_a_weight_may_join_in_the_second_pass():
    model = net(torch.bfloat16)
    first, late = model.children()
    optimizer, x = MasterAdamW(model, CFG), torch.ones(1, 70, dtype=torch.bfloat16)
    optimizer.backward(first(x).sum())
    optimizer.backward(model(x).sum())
    (wanted,) = torch.autograd.grad(model(x).sum(), [*late.parameters()])
    place = next(place for place, own in enumerate(optimizer.weights) if own is late.weight)
    assert torch.equal(optimizer.grads[place], wanted.float())


@needs_kernels
@pytest.mark.parametrize(("is_only", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_first_of_several_gradients_is_in_its_sum_at_once(is_only: bool, dtype: torch.dtype):
    model = net(torch.bfloat16)
    optimizer = MasterAdamW(model, CFG)
    optimizer.backward(model(torch.ones(1, 70, dtype=torch.bfloat16)).sum(), is_only=is_only)
    assert {grad.dtype for grad in optimizer.grads.values()} == {dtype}
    wanted = torch.autograd.grad(model(torch.ones(1, 70, dtype=torch.bfloat16)).sum(), [*model.parameters()])
    assert all(torch.equal(optimizer.grads[place], grad.to(dtype)) for place, grad in enumerate(wanted))
