"""How kernels are built: for processors with fewer instructions, once, and a way to do without them."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_checks import (
    DTYPES,
    check_attention,
    check_every_number_of_rows,
    check_independence,
    check_matmul,
    check_product,
    needs_kernels,
    needs_product,
)
from torch import Tensor

from upturn import trees
from upturn.models import _tree_attention
from upturn.models._tree_plan import TreePlan
from upturn.models.native import back, build, ops
from upturn.types import Sample

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for what all tests here compile with the same flags."""
    return tmp_path_factory.mktemp("built")


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
def test_attention_without_matrix_tiles(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, built: Path):
    monkeypatch.setenv("UPTURN_CACHE", str(built))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
    assert not ops.has_tiles(torch.bfloat16)
    for width, sizes, limits in [(64, (2, 3), (0.0, 0)), (24, (1, 4), (0.0, 5)), (128, (2, 7), (2.0, 40))]:
        check_attention(width, sizes, limits, torch.bfloat16)
    check_independence(torch.bfloat16)


def stand_in(*names: str) -> tuple[str, ...]:
    """Flags for a processor with AVX-512 and these parts of it, played by a header."""
    defined = (f"-D__AVX512{name}__" for name in ("F", "BW", "VL", *names))
    return ("-O1", "-march=haswell", f"-I{HERE / 'avx512'}", *defined, "-DHELD_IN_REGISTER(x)=", "-Wno-psabi")


PROCESSORS = [
    ("-mno-amx-tile", "-mno-amx-bf16"),
    ("-mno-avx512bf16",),
    ("-march=haswell",),
    stand_in(),
    stand_in("BF16"),
]


@needs_product
@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of one family of processors")
@pytest.mark.parametrize("flags", PROCESSORS)
def test_products_on_vectors(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, built: Path):
    """With instructions for bfloat16 where there are some, and without them."""
    monkeypatch.setenv("UPTURN_CACHE", str(built))
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
        (170, 20, 700),
    ]:
        check_matmul(rows, columns, depth)
    with pytest.raises(ValueError, match="strides"):
        back.product(*torch.ones(2, 4, 4).bfloat16(), out=torch.empty(4, 4).bfloat16().t())
    with pytest.raises(ValueError, match="a product of"):
        back.product(torch.ones(3, 4).bfloat16(), torch.ones(5, 4).bfloat16())


@needs_product
@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of one family of processors")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [*PROCESSORS, ("-march=x86-64",)])
def test_attention_over_trees_on_vectors(
    flags: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, built: Path
):
    monkeypatch.setenv("UPTURN_CACHE", str(built))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
    assert back.has_tree_attend(dtype) == (flags != ("-march=x86-64",))
    if not back.has_tree_attend(dtype):
        return
    question, first, other = ((*range(part),) for part in (45, 9, 70))
    tree = trees.build([Sample(question, first), Sample(question, other), Sample((*question, *other), first)])
    plan, (size, heads, width) = TreePlan(tree, flex=False), (len(tree.ids_T), 6, 64)
    x = _tree_attention.Heads(torch.randn(size, heads + 4, width).to(dtype), kv_heads=2)
    g, units, found = torch.randn(size, heads, width).to(dtype), plan.units(None), list[Tensor]()
    for by_kernel in (True, False):
        monkeypatch.setattr(_tree_attention, "_has_kernel", lambda heads, by_kernel=by_kernel: by_kernel)
        found.append(_tree_attention.attend(x, units, 0.1))
        found.append(_tree_attention.attend_back(x, g, units, plan.copies(2), 0.1).all)
    near = 0.03 if dtype == torch.bfloat16 else 1e-5
    for one, other_one in zip(found[:2], found[2:], strict=True):
        assert (one - other_one).abs().max() <= near * other_one.abs().max()


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
