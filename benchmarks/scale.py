"""How cost grows: training time by tokens, training memory by pairs, generation time by drafts.

Measures   the optimizer step at several numbers of pairs with one budget of tokens per micro-batch, each size in a
           process of its own; chains at several numbers of prompts in one process. Each time is the best of some runs.
Fit        time = a + b * size by least squares on relative errors; R2 of the fit, and the largest relative error.
Curve      docs/scale.svg.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _child
import _facts
import _rows
import numpy as np
from _child import Child

CURVE = _facts.HERE.parent / "docs" / "scale.svg"
LIMIT = ">= 0.98"
FLAT = "<= 1.1"
LASTING = 4
"""Micro-batches of a step that has come to its full size: what they need differs, and the last one need not be full."""


def main() -> None:
    """Measure, print, write, draw."""
    args = _arguments()
    steps = [training(args, count) for count in args.pairs]
    chains = generation(args)
    time_fit = line([(p["logical_tokens"], p[args.clock]) for p in steps])
    drafts_fit = line([(p["drafts"], p[args.clock]) for p in chains])
    full = [p for p in steps if p["micro_batches"] >= LASTING]
    peaks = [p["peak_mib"] for p in full or steps]
    device = _child.DEVICES[args.device]
    rows = [
        _rows.row("training time is linear in tokens", "R2", time_fit["r2"], device=device, goal=LIMIT),
        _rows.row("generation time is linear in drafts", "R2", drafts_fit["r2"], device=device, goal=LIMIT),
        _rows.against(
            f"training memory is flat: {(full or steps)[-1]['pairs']} pairs against {(full or steps)[0]['pairs']}",
            "MiB",
            peaks[-1],
            peaks[0],
            version="",
            options=f"micro-batches of at most {args.max_tree_tokens} tokens",
            goal=FLAT,
            device=device,
        ),
    ]
    detail = {"training": steps, "generation": chains, "training_fit": time_fit, "generation_fit": drafts_fit}
    draw(steps, chains, args.clock, args.curve)
    _rows.write("scale", rows, detail, args)


def training(args: argparse.Namespace, pairs: int) -> dict[str, Any]:
    """One size of the optimizer step."""
    options = ["--model", args.model, "--pairs", str(pairs), "--threads", str(args.threads), "--device", args.device]
    with Child("_training.py", [*options, "--max-tree-tokens", str(args.max_tree_tokens)]) as arm:
        arm.ask()
        runs = [arm.ask() for _ in range(args.repeats)]
    best = min(runs, key=lambda run: run[args.clock])
    print(f"  {pairs} pairs: {best}", flush=True)
    return best | {"pairs": pairs, "peak_mib": max(run["peak_mib"] for run in runs)}


def generation(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Chains at every number of prompts, greedy drafts left out: their lengths depend too much on the prompts."""
    options = ["--model", args.model, "--slots", str(args.slots), "--threads", str(args.threads)]
    options += ["--device", args.device]
    question = {"turns": 4, "temperature": 1.0, "max_new_tokens": 48, "seed": 0}
    points: list[dict[str, Any]] = []
    with Child("_engine.py", options) as arm:
        arm.ask(**question, prompts=args.prompts[0])
        for count in args.prompts:
            runs = [arm.ask(**question, prompts=count) for _ in range(args.repeats)]
            points.append(min(runs, key=lambda run: run[args.clock]) | {"prompts": count})
            print(f"  {count} prompts: {points[-1]}", flush=True)
    return points


def line(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """`y = fixed + unit * x` with the least relative errors; R2 on y, and the largest relative error."""
    x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    terms = np.stack([np.ones_like(x), x], 1)
    (fixed, unit), *_ = np.linalg.lstsq(terms / y[:, None], np.ones_like(y), rcond=None)
    fitted = fixed + unit * x
    spread = ((y - y.mean()) ** 2).sum()
    r2 = 1 - ((y - fitted) ** 2).sum() / spread if spread else 1.0
    found = {"fixed": fixed, "unit": unit, "r2": r2, "worst_relative_error": np.abs(fitted / y - 1).max()}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def draw(steps: list[dict[str, Any]], chains: list[dict[str, Any]], clock: str, path: Path) -> None:
    """Three small panels."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = (
        ("training step", "logical tokens", "s", [(p["logical_tokens"], p[clock]) for p in steps]),
        ("training memory", "pairs", "MiB", [(p["pairs"], p["peak_mib"]) for p in steps]),
        ("chains of four turns", "drafts", "s", [(p["drafts"], p[clock]) for p in chains]),
    )
    with matplotlib.rc_context({"svg.hashsalt": "upturn", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(9, 2.6), layout="constrained")
        for axis, (title, across, up, points) in zip(axes, panels, strict=True):
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1)
            axis.set(title=title, xlabel=across, ylabel=up, xlim=(0, None), ylim=(0, None))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _arguments() -> argparse.Namespace:
    parser = _child.parser("How cost grows with size.", quick="small sizes, one repeat")
    parser.add_argument("--pairs", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--max-tree-tokens", type=int, default=1024)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 128, 192, 256])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--curve", type=Path, default=CURVE, help="where the curve is drawn")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.prompts, args.slots, args.repeats, args.max_tree_tokens = [1, 2, 3], [4, 8, 12], 4, 1, 256
    return args


if __name__ == "__main__":
    main()
