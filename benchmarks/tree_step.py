"""One EVOLVE preference step: our token tree against TRL's DPOTrainer, as it comes and tuned, and our separate rows.

Measures   the optimizer step over the same pairs, weights and threads. Each arm is a process of its own, and they work
           in turn (A B, B A, ...): on a CPU ours and one peer are up at a time, on a GPU all start at once and one
           works. Medians after a warm-up, on a GPU two of them.
Tokens     logical: those of the six rows of every pair, without padding; the same number for every arm.
Memory     high-water mark of an arm over all its steps, after its model is loaded: its resident set, or on a GPU what
           its tensors take there.
Tuned      each candidate of `TUNED` makes `--tries` steps; the fastest is then measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import _child
import _facts
import _rows
import _training
from _child import Answer, Arms, Child

GOALS = {
    "cpu": {"default": ">= 10", "tuned": ">= 6", "rows": ">= 1.6"},
    "cuda": {"default": ">= 4", "tuned": ">= 2", "rows": ">= 1.5"},
}
NAMES = {"default": "TRL DPOTrainer, defaults", "tuned": "TRL DPOTrainer, tuned", "rows": "our separate rows"}
OPTIONS = {
    "default": "same rows and weights; its own loss (sigmoid DPO on each row); fp32 weights, bf16 autocast, "
    "gradient checkpointing, reference model in every step, batches of 8",
    "tuned": "same rows and weights; its own loss (sigmoid DPO on each row); weights and optimizer state in "
    "{dtype}, no checkpointing, precomputed reference, rows sorted by length",
    "rows": "the same code with share=False",
}
ALL = ("--batch", "100000")
TUNED: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "batches of 2": ("--batch", "2"),
        "batches of 4": ("--batch", "4"),
        "batches of 8": ("--batch", "8"),
        "all rows in one batch": ALL,
        "batches of 8, torch.compile": ("--batch", "8", "--compile"),
    },
    "cuda": {
        "batches of 8": ("--batch", "8"),
        "batches of 32": ("--batch", "32"),
        "batches of 96": ("--batch", "96"),
        "all rows in one batch": ALL,
        "batches of 32, layers of Liger": ("--batch", "32", "--liger"),
        "batches of 96, layers of Liger": ("--batch", "96", "--liger"),
        "batches of 32, torch.compile": ("--batch", "32", "--compile"),
    },
}
"""By device; AdamW is torch's fused one. padding_free is not among them: TRL switches it off for DPO and says so."""
COMPILING = 90.0
"""Seconds that TRL may take on a GPU for a step with torch.compile, the first one with its start included."""
WARMUPS = {"cpu": 1, "cuda": 2}


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    rows: list[_rows.Row] = []
    detail: dict[str, dict[str, Any]] = {}
    for profile in args.profiles:
        with Arms(_starts(args, profile), args.device) as arms:
            arms.warm(["tree", "rows", *(name for name in args.tuned if "--compile" in TUNED[args.device][name])])
            detail[profile] = measured = {}
            for name in args.peers:
                measured[name] = found = compare(args, profile, name, arms)
                rows += list(rows_of(profile, name, found, args))
                _rows.write("tree_step", rows, detail, args)  # a peer that is measured stays so
        if args.device == "cpu":
            for name, goal in GOALS["cuda"].items():
                title = f"training step, {profile}, against {NAMES[name]}"
                rows.append(_rows.missing(title, "logical tokens/s", "gpu", goal=goal))
            _rows.write("tree_step", rows, detail, args)


def compare(args: argparse.Namespace, profile: str, peer: str, arms: Arms) -> dict[str, Any]:
    """Ours and one peer in turn."""
    print(f"{profile}: token tree against {NAMES[peer]}", flush=True)
    try:
        found: dict[str, Any] = _tuned(args, arms) if peer == "tuned" else {"options": OPTIONS[peer]}
        chosen = found.pop("arm", peer)
        with arms.of("tree") as ours, arms.of(chosen) as theirs:
            answers = _child.alternate({"tree": ours, peer: theirs}, args.repeats, {}, WARMUPS[args.device])
        arms.drop(chosen)
    except _child.ChildError as error:
        return {"error": str(error)}
    if failed := [run for runs in answers.values() for run in runs if "out_of_memory" in run]:
        return {"error": f"{len(failed)} steps ran out of memory"}
    logical = {run["logical_tokens"] for runs in answers.values() for run in runs}
    assert len(logical) == 1, f"the arms saw different rows: {logical}"
    return found | {"tree": answers["tree"], "peer": answers[peer]}


def _tuned(args: argparse.Namespace, arms: Arms) -> dict[str, Any]:
    """The fastest candidate, with the time of every one; those that fail say why, and those that lose are closed."""
    tries: dict[str, float | str] = {}
    best = ""
    for name in args.tuned:
        try:
            with arms.of(name) as arm:
                arm.ask()
                tries[name] = took = min(arm.ask()[args.clock] for _ in range(args.tries))
        except _child.ChildError as error:
            tries[name], took = str(error)[:200], float("inf")
        print(f"  tuned, {name}: {tries[name]}", flush=True)
        if isinstance(tries[name], float) and (not best or took < float(tries[best])):
            best, name = name, best
        arms.drop(name)
    if not best:
        raise _child.ChildError(str(next(iter(tries.values()))))
    options = f"{OPTIONS['tuned'].format(dtype=args.peer_dtype)}, {best}"
    return {"arm": best, "options": options, "tries": tries}


def _starts(args: argparse.Namespace, profile: str) -> dict[str, Callable[[], Child]]:
    """How each arm starts that this run asks."""
    gpu = args.device == "cuda"
    pairs = args.pairs or (_training.PROFILES[profile].gpu_pairs if gpu else 0)
    common = ["--model", args.model, "--profile", profile, "--pairs", str(pairs), "--threads", str(args.threads)]
    common += ["--device", args.device]
    budget = ("--max-tree-tokens", str(args.max_tree_tokens))
    limit = _child.PATIENCE if gpu else None
    ours = {"tree": budget, "rows": ("--arm", "rows", *budget)}
    starts = {
        name: partial(Child, "_training.py", [*options, *common], limit=limit)
        for name, options in ours.items()
        if name in ("tree", *args.peers)
    }
    if "default" in args.peers:
        starts["default"] = partial(Child, "_trl.py", common, limit=limit)
    for name in args.tuned if "tuned" in args.peers else ():
        how = ["--tuned", "--dtype", args.peer_dtype, *TUNED[args.device][name]]
        own = COMPILING if gpu and "--compile" in how else limit
        starts[name] = partial(Child, "_trl.py", [*how, *common], limit=own)
    return starts


def rows_of(profile: str, peer: str, found: dict[str, Any], args: argparse.Namespace) -> Iterator[_rows.Row]:
    """Speed and memory of one comparison."""
    title, memory = f"training step, {profile}", f"peak memory, {profile}"
    goal, goal_memory = GOALS[args.device][peer], "<= 0.5" if peer == "tuned" else ""
    device, clock = _child.DEVICES[args.device], args.clock
    if "error" in found:
        why = f"{_rows.NOT_MEASURED}: {found['error']}"
        yield _rows.missing(f"{title}, against {NAMES[peer]}", "logical tokens/s", device, goal=goal, why=why)
        return
    ours, theirs = found["tree"], found["peer"]
    said: _rows.Said = {"version": "" if peer == "rows" else _version("trl"), "options": found["options"]}
    said["device"] = device
    rates = (_rate(ours, clock), _rate(theirs, clock))
    yield _rows.against(f"{title}, against {NAMES[peer]}", "logical tokens/s", *rates, **{**said, "goal": goal})
    peaks = (_peak(ours), _peak(theirs))
    yield _rows.against(f"{memory}, against {NAMES[peer]}", "MiB", *peaks, **{**said, "goal": goal_memory})


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
    parser.add_argument("--tuned", nargs="+", metavar="CANDIDATE", help="of the tuned peer; all of the device's")
    parser.add_argument("--pairs", type=int, default=0, help="pairs per step; 0: as the profile says for the device")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each arm")
    parser.add_argument("--tries", type=int, default=2, help="steps of each tuned candidate after its first")
    parser.add_argument("--max-tree-tokens", type=int, default=None)
    args = parser.parse_args()
    args.peer_dtype = args.peer_dtype or _facts.fastest_dtype(args.device)
    args.max_tree_tokens = args.max_tree_tokens or _training.BUDGETS[args.device]
    known = [name for name, how in TUNED[args.device].items() if "--liger" not in how or find_spec("liger_kernel")]
    args.tuned = args.tuned or known
    if unknown := [name for name in args.tuned if name not in known]:
        parser.error(f"no such candidates: {unknown}; there are: {known}")
    if args.quick:
        args.pairs, args.repeats, args.tries = 2, 1, 1
    return args


if __name__ == "__main__":
    main()
