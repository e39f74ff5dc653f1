"""Refinement chains of four turns: our engine against transformers, vLLM and llama.cpp, greedy and at temperature 1.

Measures   the same prompts, contexts (rendered by the same chat), weights in bf16, token limit and threads. Each arm
           is a process of its own; ours and one peer are up at a time and work in turn. Medians after a warm-up.
Ours       all prompts and turns mixed in one batch. A peer answers all prompts of a turn in one call, then the next
           turn; the time is that of its calls alone.
Turns      ours answers turn 1 alone as well; what whole chains take more than that are the later turns.
Batches    `generate` of transformers tries each of `--batches` once; the fastest is measured.
Answers    lengths differ between arms, since each samples for itself: tokens/s stand beside drafts/s.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _child
import _facts
import _rows
import transformers
from _child import Answer, Child

from upturn.models import chat, load
from upturn.tasks import keywords
from upturn.types import Draft, Prompt, Requests

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
TEMPERATURES = (0.0, 1.0)
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

    def ask_peer(self, arm: Child, temperature: float, seed: int) -> Answer:
        """All chains turn by turn, as if it were one call: times and counts are sums over the turns."""
        chains: list[list[Draft]] = [[] for _ in self.prompts]
        found: Answer = dict.fromkeys(COUNTED, 0)
        for turn in range(self.turns):
            contexts = [self.talk.context(p.text, c[-1:]) for p, c in zip(self.prompts, chains, strict=True)]
            answer = arm.ask(
                turn=turn,
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
        _rows.missing(f"chains of four turns, against {NAMES[peer]}", "drafts/s", "gpu", goal=GOALS[peer].get("", ""))
        for peer in ("generate", "vllm")
    ]
    detail: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for peer in args.peers:
            detail[peer] = found = compare(args, setting, peer, Path(folder))
            rows += rows_of(peer, found, args.clock)
            _rows.write("chain", rows, detail, args)  # hours in all: a peer that is measured stays so


def compare(args: argparse.Namespace, setting: Setting, peer: str, folder: Path) -> dict[str, Any]:
    """Ours and one peer in turn, at each temperature."""
    print(f"chains: our engine against {NAMES[peer]}", flush=True)
    try:
        options, start = _arm(args, setting, peer, folder)
        found: dict[str, Any] = {"options": options, "version": f"transformers {transformers.__version__}"}
        ours = Child("_engine.py", ["--model", args.model, "--slots", str(args.slots), "--threads", str(args.threads)])
        with ours, start() as theirs:
            for temperature in args.temperatures:
                found[str(temperature)] = _alternate(args, setting, (ours, theirs), temperature)
    except _child.ChildError as error:
        return {"error": str(error)}
    return found


def _alternate(args: argparse.Namespace, s: Setting, arms: tuple[Child, Child], temperature: float) -> dict[str, Any]:
    """A B, B A, ...; the first round is a warm-up."""
    asks: dict[str, Callable[[int], Answer]] = {
        "engine": lambda seed: s.ask_ours(arms[0], temperature, seed),
        "peer": lambda seed: s.ask_peer(arms[1], temperature, seed),
    }
    runs: dict[str, list[Answer]] = {name: [] for name in asks}
    for seed in range(args.repeats + 1):
        for name in asks if seed % 2 else reversed(asks):
            answer = asks[name](seed)
            print(f"  temperature {temperature}, {name}: {answer}", flush=True)
            if seed:
                runs[name].append(answer)
    return runs


def _arm(args: argparse.Namespace, s: Setting, peer: str, folder: Path) -> tuple[str, Callable[[], Child]]:
    """How a peer is run, in words and as a process."""
    threads = ["--threads", str(args.threads)]
    model = ["--model", args.model, *threads]
    plain = [*model, "--dtype", args.peer_dtype]
    if peer == "generate":
        size = _best_batch(args, s, plain)
        words = f"{args.peer_dtype}, SDPA, batches of {size}"
        return words, lambda: Child("_generate.py", [*plain, "--batch", str(size)])
    if peer == "continuous":
        return f"{args.peer_dtype}, paged cache of 64k tokens", lambda: Child("_generate.py", [*plain, "--batch", "0"])
    if peer == "vllm":
        options = ["--folder", load.resolve(args.model), "--slots", str(args.slots), *threads]
        return "bf16, prefix caching", lambda: Child("_vllm.py", options, args.vllm_python)
    import _gguf

    path = folder / "model.gguf"
    _gguf.convert(Path(load.resolve(args.model)), path)
    options = ["--gguf", str(path), "--sequences", str(len(s.prompts)), *threads]
    words = "the same bf16 weights as GGUF, all prompts of a turn in one batch, cache kept between turns"
    return words, lambda: Child("_llama_cpp.py", options, args.llama_cpp_python)


def _best_batch(args: argparse.Namespace, s: Setting, model: list[str]) -> int:
    took: dict[int, float] = {}
    for size in dict.fromkeys(min(size, len(s.prompts)) for size in args.batches):
        with Child("_generate.py", [*model, "--batch", str(size)]) as arm:
            took[size] = s.ask_peer(arm, TEMPERATURES[-1], 0)[args.clock]
        print(f"  generate, batches of {size}: {took[size]:.2f} s", flush=True)
    return min(took, key=took.__getitem__)


def rows_of(peer: str, found: dict[str, Any], clock: str) -> Iterator[_rows.Row]:
    """Drafts and tokens per second at each temperature."""
    title = "chains of four turns"
    if "error" in found:
        why = f"{_rows.NOT_MEASURED}: {found['error']}"
        for part, goal in GOALS[peer].items():
            yield _rows.missing(f"{title}{part}, against {NAMES[peer]}", "drafts/s", "cpu", goal=goal, why=why)
        return
    for temperature in [key for key in found if key not in ("options", "version")]:
        ours, theirs = found[temperature]["engine"], found[temperature]["peer"]
        how = "greedy" if float(temperature) == 0 else f"temperature {float(temperature):g}"
        said = {"version": theirs[0].get("version", found["version"]), "options": found["options"]}
        for part, unit in [("", "drafts"), ("", "tokens"), (FIRST, "drafts"), (LATER, "drafts")]:
            rates = [_rate([_part(run, part) for run in runs], unit, clock) for runs in (ours, theirs)]
            goal = GOALS[peer].get(part, "") if unit == "drafts" else ""
            name = f"{title}{part}, {how}, against {NAMES[peer]}"
            yield _rows.against(name, f"{unit}/s", *rates, **said, goal=goal)


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
    parser.add_argument("--peers", nargs="+", choices=[*NAMES], default=[*NAMES])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each arm")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[*TEMPERATURES])
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--vllm-python", default=sys.executable, help="interpreter that can import vllm")
    parser.add_argument("--llama-cpp-python", default=sys.executable, help="interpreter that can import llama_cpp")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.repeats, args.batches, args.slots = 16, 1, [16], 16
    return args


if __name__ == "__main__":
    main()
