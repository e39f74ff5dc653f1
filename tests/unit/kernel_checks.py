"""Kernels against torch, for whatever they were built with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from upturn.models.native import back, ops

DTYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 0.01}
"""Largest difference, relative to the largest number: sums run in another order, then are rounded once."""
needs_kernels = pytest.mark.skipif(not ops.usable(torch.zeros(1)), reason="no C compiler, or not Linux")
needs_product = pytest.mark.skipif(
    not ops.has_product(torch.bfloat16), reason="no AVX2, or no C compiler, or not Linux"
)
SLOTS, LENGTH = 4, 768
RUNS = [[2, 0, 0, 1], [0, 1, 680, 20], [3, 21, 767, 1], [1, 22, 31, 3]]
"""New tokens of four slots: slot, first in the step, its place, and how many."""
ATTENDED = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Largest difference; in bfloat16 the weights are rounded too."""


def assert_near(ours: Tensor, exact: Tensor) -> None:
    assert ours.shape == exact.shape
    assert (ours.float() - exact.float()).abs().max() <= CLOSE[ours.dtype] * exact.float().abs().max()


def held(heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Keys and values `[2, slots, length, H, D]`, and the cache that holds them all."""
    plain = torch.randn(2, SLOTS, LENGTH, heads, width).to(dtype)
    wide = -(-width // ops.STEP) * ops.STEP
    cache = torch.zeros(SLOTS, heads, LENGTH, wide, dtype=dtype), torch.zeros(SLOTS, heads, LENGTH, wide, dtype=dtype)
    slot, place = torch.arange(SLOTS).repeat_interleave(LENGTH), torch.arange(LENGTH).repeat(SLOTS)
    keys, values = plain.flatten(1, 2)
    ops.keep(keys, values, slot, place, *cache)
    return plain, cache


def attended(q: Tensor, runs: list[list[int]], cache: tuple[Tensor, Tensor], how: tuple[float, float, int]) -> Tensor:
    out = torch.full_like(q, 7)
    ops.attend(q, torch.tensor(runs), cache, how, out)
    return out


def check_attention(width: int, sizes: tuple[int, int], limits: tuple[float, int], dtype: torch.dtype) -> None:
    (heads, groups), (cap, window) = sizes, limits
    (keys, values), cache = held(heads, width, dtype)
    q = torch.randn(26, heads * groups, width).to(dtype)
    out = attended(q, RUNS, cache, (0.3, cap, window))
    assert (out[25] == 7).all()  # not asked
    for slot, flat, first, count in RUNS:
        for token, place in zip(range(flat, flat + count), range(first, first + count), strict=True):
            seen = slice(max(0, place + 1 - window) if window else 0, place + 1)
            k, v = (x[slot, seen].float().transpose(0, 1).repeat_interleave(groups, 0) for x in (keys, values))
            scores = 0.3 * (k @ q[token].float()[:, :, None])
            weights = (cap * (scores / cap).tanh() if cap else scores).softmax(1)
            torch.testing.assert_close(out[token].float(), (weights * v).sum(1), rtol=0, atol=ATTENDED[dtype])


def check_independence(dtype: torch.dtype) -> None:
    _, cache = held(2, 64, dtype)
    q = torch.randn(25, 6, 64).to(dtype)
    for how in ((0.3, 0.0, 0), (0.3, 0.0, 40), (0.3, 0.0, 300)):
        alone = [[slot, flat + i, place + i, 1] for slot, flat, place, count in RUNS for i in range(count)]
        assert torch.equal(attended(q, RUNS, cache, how), attended(q, alone, cache, how))


def check_product(rows: int, out: int, width: int, *, biased: bool, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((rows, width), (out, width), (out,)))
    panels, exact = ops.packed(weight), x.double() @ weight.double().T + (bias.double() if biased else 0)
    found = ops.product(x, panels, out, bias if biased else None)
    assert_near(found, exact)
    assert torch.equal(ops.product(x[-1:], panels, out, bias if biased else None), found[-1:])


def check_every_number_of_rows(dtype: torch.dtype) -> None:
    """Each has a piece of code of its own."""
    x, weight = torch.randn(13, 320).to(dtype), torch.randn(40, 320).to(dtype)
    panels = ops.packed(weight)
    found = ops.product(x, panels, 40)
    assert_near(found, x.double() @ weight.double().T)
    assert all(torch.equal(ops.product(x[:rows], panels, 40), found[:rows]) for rows in range(14))
    many = torch.randn(300, 320).to(dtype)
    found = ops.product(many, panels, 40)
    assert_near(found, many.double() @ weight.double().T)
    assert all(torch.equal(ops.product(many[row : row + 1], panels, 40), found[row : row + 1]) for row in range(300))


def check_matmul(rows: int, columns: int, depth: int) -> None:
    """Factors lie in all ways, also as parts of others, and so does what they give."""
    x, y, bias = (torch.randn(size).bfloat16() for size in ((rows, depth), (depth, columns), (columns,)))
    exact, wide = x.double() @ y.double(), torch.ones(rows, columns + 9).bfloat16()
    for factor in (x, x.t().contiguous().t(), torch.cat((x, x), 1)[:, depth:]):
        assert_close(back.product(factor, y, bias), exact + bias)
        assert_close(back.product(factor, y.t().contiguous().t()), exact)
    assert_close(back.product(x, y, out=wide[:, 3 : columns + 3]), exact)
    assert (wide[:, :3] == 1).all() and (wide[:, columns + 3 :] == 1).all()
    assert_close(back.add_product_(wide[:, 3 : columns + 3], x, y), 2 * exact)
    assert_close(back.weight_gradient(x.t().contiguous(), y), exact)
    assert_close(back.bmm(x[None], y[None])[0], exact)


def assert_close(found: Tensor, exact: Tensor) -> None:
    """To what bfloat16 keeps."""
    torch.testing.assert_close(
        found.double(), exact.double(), rtol=0.01, atol=0.01 * float(exact.abs().amax(()) if exact.numel() else 1)
    )
