"""The EVOLVE recipe, small enough for a random model; and what every run of it must leave alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

RECIPE: dict[str, Any] = {
    "recipe": "evolve",
    "task": "carry",
    "scorer": "exact",
    "activate": {
        "prompts": 12,
        "strategy": {"name": "parallel", "turns": 4},
        "sampling": {"temperature": 1.0},
        "selection": {"name": "best_vs_worst", "reject_cut": True, "pairs_per_prompt": 2},
    },
    "sft": {"objective": "nll", "train": {"learning_rate": 1e-3, "train_batch_size": 4}},
    "iterations": 2,
    "collect": {
        "prompts": 8,
        "strategy": {"name": "chain", "turns": 3},
        "sampling": {"temperature": 1.0},
        "selection": {"name": "best_vs_worst", "reject_cut": True},
    },
    "prefer": {"objective": "evolve", "train": {"learning_rate": 1e-3, "train_batch_size": 2}},
    "measure": {"prompts": 10, "turns": 3, "parallel": 3},
    "options": {"dtype": "float32", "chunk_prompts": 6},
}


def write(path: Path, model: Path, **changes: Any) -> Path:
    """A recipe file whose run folder lies beside it."""
    data = RECIPE | {"model": str(model), "output_dir": str(path.with_suffix(""))} | changes
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def lasting(run: Path) -> dict[str, Any]:
    """What every run of one config leaves alike: file by file, without times and places."""
    return {
        str(path.relative_to(run)): _content(path)
        for path in sorted(run.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.name not in ("config.yaml", "report.html")
    }


def _content(path: Path) -> Any:
    if path.name == "metrics.jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    return _timeless(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def _timeless(data: Any) -> Any:
    if isinstance(data, list):
        return [_timeless(item) for item in data]
    if isinstance(data, dict):
        return {k: _timeless(v) for k, v in data.items() if k not in ("seconds", "cached", "folder", "peak_memory_mb")}
    return data
