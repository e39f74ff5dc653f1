"""Refinement chains of four turns: our engine against transformers, vLLM and llama.cpp, greedy and at temperature 1.

Measures   the same prompts, contexts (rendered by the same chat), weights in bf16, token limit and threads. Each arm
           is a process of its own, and they work in turn: on a CPU ours and one peer are up at a time, on a GPU all
           start at once. Medians after a warm-up.
Ours       all prompts and turns mixed in one batch. A peer answers all prompts of a turn in one call, then the next
           turn; the time is that of its calls alone.
Turns      ours answers turn 1 alone as well; what whole chains take more than that are the later turns.
Batches    `generate` of transformers tries each of `--batches` once; the fastest is measured.
Known      a greedy chain of ours that comes to a context again has its answer at once: such drafts count as any other.
Answers    lengths differ between arms, since each samples for itself: tokens/s stand beside drafts/s.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _child
import _facts
import _rows
import transformers
from _child import Answer, Arms, Child

from upturn.models import chat, folders, load
from upturn.tasks import keywords
from upturn.types import Draft, Prompt, Requests

TITLE = "chains of four turns"
FIRST, LATER = ", turn 1", ", later turns"
GOALS = {
    "generate": {"": ">= 8"},
    "continuous": {"": ">= 3"},
    "vllm": {FIRST: ">= 1", LATER: ">= 1.5"},
    "llama.cpp": {FIRST: ">= 1", LATER: ">= 1.5"},
}
"""By peer and part of a chain; "" is the whole."""
NAMES = {
    "generate": "transformers generate",
    "continuous": "transformers generate_batch (continuous batching)",
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp",
}
VERSION = transformers.__version__
GRAPHS = 2
"""More chains by our engine before a GPU is measured: it captures sizes of a step as they come again."""
TEMPERATURES = (0.0, 1.0)
SIZES = {"cpu": (128, [16, 32, 64, 128]), "cuda": (256, [64, 128, 256])}
"""By device: prompts and slots, and the batches that `generate` tries."""
ON_GPU = ("generate", "continuous")
"""Peers that have an arm there."""
COUNTED = (*_child.CLOCKS, "drafts", "tokens")


@dataclass(frozen=True, slots=True)
class Setting:
    """What all arms have in common."""

    talk: chat.Chat
    prompts: Sequence[Prompt]
    turns: int
    max_new_tokens: int

    def ask_ours(self, arm: Child, temperature: float, seed: int) -> Answer:
        """All chains by the engine; before them, their first turns alone."""
        how = {"temperature": temperature, "seed": seed, "max_new_tokens": self.max_new_tokens}
        first, whole = (arm.ask(prompts=len(self.prompts), turns=turns, **how) for turns in (1, self.turns))
        return whole | {"first": {key: first[key] for key in COUNTED}}

    def ask_peer(self, arm: Child, temperature: float, seed: int, batch: int = 0) -> Answer:
        """All chains turn by turn, as if it were one call: times and counts are sums over the turns."""
        chains: list[list[Draft]] = [[] for _ in self.prompts]
        found: Answer = dict.fromkeys(COUNTED, 0)
        for turn in range(self.turns):
            contexts = [self.talk.context(p.text, c[-1:]) for p, c in zip(self.prompts, chains, strict=True)]
            answer = arm.ask(
                turn=turn,
                batch=batch,
                contexts=[list(context) for context in contexts],
                temperature=temperature,
                seed=seed * self.turns + turn,
                max_new_tokens=self.max_new_tokens,
                ends=list(self.talk.end_ids),
            )
            answers = answer.pop("answers")
            for chain, context, ids in zip(chains, contexts, answers, strict=True):
                chain.append(self._draft(chain, context, tuple(ids)))
            answer |= {"drafts": len(answers), "tokens": sum(map(len, answers))}
            found |= answer | {key: round(found[key] + answer[key], 4) for key in COUNTED}
            found.setdefault("first", {key: answer[key] for key in COUNTED})
        return found

    def _draft(self, before: list[Draft], context: tuple[int, ...], ids: tuple[int, ...]) -> Draft:
        reason = "stop" if ids[-1] in self.talk.end_ids else "length"
        parents = (before[-1].index,) if before else ()
        return Draft(len(before), len(before) + 1, parents, "", ids, (), reason, len(context), 0)


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    task = keywords.load(keywords.Config())
    loaded = load.load(args.model, "bfloat16", device="cpu")
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests(task.refine_request))
    setting = Setting(talk, task.prompts("train", 0, args.prompts), args.turns, args.max_new_tokens)
    del loaded
    rows = [
        _rows.missing(f"{TITLE}, against {NAMES[peer]}", "drafts/s", "gpu", goal=GOALS[peer].get("", ""))
        for peer in ("generate", "continuous", "vllm")
        if args.device == "cpu"
    ]
    detail: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, Arms(_starts(args, Path(folder)), args.device) as arms:
        for peer in args.peers:
            measured: list[_rows.Row] = []
            for found in compare(args, setting, peer, arms):
                detail[peer], measured = found, list(rows_of(peer, found, args))
                _rows.write("chain", rows + measured, detail, args)  # hours in all: what is measured stays so
            rows += measured


def compare(args: argparse.Namespace, setting: Setting, peer: str, arms: Arms) -> Iterator[dict[str, Any]]:
    """Ours and one peer in turn, at each temperature; what is known after each of them."""
    print(f"chains: our engine against {NAMES[peer]}", flush=True)
    found: dict[str, Any] = {}
    try:
        batch = _best_batch(args, setting, arms) if peer == "generate" else 0
        found |= {"options": _words(args, peer, batch), "version": f"transformers {VERSION}"}
        with arms.of("engine") as ours, arms.of(peer) as theirs:
            for temperature in args.temperatures:
                asks: dict[str, Callable[[int], Answer]] = {
                    "engine": partial(setting.ask_ours, ours, temperature),
                    "peer": partial(setting.ask_peer, theirs, temperature, batch=batch),
                }
                for seed in range(GRAPHS if args.device == "cuda" else 0):
                    asks["engine"](-1 - seed)
                found[str(temperature)] = _alternate(args, temperature, asks)
                yield found
        arms.drop(peer)
    except _child.ChildError as error:
        if not any(str(temperature) in found for temperature in args.temperatures):
            yield {"error": str(error)}


def _alternate(
    args: argparse.Namespace, temperature: float, asks: dict[str, Callable[[int], Answer]]
) -> dict[str, list[Answer]]:
    """A B, B A, ...; the first round is a warm-up."""
    runs: dict[str, list[Answer]] = {name: [] for name in asks}
    for seed in range(args.repeats + 1):
        for name in asks if seed % 2 else reversed(asks):
            answer = asks[name](seed)
            print(f"  temperature {temperature}, {name}: {answer}", flush=True)
            if seed:
                runs[name].append(answer)
    return runs


def _starts(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Child]]:
    """How our arm starts, and each peer's."""
    threads = ["--threads", str(args.threads)]
    model = ["--model", args.model, *threads, "--device", args.device]
    start = partial(Child, limit=_child.PATIENCE if args.device == "cuda" else None)
    generate = partial(start, "_generate.py", [*model, "--dtype", args.peer_dtype])

    def vllm() -> Child:
        options = ["--folder", folders.resolve(args.model), "--slots", str(args.slots), *threads]
        return start("_vllm.py", options, args.vllm_python)

    def llama_cpp() -> Child:
        import _gguf

        path = folder / "model.gguf"
        _gguf.convert(Path(folders.resolve(args.model)), path)
        options = ["--gguf", str(path), "--sequences", str(args.prompts), *threads]
        return start("_llama_cpp.py", options, args.llama_cpp_python)

    peers = {"generate": generate, "continuous": generate, "vllm": vllm, "llama.cpp": llama_cpp}
    ours = {"engine": partial(start, "_engine.py", [*model, "--slots", str(args.slots)])}
    return ours | {name: peers[name] for name in args.peers}


def _words(args: argparse.Namespace, peer: str, batch: int) -> str:
    """How a peer is run."""
    cache = "64k tokens" if args.device == "cpu" else "its own size, kept between turns with its CUDA graphs"
    return {
        "generate": f"{args.peer_dtype}, SDPA, batches of {batch}",
        "continuous": f"{args.peer_dtype}, SDPA, paged cache of {cache}",
        "vllm": "bf16, prefix caching",
        "llama.cpp": "the same bf16 weights as GGUF, all prompts of a turn in one batch, cache kept between turns",
    }[peer]


def _best_batch(args: argparse.Namespace, s: Setting, arms: Arms) -> int:
    """The fastest size for `generate`, by one run of each."""
    took: dict[int, float] = {}
    with arms.of("generate") as arm:
        for size in dict.fromkeys(min(size, len(s.prompts)) for size in args.batches):
            took[size] = s.ask_peer(arm, TEMPERATURES[-1], 0, size)[args.clock]
            print(f"  generate, batches of {size}: {took[size]:.2f} s", flush=True)
    return min(took, key=took.__getitem__)


def rows_of(peer: str, found: dict[str, Any], args: argparse.Namespace) -> Iterator[_rows.Row]:
    """Drafts and tokens per second at each temperature."""
    device = _child.DEVICES[args.device]
    if "error" in found:
        why = f"{_rows.NOT_MEASURED}: {found['error']}"
        for part, goal in GOALS[peer].items():
            yield _rows.missing(f"{TITLE}{part}, against {NAMES[peer]}", "drafts/s", device, goal=goal, why=why)
        return
    for temperature in [key for key in found if key not in ("options", "version")]:
        ours, theirs = found[temperature]["engine"], found[temperature]["peer"]
        how = "greedy" if float(temperature) == 0 else f"temperature {float(temperature):g}"
        said: _rows.Said = {"version": theirs[0].get("version", found["version"]), "options": found["options"]}
        said["device"] = device
        for part, unit in [("", "drafts"), ("", "tokens"), (FIRST, "drafts"), (LATER, "drafts")]:
            rates = [_rate([_part(run, part) for run in runs], unit, args.clock) for runs in (ours, theirs)]
            goal = GOALS[peer].get(part, "") if unit == "drafts" else ""
            name = f"{TITLE}{part}, {how}, against {NAMES[peer]}"
            yield _rows.against(name, f"{unit}/s", *rates, **{**said, "goal": goal})


def _part(run: Answer, part: str) -> Answer:
    """What one part of the chains took and gave."""
    later = {key: run[key] - run["first"][key] for key in COUNTED}
    return {"": run, FIRST: run["first"], LATER: later}[part]


def _rate(runs: list[Answer], unit: str, clock: str) -> float:
    return _rows.median([{"rate": run[unit] / run[clock]} for run in runs], "rate")


def _arguments() -> argparse.Namespace:
    import sys

    parser = _child.parser("Refinement chains: our engine against peers.", quick="few prompts, one repeat")
    _facts.add_peer_dtype(parser)
    parser.add_argument("--peers", nargs="+", choices=[*NAMES], default=None)
    parser.add_argument("--prompts", type=int, default=None)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each arm")
    parser.add_argument("--slots", type=int, default=None)
    parser.add_argument("--batches", type=int, nargs="+", default=None)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[*TEMPERATURES])
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--vllm-python", default=sys.executable, help="interpreter that can import vllm")
    parser.add_argument("--llama-cpp-python", default=sys.executable, help="interpreter that can import llama_cpp")
    args = parser.parse_args()
    args.peer_dtype = args.peer_dtype or _facts.fastest_dtype(args.device)
    args.peers = args.peers or (ON_GPU if args.device == "cuda" else [*NAMES])
    if args.device == "cuda" and (missing := set(args.peers) - {*ON_GPU}):
        parser.error(f"no arm on a GPU: {sorted(missing)}")
    size, batches = SIZES[args.device]
    args.prompts, args.slots, args.batches = args.prompts or size, args.slots or size, args.batches or batches
    if args.quick:
        args.prompts, args.repeats, args.batches, args.slots = 16, 1, [16], 16
    return args


if __name__ == "__main__":
    main()
