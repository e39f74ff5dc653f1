"""Where the benchmarks stand, and a way to one of them."""

from __future__ import annotations

from importlib import import_module as module
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

__all__ = ["BENCHMARKS", "module"]
