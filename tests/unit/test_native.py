"""The kernels in C against torch: the same numbers, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import (
    DTYPES,
    LENGTH,
    RUNS,
    assert_near,
    attended,
    check_attention,
    check_independence,
    check_product,
    held,
    needs_kernels,
    needs_product,
)

from upturn.engines import sampling
from upturn.models.native import ops


@pytest.fixture(autouse=True)
def numbers() -> None:
    torch.manual_seed(0)


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
@pytest.mark.parametrize(("cap", "window"), [(0.0, 0), (0.0, 5), (2.0, 40)])
def test_attention_over_slots(width: int, heads: int, groups: int, cap: float, window: int, dtype: torch.dtype):
    check_attention(width, (heads, groups), (cap, window), dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_token_does_not_depend_on_the_others(dtype: torch.dtype):
    check_independence(dtype)


@needs_kernels
def test_places_behind_a_text_do_not_count():
    q = torch.randn(25, 6, 64).bfloat16()
    (keys, values), cache = held(2, 64, torch.bfloat16)
    before = attended(q, RUNS[:1], cache, (0.3, 0.0, 0))
    rest = torch.arange(1, LENGTH)
    ops.keep(99 * keys[2, 1:], 99 * values[2, 1:], torch.full_like(rest, 2), rest, cache[0], cache[1])
    assert torch.equal(attended(q, RUNS[:1], cache, (0.3, 0.0, 0)), before)


@needs_product
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40, 500, 1500])
@pytest.mark.parametrize(("out", "width"), [(32, 32), (100, 64), (96, 1536), (40, 4864)])
@pytest.mark.parametrize("biased", [False, True])
def test_product_with_a_packed_weight(rows: int, out: int, width: int, biased: bool, dtype: torch.dtype):
    check_product(rows, out, width, biased=biased, dtype=dtype)


@needs_product
def test_rows_are_shared_out_without_a_rest():
    """Parts are rounded up to whole panels: with this depth one part less takes all of these rows."""
    x, weight = torch.randn(3850, 1536).bfloat16(), torch.randn(32, 1536).bfloat16()
    assert_near(ops.product(x, ops.packed(weight), 32), x.float() @ weight.float().T)


@needs_product
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 17, 700])
def test_gated_product(rows: int, dtype: torch.dtype):
    x, weight = torch.randn(rows, 96).to(dtype), torch.randn(2, 5, 16, 96).to(dtype)
    x[0] *= 100  # gates far beyond where the exponential ends
    gate, up = ((x.float() @ part.flatten(0, 1).float().T).to(dtype) for part in weight)
    panels = ops.packed(weight.transpose(0, 1).flatten(0, 2).contiguous())
    found = ops.product(x, panels, 160, gated=True)
    assert_near(found, torch.nn.functional.silu(gate) * up)
    assert torch.equal(ops.product(x[-1:], panels, 160, gated=True), found[-1:])


@needs_product
def test_only_what_fits_is_multiplied():
    assert not ops.fits(torch.zeros(32, 40, dtype=torch.bfloat16))
    assert not ops.fits(torch.zeros(32, 32, dtype=torch.float16))
    panels = ops.packed(torch.zeros(32, 64, dtype=torch.bfloat16))
    for x in (torch.zeros(3, 64), torch.zeros(3, 32, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="a product of"):
            ops.product(x, panels, 32)


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
