"""Whole runs before and after: the same config on an earlier commit and on this checkout, stage by stage.

Measures   `upturn run` in fresh processes with empty stores, in turn (A B, B A, ...). Seconds are those that the run
           itself notes of its stages, added up by kind; tokens stand beside them, since each version samples for
           itself. Medians over the repeats.
Before     a commit of this repository, in a work tree of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _rows
from _facts import HERE

ROOT = HERE.parent
UNOPTIMISED = "73563f7"
"""The last commit before work on speed began: EVOLVE from end to end."""
KINDS = ("generate", "score", "select", "train")
Seconds = dict[str, float]
"""By kind of stage, and `total`."""


@dataclass(frozen=True, slots=True)
class Case:
    """A run, by the config that each version knows it by."""

    before: str
    now: str
    settings: tuple[str, ...] = ()
    note: str = "as shipped"


CASES = {
    "demo": Case("demo", "demo"),
    "keywords": Case(
        "keywords-smollm2",
        str(ROOT / "docs/results/keywords_plain.yaml"),
        ("activate.prompts=100", "collect.prompts=80", "measure.prompts=60", "iterations=1"),
        "the config without critiques, which both know, on a fifth of its prompts, one iteration",
    ),
}


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    rows: list[_rows.Row] = []
    detail: dict[str, Any] = {}
    with _work_tree(args.before) as before:
        for name in args.cases:
            detail[name] = runs = compare(CASES[name], before, args)
            rows += rows_of(name, runs, args.before)
    _rows.write("stages", rows, detail, args)


def compare(case: Case, before: Path, args: argparse.Namespace) -> dict[str, list[Seconds]]:
    """Both versions in turn."""
    small = ("activate.prompts=64", "collect.prompts=32", "measure.prompts=20", "iterations=1") if args.quick else ()
    versions = {"before": (before, case.before), "now": (ROOT, case.now)}
    runs: dict[str, list[Seconds]] = {name: [] for name in versions}
    for repeat in range(args.repeats):
        for name in versions if repeat % 2 else reversed(versions):
            runs[name].append(run(*versions[name], (*case.settings, *small), args.threads))
            print(f"  {case.now}, {name}: {runs[name][-1]}", flush=True)
    return runs


def run(checkout: Path, config: str, settings: tuple[str, ...], threads: int) -> Seconds:
    """One run from nothing; raises CalledProcessError when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "upturn.cli.main", "run", config, f"output_dir={folder}/run", *settings]
        own = {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": str(threads)}
        subprocess.run([*command, "--quiet"], check=True, env=os.environ | own, stdout=subprocess.DEVNULL, cwd=folder)
        return by_kind(json.loads((Path(folder) / "run" / "summary.json").read_text())["stages"])


def by_kind(stages: list[dict[str, Any]]) -> Seconds:
    """Seconds by the first word of a stage, their total, and generated tokens. `drift` came later, and is left out."""
    found: Counter[str] = Counter()
    for stage in stages:
        kind = stage["name"].partition(" ")[0]
        if kind in KINDS:
            found[kind] += stage["seconds"]
            found["total"] += stage["seconds"]
            found["tokens"] += stage["tokens"] if kind == "generate" else 0
    return {kind: round(value, 3) for kind, value in found.items()}


def rows_of(name: str, runs: dict[str, list[Seconds]], commit: str) -> Iterator[_rows.Row]:
    """One row per kind of stage; the ratio is the share of the time that is left."""
    for kind in (*KINDS, "total"):
        now, before = (statistics.median(one.get(kind, 0.0) for one in runs[which]) for which in ("now", "before"))
        if before:
            said = {"version": f"commit {commit}", "options": CASES[name].note}
            yield _rows.against(f"{name}, {kind}, after against before", "s", now, before, **said)


@contextlib.contextmanager
def _work_tree(commit: str) -> Iterator[Path]:
    git = ("git", "-C", str(ROOT), "worktree")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "before"
        subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs before and after, stage by stage.")
    parser.add_argument("--before", default=UNOPTIMISED, help="commit to compare with")
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few prompts: a check, not a measurement")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
