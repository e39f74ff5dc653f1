"""The kernels in C against torch: the same numbers, whatever the shape, and a way to do without them."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from upturn import trees
from upturn.engines import sampling
from upturn.models import _tree_attention
from upturn.models._tree_plan import TreePlan
from upturn.models.native import back, build, ops
from upturn.types import Sample

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


SLOTS, LENGTH = 4, 768
RUNS = [[2, 0, 0, 1], [0, 1, 680, 20], [3, 21, 767, 1], [1, 22, 31, 3]]
"""New tokens of four slots: slot, first in the step, its place, and how many."""


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


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 32, 64, 96, 128])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 3), (1, 4), (2, 7)])
@pytest.mark.parametrize(("cap", "window"), [(0.0, 0), (0.0, 5), (2.0, 40)])
def test_attention_over_slots(width: int, heads: int, groups: int, cap: float, window: int, dtype: torch.dtype):
    check_attention(width, (heads, groups), (cap, window), dtype)


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


ATTENDED = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Largest difference; in bfloat16 the weights are rounded too."""


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_token_does_not_depend_on_the_others(dtype: torch.dtype):
    check_independence(dtype)


def check_independence(dtype: torch.dtype) -> None:
    _, cache = held(2, 64, dtype)
    q = torch.randn(25, 6, 64).to(dtype)
    for how in ((0.3, 0.0, 0), (0.3, 0.0, 40), (0.3, 0.0, 300)):
        alone = [[slot, flat + i, place + i, 1] for slot, flat, place, count in RUNS for i in range(count)]
        assert torch.equal(attended(q, RUNS, cache, how), attended(q, alone, cache, how))


@needs_kernels
def test_places_behind_a_text_do_not_count():
    q = torch.randn(25, 6, 64).bfloat16()
    (keys, values), cache = held(2, 64, torch.bfloat16)
    before = attended(q, RUNS[:1], cache, (0.3, 0.0, 0))
    rest = torch.arange(1, LENGTH)
    ops.keep(99 * keys[2, 1:], 99 * values[2, 1:], torch.full_like(rest, 2), rest, cache[0], cache[1])
    assert torch.equal(attended(q, RUNS[:1], cache, (0.3, 0.0, 0)), before)


needs_product = pytest.mark.skipif(
    not ops.has_product(torch.bfloat16), reason="no AVX2, or no C compiler, or not Linux"
)


@needs_product
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40, 500, 1500])
@pytest.mark.parametrize(("out", "width"), [(32, 32), (100, 64), (96, 1536), (40, 4864)])
@pytest.mark.parametrize("biased", [False, True])
def test_product_with_a_packed_weight(rows: int, out: int, width: int, biased: bool, dtype: torch.dtype):
    check_product(rows, out, width, biased=biased, dtype=dtype)


def check_product(rows: int, out: int, width: int, *, biased: bool, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((rows, width), (out, width), (out,)))
    panels, exact = ops.packed(weight), x.double() @ weight.double().T + (bias.double() if biased else 0)
    found = ops.product(x, panels, out, bias if biased else None)
    assert_near(found, exact)
    assert torch.equal(ops.product(x[-1:], panels, out, bias if biased else None), found[-1:])


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


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing built yet, and nothing kept of what a test builds."""
    kept = (
        build.kernels,
        ops._library,
        ops.has_tiles,
        ops.has_product,
        back._library,
        back.has_matmul,
        back.has_tree_attend,
    )
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@needs_kernels
@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of one family of processors")
@pytest.mark.parametrize("flags", [("-mno-amx-tile", "-mno-amx-bf16"), ("-march=haswell",), ("-march=x86-64",)])
def test_attention_without_matrix_tiles(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("UPTURN_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
    assert not ops.has_tiles(torch.bfloat16)
    for width, sizes, limits in [(64, (2, 3), (0.0, 0)), (24, (1, 4), (0.0, 5)), (128, (2, 7), (2.0, 40))]:
        check_attention(width, sizes, limits, torch.bfloat16)
    check_independence(torch.bfloat16)


@needs_product
@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of one family of processors")
@pytest.mark.parametrize("flags", [("-mno-amx-tile", "-mno-amx-bf16"), ("-mno-avx512bf16",), ("-march=haswell",)])
def test_products_on_vectors(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """With instructions for bfloat16 where there are some, and without them."""
    monkeypatch.setenv("UPTURN_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
    monkeypatch.setattr(ops, "torch_has_bf16", lambda: False)
    assert ops.has_product(torch.bfloat16) and not ops.has_tiles(torch.bfloat16)
    for rows, out, width in [(1, 32, 32), (4, 100, 64), (70, 40, 1536)]:
        for dtype in DTYPES:
            check_product(rows, out, width, biased=rows > 1, dtype=dtype)
    for dtype in DTYPES:
        check_every_number_of_rows(dtype)
    assert back.has_matmul(torch.bfloat16) and not back.has_matmul(torch.float32)
    for rows, columns, depth in [
        (0, 3, 5),
        (5, 3, 0),
        (1, 1, 1),
        (7, 33, 31),
        (13, 100, 300),
        (10, 33, 301),
        (600, 48, 200),
    ]:
        check_matmul(rows, columns, depth)
    with pytest.raises(ValueError, match="strides"):
        back.product(*torch.ones(2, 4, 4).bfloat16(), out=torch.empty(4, 4).bfloat16().t())
    with pytest.raises(ValueError, match="a product of"):
        back.product(torch.ones(3, 4).bfloat16(), torch.ones(5, 4).bfloat16())


@needs_product
@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(platform.machine() != "x86_64" or not torch.cpu._is_avx512_bf16_supported(), reason="no AVX-512")
@pytest.mark.parametrize(
    ("flags", "has_kernel"), [(("-mno-amx-tile", "-mno-amx-bf16"), True), (("-mno-avx512bf16",), False)]
)
def test_attention_over_trees_on_vectors(
    flags: tuple[str, ...], has_kernel: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("UPTURN_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
    assert back.has_tree_attend(torch.bfloat16) == has_kernel
    if not has_kernel:
        return
    question, first, other = ((*range(part),) for part in (45, 9, 70))
    tree = trees.build([Sample(question, first), Sample(question, other), Sample((*question, *other), first)])
    plan, (size, heads, width) = TreePlan(tree, flex=False), (len(tree.ids_T), 6, 64)
    x = _tree_attention.Heads(torch.randn(size, heads + 4, width).bfloat16(), kv_heads=2)
    g, units, found = torch.randn(size, heads, width).bfloat16(), plan.units(None), list[Tensor]()
    for by_kernel in (True, False):
        monkeypatch.setattr(_tree_attention, "_has_kernel", lambda heads, by_kernel=by_kernel: by_kernel)
        found.append(_tree_attention.attend(x, units, 0.1))
        found.append(_tree_attention.attend_back(x, g, units, plan.copies(2), 0.1).all)
    for one, other_one in zip(found[:2], found[2:], strict=True):
        assert (one - other_one).abs().max() <= 0.03 * other_one.abs().max()


def check_every_number_of_rows(dtype: torch.dtype) -> None:
    """Each has a piece of code of its own."""
    x, weight = torch.randn(13, 320).to(dtype), torch.randn(40, 320).to(dtype)
    panels = ops.packed(weight)
    found = ops.product(x, panels, 40)
    assert_near(found, x.double() @ weight.double().T)
    assert all(torch.equal(ops.product(x[:rows], panels, 40), found[:rows]) for rows in range(14))


@needs_product
@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(platform.machine() != "x86_64" or not torch.cpu._is_avx512_bf16_supported(), reason="no AVX-512")
@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="tiles are lent here")
def test_tiles_that_are_not_lent_are_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("UPTURN_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-mamx-tile", "-mamx-bf16"))
    assert ops.has_product(torch.bfloat16) and not ops.has_tiles(torch.bfloat16)
    check_every_number_of_rows(torch.bfloat16)
    check_independence(torch.bfloat16)


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
