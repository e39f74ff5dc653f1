"""What a measurement must say about where it was made, and how its file is written."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from upturn.models.native import ops

HERE = Path(__file__).parent
FLAGS = ("amx_bf16", "amx_int8", "amx_tile", "avx2", "avx512_bf16", "avx512f", "bf16", "sve")


def facts() -> dict[str, Any]:
    """Hardware, versions and commit; a copy without its history is told the commit as $GIT_COMMIT."""
    info = _cpuinfo()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cpu_id": " ".join(info.get(key, "?") for key in ("vendor_id", "cpu family", "model", "stepping")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in FLAGS if flag in info.get("flags", info.get("Features", "")).split()],
        **_gpu(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _git("rev-parse", "HEAD") or os.environ.get("GIT_COMMIT", ""),
        "changed_files": len(_git("status", "--porcelain", "--", "src", "benchmarks/*.py").splitlines()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def add_peer_dtype(parser: argparse.ArgumentParser) -> None:
    """The type that peers of torch compute in."""
    what = "unless it is named, the one that torch multiplies fastest on the device"
    parser.add_argument("--peer-dtype", choices=("bfloat16", "float32"), default=None, help=what)


def fastest_dtype(device: str) -> str:
    """The type that torch multiplies fastest."""
    return "bfloat16" if device == "cuda" or ops.torch_has_bf16() else "float32"


def write(path: Path, record: dict[str, Any]) -> None:
    """One JSON file by rename."""
    scratch = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(json.dumps(record, indent=2) + "\n")
    scratch.replace(path)


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _gpu() -> dict[str, str | None]:
    """The GPU with its versions; only its name, None, where there is none."""
    if not torch.cuda.is_available():
        return {"gpu": None}
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda}


def _git(*command: str) -> str:
    return _said("git", "-C", str(HERE), *command)


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
