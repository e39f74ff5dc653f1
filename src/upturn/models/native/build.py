"""Compiles the C files beside it for this processor, once, and loads it; None where that cannot be.

Torch brings its own OpenMP library. The kernels are linked against the very file that torch loaded, so both share one
pool of threads: two pools would spin against each other.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from upturn.models.folders import cache_dir
from upturn.tracking import progress

HERE = Path(__file__).parent
SOURCES = ("kernels.c", "attend.c", "product.c", "matmul.c", "layer.c", "train.c", "tiles.c", "tree.c")
HEADERS = ("real.h", "vec.h", "vectors.h", "pairs.h", "tiles.h", "blocks.h", "calls.h")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp")
ARITHMETIC = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only")
"""Not -ffast-math: its linker flags would make the whole process flush denormal numbers to zero."""
LINK = ("-shared", "-Wl,-Bsymbolic")
"""Kernels call each other, whatever else in the process is called alike."""
_KINDS = {"i": ctypes.c_int64, "p": ctypes.c_void_p, "f": ctypes.c_float}
WIDE = "-mprefer-vector-width=512"
TYPES = {torch.float32: (), torch.bfloat16: ("-DBF16",)}


@cache
def kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for numbers of this type. None without a C compiler, glibc's loader, or with UPTURN_NATIVE=0."""
    if dtype not in TYPES or sys.platform != "linux" or os.environ.get("UPTURN_NATIVE") == "0":
        return None
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    try:
        openmp = _openmp()
        if not compiler or not openmp:
            return None
        return ctypes.CDLL(str(_built(compiler, openmp, TYPES[dtype])))
    except (OSError, subprocess.SubprocessError) as error:
        progress.say(f"the kernels could not be compiled, so torch does their work, slower: {_reason(error)}")
        return None


def bound(dtype: torch.dtype, signatures: Mapping[str, str], answering: Collection[str]) -> Any:
    """The library with the arguments of some functions declared, one letter each; the `answering` return an int."""
    found = kernels(dtype)
    for name, kinds in signatures.items() if found else ():
        function = getattr(found, name)
        function.argtypes = [_KINDS[kind] for kind in kinds]
        function.restype = ctypes.c_int if name in answering else None
    return found


def _openmp() -> str | None:
    """The OpenMP library of this process: torch's own where there are several."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    found = [file for file in sorted(files) if Path(file).name.startswith(("libgomp", "libiomp5", "libomp"))]
    home = str(Path(torch.__file__).parent)
    return next((file for file in found if file.startswith(home)), found[0] if found else None)


def _built(compiler: str, openmp: str, defines: tuple[str, ...]) -> Path:
    flags = [*FLAGS, *ARITHMETIC, *defines, *([WIDE] if platform.machine() == "x86_64" else [])]
    text = [(HERE / name).read_text() for name in (*SOURCES, *HEADERS)]
    facts = [*text, compiler, openmp, *flags, *LINK, _processor()]
    target = cache_dir() / "native" / f"{hashlib.sha256('|'.join(facts).encode()).hexdigest()[:16]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            progress.note("compiling kernels for this processor, once"),
            tempfile.TemporaryDirectory(dir=target.parent) as scratch,  # beside the result: one move puts it there
        ):
            made, out = [str(Path(scratch) / f"{name}.o") for name in SOURCES], Path(scratch) / target.name
            for source, part in zip(SOURCES, made, strict=True):
                _call(compiler, *flags, "-c", str(HERE / source), "-o", part)
            _call(compiler, *LINK, *made, openmp, "-lm", "-o", str(out))
            os.replace(out, target)
    return target


def _reason(error: Exception) -> str:
    said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
    return said[0] if said else str(error)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def _processor() -> str:
    """What the machine code depends on: a cache may be shared by machines that differ."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features", "isa"))), platform.processor())
