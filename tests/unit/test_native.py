"""The kernels in C against torch: the same numbers, whatever the shape, and a way to do without them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from upturn.engines import sampling
from upturn.models.native import build, ops

DTYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 0.01}
"""Largest difference, relative to the largest number: sums run in another order, then are rounded once."""
needs_kernels = pytest.mark.skipif(not ops.usable(torch.zeros(1)), reason="no C compiler, or not Linux")


@pytest.fixture(autouse=True)
def numbers() -> None:
    torch.manual_seed(0)


def assert_near(ours: Tensor, exact: Tensor) -> None:
    assert ours.shape == exact.shape
    assert (ours.float() - exact.float()).abs().max() <= CLOSE[ours.dtype] * exact.float().abs().max()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 32), (1, 1), (3, 24), (5, 96), (70, 576)])
def test_norm_of_a_sum(rows: int, width: int, dtype: torch.dtype):
    x, more, weight = (torch.randn(size).to(dtype) for size in ((rows, width), (rows, width), (width,)))
    for added in (None, more):
        total, out = ops.norm(x, weight, 1e-5, added)
        assert torch.equal(total, x if added is None else x + added)
        wide = total.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        if rows:
            assert_near(out, weight * scaled.to(dtype))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 40, 1536])
def test_gating(width: int, dtype: torch.dtype):
    gate_up = (5 * torch.randn(9, 2 * width)).to(dtype)
    gate_up[0, 0], gate_up[1, 0] = 200, -200  # far beyond where the exponential ends
    out = ops.silu_mul(gate_up)
    assert out.isfinite().all()
    assert_near(out, torch.nn.functional.silu(gate_up[:, :width]) * gate_up[:, width:])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4, 24, 64])
@pytest.mark.parametrize("normed", [False, True])
def test_rotary_embedding(width: int, normed: bool, dtype: torch.dtype):
    joined = torch.randn(7, 5, width).to(dtype)
    x = joined[:, 1:4]  # heads among others, as in a joined product
    before, rest = x.clone(), joined[:, 4].clone()
    angle = (torch.rand(7, width // 2) * 6).repeat(1, 2)
    cos, sin, weight = angle.cos().to(dtype), angle.sin().to(dtype), torch.randn(width).to(dtype)
    ops.rope_(x, cos, sin, weight if normed else None, 1e-6)
    if normed:
        wide = before.float()
        before = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    low, high = before.chunk(2, -1)
    assert_near(x, before * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None])
    assert torch.equal(joined[:, 4], rest)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 32, 64, 96, 128])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 3), (1, 4), (2, 7)])
@pytest.mark.parametrize("window", [0, 5])
def test_attention_over_slots(width: int, heads: int, groups: int, window: int, dtype: torch.dtype):
    slots, length = 4, 40
    keys, values = torch.randn(2, slots, heads, length, width).to(dtype)
    slot, place = torch.tensor([2, 0, 2, 3, 0]), torch.tensor([0, 16, 39, 31, 3])
    q = torch.randn(5, heads * groups, width).to(dtype)
    k, v = torch.randn(2, 5, heads, width).to(dtype)
    ops.keep(k, v, slot, place, keys, values)
    assert torch.equal(keys[slot, :, place], k)
    assert torch.equal(values[slot, :, place], v)
    out = torch.full_like(q, 7)
    which = torch.tensor([4, 0, 1, 2])
    ops.attend(q, (which, slot, place), (keys, values), (0.3, window), out)
    assert (out[3] == 7).all()  # not asked
    for token in which.tolist():
        end = int(place[token]) + 1
        seen = slice(max(0, end - window) if window else 0, end)
        k_, v_ = (part[slot[token], :, seen].float().repeat_interleave(groups, 0) for part in (keys, values))
        weights = (0.3 * (k_ @ q[token].float()[:, :, None])).softmax(1)
        assert_near(out[token], (weights * v_).sum(1).to(dtype))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 256, 1000, 49152])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_same_tokens_are_chosen(size: int, temperature: float, dtype: torch.dtype, without: None):
    logits, uniform = (4 * torch.randn(40, size)).to(dtype), torch.rand(40)
    uniform[0], uniform[1] = 0, 1 - 2**-24
    chosen, logprobs = sampling.choose(logits, uniform, temperature, 1.0)  # by torch: the fixture hides the kernels
    ours, theirs = ops.sample(logits, uniform, temperature)
    assert (ours == chosen).float().mean() >= 0.95  # a mark may lie within the rounding of a sum
    same = ours == chosen
    torch.testing.assert_close(theirs[same], logprobs[same], rtol=1e-5, atol=2e-5)
    assert (ours >= 0).all() and (ours < size).all()


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "usable", lambda like: False)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing built yet, and nothing kept of what a test builds."""
    build.kernels.cache_clear()
    yield
    build.kernels.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UPTURN_NATIVE", "0")
    assert build.kernels(torch.float32) is None


@pytest.mark.usefixtures("fresh")
def test_nothing_is_built_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.kernels(torch.float32) is None


@needs_kernels
@pytest.mark.usefixtures("fresh")
def test_a_compiler_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("UPTURN_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "--no-such-flag"))
    assert build.kernels(torch.float32) is None
    assert not list(tmp_path.rglob("*.so"))


@needs_kernels
@pytest.mark.usefixtures("fresh")
def test_kernels_are_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("UPTURN_CACHE", str(tmp_path))
    assert build.kernels(torch.float32) is not None
    assert len(list(tmp_path.rglob("*"))) == 2  # the folder and the library
    build.kernels.cache_clear()
    monkeypatch.setattr(build, "_call", _refuse)
    assert build.kernels(torch.float32) is not None
    assert build.kernels(torch.float64) is None


def _refuse(*command: str) -> None:
    raise subprocess.SubprocessError(command)
