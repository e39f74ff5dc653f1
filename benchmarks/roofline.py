"""The machine's ceilings, measured, and how near a training step and generation come to them.

Ceilings   matrix products at the model's own shapes in bf16 and fp32, on a GPU also a large square one, and the
           bandwidth of a large copy, in this run.
Work       operations and bytes by formula (_roofline.py): model operations, nothing for recomputation or padding.
The gap    operators of the torch profiler in groups, as shares of the time.
MFU        on a GPU, for `--shapes`: models with random weights, a step over pairs of the profile gsm8k.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import _child
import _roofline
import _rows
import _shapes
import _training
import torch
from _child import Answer, Arms, Child

from upturn.models import load

ROWS = {"cpu": (1, 16, 64, 512, 2048), "cuda": (1, 64, 512, 4096, 16384)}
"""Rows of the left matrix: decode steps of few and many drafts, and training."""
SQUARE = 8192
COPY_MIB = 512
ROUND = 0.02
"""Seconds of one timed round of calls, about."""
DTYPES = ("bfloat16", "float32")
GOALS = {"training step": ">= 0.5", "generation": ">= 0.5"}
WARMUPS = {"cpu": 1, "cuda": 3}
"""What is asked before a training step is measured, and with the measured one of a generation: a GPU's graphs are
captured as sizes come again."""
MFU = "training step, MFU"
BUDGETS = (16384, 8192, 4096)
"""Tokens of a micro-batch for the MFU, the first that fits into memory."""
DATASHEET = {"H100": 989e12, "H200": 989e12}
"""Dense bf16 operations per second that the maker tells, by part of the GPU's name."""
Found = tuple[_roofline.Work, float, dict[str, Any]]
"""Work, its seconds, and what else is known."""


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    with Arms(_starts(args), args.device) as arms:
        arms.warm(["training", *args.shapes], budget=BUDGETS[-1])
        s = _roofline.shape(load.load(args.model, "bfloat16", device="cpu").model.config)
        works = {"training step": training(args, s, arms), "generation": generation(args, s, arms)}
        steps = {shape: utilisation(args, shape, arms) for shape in args.shapes}
    ceilings = {name: products(s, getattr(torch, name), args) for name in DTYPES}
    best = {name: max(max(row.values()) for row in found.values()) for name, found in ceilings.items()}
    detail: dict[str, Any] = {"products": ceilings, "bandwidth": copy_rate(args), "shapes": {}}
    device = _child.DEVICES[args.device]
    rows = [_rows.row(f"matrix ceiling, {name}", "GFLOP/s", r / 1e9, device=device) for name, r in best.items()]
    rows.append(_rows.row("memory bandwidth, copy", "GB/s", detail["bandwidth"] / 1e9, device=device))
    for name, (work, seconds, more) in works.items():
        rows += rows_of(name, work, seconds, (best, detail["bandwidth"]), device)
        detail[name] = {"flops": work.flops, "bytes": work.bytes, "intensity": work.intensity} | more
    for shape, found in steps.items():
        rows.append(mfu(shape, found, best["bfloat16"]))
        detail["shapes"][shape] = found and {"flops": found[0].flops, "seconds": found[1]} | found[2]
    if args.device == "cpu":
        rows.append(_rows.missing(MFU, "share", "gpu", goal=">= 0.45"))
    _rows.write("roofline", rows, detail, args)


def rows_of(
    name: str, work: _roofline.Work, seconds: float, ceilings: tuple[dict[str, float], float], device: str
) -> Iterator[_rows.Row]:
    """The rate beside that of the fastest products, and the time beside the roofline's."""
    best, bandwidth = ceilings
    fastest = max(best, key=best.__getitem__)
    rate, floor = work.flops / seconds, work.seconds(best[fastest], bandwidth)
    goal = GOALS[name] if device == "cpu" else ""  # a small model does not fill a GPU: there the MFU has the goal
    said: _rows.Said = {"version": "", "options": f"{fastest} matrix ceiling of the same run", "device": device}
    said["goal"] = goal
    yield _rows.against(f"{name}, model FLOP rate", "GFLOP/s", rate / 1e9, best[fastest] / 1e9, **said)
    said = {"version": "", "options": "roofline of the same run: the longer of arithmetic and memory", "device": device}
    yield _rows.against(f"{name}, time", "s", seconds, floor, **said)


def mfu(shape: str, found: Found | None, ceiling: float) -> _rows.Row:
    """The share of the ceiling that a step of a model of some shape reaches; the datasheet's in the note."""
    name, goal = f"{MFU}, {shape}", ">= 0.45"
    if found is None:
        return _rows.missing(name, "share", "gpu", goal=goal, why=f"{_rows.NOT_MEASURED}: out of memory")
    work, seconds, more = found
    rate = work.flops / seconds
    told = next((told for part, told in DATASHEET.items() if part in torch.cuda.get_device_name()), None)
    parts = [
        f"{rate / 1e12:.0f} TFLOP/s",
        f"{rate / told:.2f} of the {told / 1e12:.0f} in the datasheet" if told else "",
    ]
    parts += [f"{more['tokens']} tree tokens, micro-batches of {more['budget']}", f"peak {more['peak_mib']:.0f} MiB"]
    return _rows.row(name, "share", rate / ceiling, device="gpu", goal=goal, note=", ".join(filter(None, parts)))


def products(s: _roofline.Shape, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Operations per second of `x @ w.T` for each linear layer of the model, by rows of x."""
    shapes: list[tuple[int, int, tuple[int, ...]]]
    shapes = [(inputs, outputs, ROWS[args.device]) for inputs, outputs in sorted({*s.linears, (s.width, s.vocab)})]
    if args.device == "cuda":
        shapes.append((SQUARE, SQUARE, (SQUARE,)))
    found: dict[str, dict[str, float]] = {}
    for inputs, outputs, counts in shapes:
        weight = torch.randn(outputs, inputs, device=args.device).to(dtype)
        found[f"{inputs}x{outputs}"] = rates = {}
        for count in counts:
            x = torch.randn(count, inputs, device=args.device).to(dtype)
            flops = 2 * count * inputs * outputs
            rates[str(count)] = flops / fastest(lambda x=x, w=weight: x @ w.T, args)
    return found


def copy_rate(args: argparse.Namespace) -> float:
    """Bytes per second read and written by a copy far larger than the caches."""
    source = torch.ones(COPY_MIB * 2**20 // 4, device=args.device)
    target = torch.empty_like(source)
    return 2 * COPY_MIB * 2**20 / fastest(lambda: target.copy_(source), args)


def fastest(work: Callable[[], object], args: argparse.Namespace) -> float:
    """Seconds of one call, the best of some rounds that are long enough to be timed."""
    calls, took = 1, list[float]()
    for round_ in range(-2, args.repeats):  # the first call warms up, the second tells how many make a round
        watch = _child.Stopwatch()
        for _ in range(calls):
            work()
        took.append(watch.read()[args.clock] / calls)
        if round_ == -1:
            calls = max(1, int(ROUND / max(took[-1], 1e-6)))
    return min(took[-args.repeats :])


def training(args: argparse.Namespace, s: _roofline.Shape, arms: Arms) -> Found:
    """Work and seconds of one optimizer step on the profile `keywords`."""
    with arms.of("training") as arm:
        for _ in range(WARMUPS[args.device]):
            arm.ask(budget=_training.BUDGETS[args.device])
        runs: list[Answer] = [arm.ask() for _ in range(args.repeats)]
        shares = _shares(arm)
    arms.drop("training")
    return _work(s, runs[0]), _rows.median(runs, args.clock), {"gap": shares}


def _work(s: _roofline.Shape, run: Answer) -> _roofline.Work:
    return _roofline.train(s, run["computed_tokens"], run["targets"], run["attention_pairs"])


def _shares(arm: Child, **question: Any) -> dict[str, Any]:
    """Where the time goes; why that is not known, where the profiler fails."""
    try:
        return arm.ask(**question, profile=True)["shares"]
    except _child.ChildError as error:
        return {"error": str(error)}


def generation(args: argparse.Namespace, s: _roofline.Shape, arms: Arms) -> Found:
    """Mean work and seconds of one forward pass of the engine over whole chains."""
    question = {"prompts": args.prompts, "turns": 4, "temperature": 1.0, "max_new_tokens": 48, "seed": 0}
    with arms.of("generation") as arm:
        arm.ask(**question | {"prompts": min(8, args.prompts)})
        run = [arm.ask(**question) for _ in range(WARMUPS[args.device])][-1]
        few = {"prompts": args.slots, "turns": 1, "max_new_tokens": 8}  # the profiler keeps every operator in memory
        shares = _shares(arm, **question | few)
    arms.drop("generation")
    passes = run["forwards"]
    new = run["tokens"] + run["context_tokens_computed"]
    work = _roofline.decode(s, new / passes, run["tokens"] / passes, run["attention_pairs"] / passes)
    return work, run[args.clock] / passes, {"gap": shares}


def utilisation(args: argparse.Namespace, shape: str, arms: Arms) -> Found | None:
    """Work and seconds of a step of a model of this shape; None where no micro-batch fits into memory."""
    with arms.of(shape) as arm:
        budget = next((size for size in BUDGETS if "out_of_memory" not in arm.ask(budget=size)), None)
        if budget is None:
            return None
        arm.ask()
        runs = [arm.ask() for _ in range(args.repeats)]
        more = {"budget": budget, "tokens": runs[0]["computed_tokens"], "peak_mib": runs[-1]["peak_mib"]}
        more["gap"] = _shares(arm)
    arms.drop(shape)
    return _work(_roofline.shape(_shapes.config(shape)), runs[0]), _rows.median(runs, args.clock), more


def _starts(args: argparse.Namespace) -> dict[str, Callable[[], Child]]:
    """How each arm starts."""
    common = ["--model", args.model, "--threads", str(args.threads), "--device", args.device]
    start = partial(Child, limit=_child.PATIENCE if args.device == "cuda" else None)
    starts = {
        "training": partial(start, "_training.py", [*common, "--pairs", str(args.pairs)]),
        "generation": partial(start, "_engine.py", [*common, "--slots", str(args.slots)]),
    }
    pairs = _training.PROFILES["gsm8k"].gpu_pairs
    many = ["--profile", "gsm8k", "--pairs", str(pairs)]
    return starts | {n: partial(start, "_training.py", [*common, *many, "--shape", n]) for n in args.shapes}


def _arguments() -> argparse.Namespace:
    what = "Ceilings of the machine, and the shares of them that we reach."
    parser = _child.parser(what, quick="few pairs and prompts")
    parser.add_argument("--pairs", type=int, default=None)
    parser.add_argument("--prompts", type=int, default=None)
    parser.add_argument("--slots", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="*", choices=[*_shapes.SHAPES], help="of the MFU, on a GPU; all of them")
    args = parser.parse_args()
    if args.shapes and args.device == "cpu":
        parser.error("--shapes needs --device cuda")
    on_gpu, profile = args.device == "cuda", _training.PROFILES["keywords"]
    args.pairs = args.pairs or (profile.gpu_pairs if on_gpu else profile.pairs)
    args.prompts, args.slots = args.prompts or (256 if on_gpu else 128), args.slots or (256 if on_gpu else 64)
    args.shapes = ([*_shapes.SHAPES] if on_gpu else []) if args.shapes is None else args.shapes
    if args.quick:
        args.pairs, args.prompts, args.slots, args.repeats = 2, 16, 16, 2
    return args


if __name__ == "__main__":
    main()
