"""Seconds of one forward pass of the engine by its number of tokens: what a proposed token costs.

Measures   plan, model, output layer and choice of the tokens, for numbers of slots and of new tokens a slot, with
           a context in every slot. The grid is walked `repeats` times; the fastest time of each cell counts.
Fit        seconds = unit * (fixed + row * slots + pad * padded + tokens), least squares of relative errors. The
           first three are what `Cost` in engines/_propose.py holds for the device.
Clock      wall, or CPU seconds of the process: with one thread these hold on a machine that has other work too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _child
import _rows
import numpy as np
import torch

from upturn.engines import sampling
from upturn.engines._passes import Passes
from upturn.engines._slots import Slots, Span
from upturn.models import fused, load

CLOCKS = {"wall": _child.wall, "cpu": time.process_time}
GRID = [
    *((1, 1, n) for n in (1, 2, 4, 8, 16, 32, 64, 128)),
    *((8, 8, n) for n in (1, 2, 4, 8)),
    *((8, guessing, 9) for guessing in (1, 4)),
    *((64, 64, n) for n in (1, 2, 3)),
    *((64, guessing, 4) for guessing in (4, 16)),
]
"""(slots, of these guessing, new tokens of those); the others bring one token and are padded."""


def seconds(model: Any, cache: Slots, counts: Sequence[int], start: int, clock: Callable[[], float]) -> float:
    """One forward pass with so many new tokens in each slot behind `start` others, and a choice at each of them."""
    passes = Passes(model, cache, sampling.Config(temperature=0.7))
    ids, uniforms = [0] * sum(counts), np.full(sum(counts), 0.5)
    began = clock()
    passes.start(ids, [Span(slot, start, count, count) for slot, count in enumerate(counts)], uniforms)()
    return clock() - began


def fit(cells: Sequence[dict[str, float]]) -> dict[str, float]:
    """The constants of a forward's cost in tokens, and the largest relative error of the fit."""
    terms = np.array([[1, cell["slots"], cell["padded"], cell["tokens"]] for cell in cells])
    wanted = np.array([cell["seconds"] for cell in cells])
    (fixed, row, pad, unit), *_ = np.linalg.lstsq(terms / wanted[:, None], np.ones(len(cells)), rcond=None)
    worst = np.abs(terms @ [fixed, row, pad, unit] / wanted - 1).max()
    found = {"fixed": fixed / unit, "row": row / unit, "pad": pad / unit, "seconds_per_token": unit}
    return {name: float(f"{value:.4g}") for name, value in (found | {"worst_relative_error": worst}).items()}


def main() -> None:
    """Measure, fit, print, write."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    model: Any = load.load(args.model, args.dtype, device=args.device).model
    caches = {slots: Slots(model.config, slots, next(model.parameters())) for slots, _, _ in GRID}
    steps = [(slots, [tokens] * guessing + [1] * (slots - guessing)) for slots, guessing, tokens in GRID]
    best = [float("inf")] * len(steps)
    with torch.inference_mode(), fused.fused(model):
        for cache in caches.values():
            cache.reserve(args.length)
        for _ in range(args.repeats):
            for place, (slots, counts) in enumerate(steps):
                took = seconds(model, caches[slots], counts, args.length - 128, CLOCKS[args.clock])
                best[place] = min(best[place], took)
    cells = []
    for took, (slots, counts) in zip(best, steps, strict=True):
        padded = slots * max(counts) - sum(counts)
        cells.append({"slots": slots, "tokens": sum(counts), "padded": padded, "seconds": round(took, 6)})
        print("{slots:3} slots, {tokens:3} tokens, {padded:3} padded: {seconds:.4f} s".format(**cells[-1]))
    found = fit(cells)
    print(found)
    _rows.write("verify_cost", (), {"cells": cells, "fit": found}, args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds of a forward pass by its number of tokens.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    _child.add_device(parser)
    parser.add_argument("--length", type=int, default=256, help="tokens of a slot, the last 128 of them new at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_rows.RESULTS / "verify_cost.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
