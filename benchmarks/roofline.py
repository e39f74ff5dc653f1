"""The machine's ceilings, measured, and how near a training step and generation come to them.

Ceilings   matrix products at the model's own shapes in bf16 and fp32, and the bandwidth of a large copy, in this run.
Work       operations and bytes by formula (_roofline.py): model operations, nothing for recomputation or padding.
The gap    operators of the torch profiler in groups, as shares of the time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import _child
import _roofline
import _rows
import _training
import torch
from _child import Answer, Child

from upturn.models import load

ROWS = (1, 16, 64, 512, 2048)
"""Rows of the left matrix: decode steps of few and many drafts, and training."""
COPY_MIB = 512
DTYPES = ("bfloat16", "float32")
GOALS = {"training step": ">= 0.5", "generation": ">= 0.5"}


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    s = _roofline.shape(load.load(args.model, "bfloat16", device="cpu").model.config)
    ceilings = {name: products(s, getattr(torch, name), args.repeats, args.clock) for name in DTYPES}
    best = {name: max(max(row.values()) for row in found.values()) for name, found in ceilings.items()}
    fastest = max(best, key=best.__getitem__)
    bandwidth = copy_rate(args.repeats, args.clock)
    rows = [_rows.row(f"matrix ceiling, {name}", "GFLOP/s", rate / 1e9) for name, rate in best.items()]
    rows.append(_rows.row("memory bandwidth, copy", "GB/s", bandwidth / 1e9))
    detail: dict[str, Any] = {"products": ceilings, "bandwidth": bandwidth}
    for name, measure in {"training step": training, "generation": generation}.items():
        work, seconds, shares = measure(args, s)
        rate, floor = work.flops / seconds, work.seconds(best[fastest], bandwidth)
        said = {"version": "", "options": f"{fastest} matrix ceiling of the same run", "goal": GOALS[name]}
        rows.append(_rows.against(f"{name}, model FLOP rate", "GFLOP/s", rate / 1e9, best[fastest] / 1e9, **said))
        said = {"version": "", "options": "roofline of the same run: the longer of arithmetic and memory"}
        rows.append(_rows.against(f"{name}, time", "s", seconds, floor, **said))
        detail[name] = {"flops": work.flops, "bytes": work.bytes, "intensity": work.intensity, "gap": shares}
    rows.append(_rows.missing("training step, MFU", "share", "gpu", goal=">= 0.45"))
    _rows.write("roofline", rows, detail, args)


def products(s: _roofline.Shape, dtype: torch.dtype, repeats: int, clock: str) -> dict[str, dict[str, float]]:
    """Operations per second of `x @ w.T` for each linear layer of the model, by rows of x."""
    shapes = sorted({*s.linears, (s.width, s.vocab)})
    found: dict[str, dict[str, float]] = {}
    for inputs, outputs in shapes:
        weight = torch.randn(outputs, inputs).to(dtype)
        found[f"{inputs}x{outputs}"] = rates = {}
        for count in ROWS:
            x = torch.randn(count, inputs).to(dtype)
            flops = 2 * count * inputs * outputs
            rates[str(count)] = flops / fastest(lambda x=x, w=weight: x @ w.T, flops, repeats, clock)
    return found


def copy_rate(repeats: int, clock: str) -> float:
    """Bytes per second read and written by a copy far larger than the caches."""
    source = torch.ones(COPY_MIB * 2**20 // 4)
    target = torch.empty_like(source)
    return 2 * COPY_MIB * 2**20 / fastest(lambda: target.copy_(source), 1e9, repeats, clock)


def fastest(work: Callable[[], object], flops: float, repeats: int, clock: str) -> float:
    """Seconds of one call, the best of some rounds that are long enough to be timed."""
    calls = max(1, int(2e9 / flops))
    work()
    took = []
    for _ in range(repeats):
        watch = _child.Stopwatch()
        for _ in range(calls):
            work()
        took.append(watch.read()[clock] / calls)
    return min(took)


def training(args: argparse.Namespace, s: _roofline.Shape) -> tuple[_roofline.Work, float, dict[str, float]]:
    """Work and seconds of one optimizer step on the profile `keywords`."""
    options = ["--model", args.model, "--pairs", str(args.pairs), "--threads", str(args.threads)]
    with Child("_training.py", options) as arm:
        arm.ask()
        runs: list[Answer] = [arm.ask() for _ in range(args.repeats)]
        shares = arm.ask(profile=True)["shares"]
    work = _roofline.train(s, runs[0]["computed_tokens"], runs[0]["targets"], runs[0]["attention_pairs"])
    return work, _rows.median(runs, args.clock), shares


def generation(args: argparse.Namespace, s: _roofline.Shape) -> tuple[_roofline.Work, float, dict[str, float]]:
    """Mean work and seconds of one forward pass of the engine over whole chains."""
    options = ["--model", args.model, "--slots", str(args.slots), "--threads", str(args.threads)]
    question = {"prompts": args.prompts, "turns": 4, "temperature": 1.0, "max_new_tokens": 48, "seed": 0}
    with Child("_engine.py", options) as arm:
        arm.ask(**question | {"prompts": min(8, args.prompts)})
        run = arm.ask(**question)
        few = {"prompts": args.slots, "turns": 1, "max_new_tokens": 8}  # the profiler keeps every operator in memory
        shares = arm.ask(**question | few, profile=True)["shares"]
    passes = run["forwards"]
    new = run["tokens"] + run["context_tokens_computed"]
    work = _roofline.decode(s, new / passes, run["tokens"] / passes, run["attention_pairs"] / passes)
    return work, run[args.clock] / passes, shares


def _arguments() -> argparse.Namespace:
    what = "Ceilings of the machine, and the shares of them that we reach."
    parser = _child.parser(what, quick="few pairs and prompts")
    parser.add_argument("--pairs", type=int, default=_training.PROFILES["keywords"].pairs)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.prompts, args.slots, args.repeats = 2, 16, 16, 2
    return args


if __name__ == "__main__":
    main()
