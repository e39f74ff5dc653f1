"""One EVOLVE preference step: our token tree against TRL's DPOTrainer, as it comes and tuned, and our separate rows.

Measures   the optimizer step over the same pairs, weights and threads. Each arm is a process of its own; ours and one
           peer are up at a time and work in turn (A B, B A, ...). Medians after a warm-up.
Tokens     logical: those of the six rows of every pair, without padding; the same number for every arm.
Memory     high-water mark of an arm's resident set over all its steps, after its model is loaded.
Tuned      each candidate of `TUNED` makes `--tries` steps; the fastest is then measured.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import _child
import _facts
import _rows
import _training
from _child import Answer, Child

GOALS = {"default": ">= 10", "tuned": ">= 6", "rows": ">= 1.6"}
GPU_GOALS = {"default": ">= 4", "tuned": ">= 2", "rows": ">= 1.5"}
NAMES = {"default": "TRL DPOTrainer, defaults", "tuned": "TRL DPOTrainer, tuned", "rows": "our separate rows"}
OPTIONS = {
    "default": "same rows and weights; its own loss (sigmoid DPO on each row); fp32 weights, bf16 autocast, "
    "gradient checkpointing, reference model in every step, batches of 8",
    "tuned": "same rows and weights; its own loss (sigmoid DPO on each row); weights and optimizer state in "
    "{dtype}, no checkpointing, precomputed reference, rows sorted by length",
    "rows": "the same code with share=False",
}
TUNED = {
    "batches of 2": ("--batch", "2"),
    "batches of 4": ("--batch", "4"),
    "batches of 8": ("--batch", "8"),
    "all rows in one batch": ("--batch", "100000"),
    "batches of 8, torch.compile": ("--batch", "8", "--compile"),
}
"""padding_free is not among them: TRL switches it off for DPO, with a warning."""


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    rows: list[_rows.Row] = []
    detail: dict[str, Any] = {}
    for profile in args.profiles:
        measured = {name: compare(args, profile, name) for name in args.peers}
        detail[profile] = measured
        for name, found in measured.items():
            rows += list(rows_of(profile, name, found, args.clock))
        for name, goal in GPU_GOALS.items():
            title = f"training step, {profile}, against {NAMES[name]}"
            rows.append(_rows.missing(title, "logical tokens/s", "gpu", goal=goal))
    _rows.write("tree_step", rows, detail, args)


def compare(args: argparse.Namespace, profile: str, peer: str) -> dict[str, Any]:
    """Ours and one peer in turn."""
    print(f"{profile}: token tree against {NAMES[peer]}", flush=True)
    try:
        found: dict[str, Any] = _tuned(args, profile) if peer == "tuned" else {"options": OPTIONS[peer]}
        arguments = found.pop("arguments", ())
        with _arm(args, profile, "tree") as ours, _arm(args, profile, peer, *arguments) as theirs:
            answers = _child.alternate({"tree": ours, peer: theirs}, args.repeats, {})
    except _child.ChildError as error:
        return {"error": str(error)}
    logical = {run["logical_tokens"] for runs in answers.values() for run in runs}
    assert len(logical) == 1, f"the arms saw different rows: {logical}"
    return found | {"tree": answers["tree"], "peer": answers[peer]}


def _tuned(args: argparse.Namespace, profile: str) -> dict[str, Any]:
    """The fastest candidate, with the time of every one; those that fail say why."""
    tries: dict[str, Any] = {}
    for name, arguments in TUNED.items():
        try:
            with _arm(args, profile, "tuned", *arguments) as arm:
                arm.ask()
                tries[name] = min(arm.ask()[args.clock] for _ in range(args.tries))
            print(f"  tuned, {name}: {tries[name]:.2f} s", flush=True)
        except _child.ChildError as error:
            tries[name] = str(error)[:200]
            print(f"  tuned, {name}: {tries[name]}", flush=True)
    seconds = {name: took for name, took in tries.items() if isinstance(took, float)}
    if not seconds:
        raise _child.ChildError(next(iter(tries.values())))
    best = min(seconds, key=seconds.__getitem__)
    return {
        "arguments": TUNED[best],
        "options": f"{OPTIONS['tuned'].format(dtype=args.peer_dtype)}, {best}",
        "tries": tries,
    }


@contextlib.contextmanager
def _arm(args: argparse.Namespace, profile: str, name: str, *more: str) -> Iterator[Child]:
    common = ["--model", args.model, "--profile", profile, "--pairs", str(args.pairs), "--threads", str(args.threads)]
    own = {
        "tree": ("_training.py", "--max-tree-tokens", str(args.max_tree_tokens)),
        "rows": ("_training.py", "--arm", "rows", "--max-tree-tokens", str(args.max_tree_tokens)),
        "default": ("_trl.py",),
        "tuned": ("_trl.py", "--tuned", "--dtype", args.peer_dtype),
    }
    script, *options = own[name]
    with Child(script, [*options, *more, *common]) as child:
        yield child


def rows_of(profile: str, peer: str, found: dict[str, Any], clock: str) -> Iterator[_rows.Row]:
    """Speed and memory of one comparison."""
    title, memory = f"training step, {profile}", f"peak memory, {profile}"
    goal, goal_memory = GOALS[peer], "<= 0.5" if peer == "tuned" else ""
    if "error" in found:
        why = f"{_rows.NOT_MEASURED}: {found['error']}"
        yield _rows.missing(f"{title}, against {NAMES[peer]}", "logical tokens/s", "cpu", goal=goal, why=why)
        return
    ours, theirs = found["tree"], found["peer"]
    said = {"version": "" if peer == "rows" else _version("trl"), "options": found["options"]}
    rates = (_rate(ours, clock), _rate(theirs, clock))
    yield _rows.against(f"{title}, against {NAMES[peer]}", "logical tokens/s", *rates, **said, goal=goal)
    peaks = (_peak(ours), _peak(theirs))
    yield _rows.against(f"{memory}, against {NAMES[peer]}", "MiB", *peaks, **said, goal=goal_memory)


def _rate(runs: list[Answer], clock: str) -> float:
    return runs[0]["logical_tokens"] / _rows.median(runs, clock)


def _peak(runs: list[Answer]) -> float:
    return max(run["peak_mib"] for run in runs)


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _arguments() -> argparse.Namespace:
    parser = _child.parser("One EVOLVE preference step: token tree against peers.", quick="two pairs, one repeat")
    parser.add_argument("--profiles", nargs="+", choices=[*_training.PROFILES], default=[*_training.PROFILES])
    _facts.add_peer_dtype(parser)
    parser.add_argument("--peers", nargs="+", choices=[*NAMES], default=[*NAMES])
    parser.add_argument("--pairs", type=int, default=0, help="pairs per step; 0: as the profile says")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each arm")
    parser.add_argument("--tries", type=int, default=2, help="steps of each tuned candidate after its first")
    parser.add_argument("--max-tree-tokens", type=int, default=4096)
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.repeats, args.tries = 2, 1, 1
    return args


if __name__ == "__main__":
    main()
