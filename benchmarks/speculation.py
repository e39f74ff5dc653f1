"""A refinement turn against a fresh one, with and without speculation from the draft shown.

Turns      so many chains at a time, one slot each; a chain waits at the end of every turn for the others, so each
           turn has a time of its own. Turn 1 is fresh, the later ones refine. The last chains of a turn run in a
           batch that empties, in both arms.
Refilled   more chains than slots, turns mixed as the engine does it: turn 1 alone, then all turns. What the later
           turns take is the difference, and no turn waits for its slowest chain.
Known      a greedy chain that has its context again takes the answer from there, without a pass and in both arms. It
           cannot have it in turn 2, whose cost stands alone, too.
Arms       with and without, by turns in one process, the other one first in every second repeat. Medians over
           repeats. Drafts may differ in bfloat16 (not with AMX), so seconds per token stand beside seconds per draft.
Clock      wall, or CPU seconds of the process: with one thread these hold on a machine that has other work too.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import _child
import _rows
import torch

from upturn.engines import local, sampling
from upturn.evaluation import words
from upturn.models import chat, load
from upturn.strategies import chain
from upturn.tasks import keywords
from upturn.tracking import progress
from upturn.types import Attempt, Draft, Prompt, Requests

CLOCKS = {"wall": _child.wall, "cpu": time.process_time}
FEW, COPYING = 8, 2 / 3
"""The goal for a refinement holds for so few chains at a time, where so many words of a draft are kept."""
PARTS = {"refined": "a refinement", "second": "the first refinement"}
COUNTERS = ("num_forwards", "num_tokens_computed", "num_proposed", "num_accepted")


@dataclass(slots=True)
class Turns:
    """A chain that notes the engine's counters and the time where its last prompt ends a turn."""

    engine: local.Local
    chains: int
    turns: int
    clock: Callable[[], float]
    marks: list[dict[str, float]] = field(default_factory=list)
    _arrived: int = 0
    _gate: asyncio.Future[None] | None = None

    async def generate(self, prompt: Prompt, sample: Any) -> list[Draft]:
        """The strategy."""
        drafts: list[Draft] = []
        for _ in range(self.turns):
            drafts.append(await sample(prompt, shown=drafts[-1:]))
            await self._all()
        return drafts

    def mark(self) -> None:
        """Note what has been done so far."""
        done = {name: getattr(self.engine, name) for name in COUNTERS}
        self.marks.append({"seconds": self.clock()} | done)

    async def _all(self) -> None:
        self._gate = self._gate or asyncio.get_running_loop().create_future()
        gate, self._arrived = self._gate, self._arrived + 1
        if self._arrived < self.chains:
            await gate
            return
        self.mark()
        self._arrived, self._gate = 0, None
        gate.set_result(None)


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs have in common."""

    model: Any
    talk: chat.Chat
    how: sampling.Config
    turns: int
    clock: Callable[[], float]

    def engine(self, slots: int, seed: int, *, speculate: bool) -> local.Local:
        """A new engine over the same model."""
        return local.Local(self.model, self.talk, self.how, seed=seed, slots=slots, speculate=speculate)


def by_turn(s: Setting, prompts: Sequence[Prompt], chains: int, seed: int, *, speculate: bool) -> dict[str, Any]:
    """What turn 1 and the later turns took, prompts in groups of `chains`."""
    spent: list[dict[str, float]] = [dict.fromkeys(("seconds", *COUNTERS), 0.0) for _ in range(s.turns)]
    attempts: list[Attempt] = []
    for first in range(0, len(prompts), chains):
        watch = Turns(s.engine(chains, seed, speculate=speculate), chains, s.turns, s.clock)
        watch.mark()
        attempts += watch.engine.run(prompts[first : first + chains], watch.generate)
        for turn, (before, after) in enumerate(pairwise(watch.marks)):
            for name in spent[turn]:
                spent[turn][name] += after[name] - before[name]
    drafts = [attempt.drafts for attempt in attempts]
    refined = {name: sum(turn[name] for turn in spent[1:]) for name in spent[0]}
    return {
        "fresh": _rates(spent[0], [chain_[0] for chain_ in drafts]),
        "second": _rates(spent[1], [chain_[1] for chain_ in drafts]) | _copying([chain_[:2] for chain_ in drafts]),
        "refined": _rates(refined, [draft for chain_ in drafts for draft in chain_[1:]]) | _copying(drafts),
    }


def _rates(spent: dict[str, float], drafts: Sequence[Draft]) -> dict[str, float]:
    tokens = sum(draft.num_tokens for draft in drafts)
    return {
        "seconds_per_draft": spent["seconds"] / len(drafts),
        "seconds_per_token": spent["seconds"] / tokens,
        "tokens_per_draft": tokens / len(drafts),
        "tokens_per_forward": tokens / spent["num_forwards"],
        "computed_per_token": spent["num_tokens_computed"] / tokens,
        "acceptance": spent["num_accepted"] / max(1.0, spent["num_proposed"]),
    }


def _copying(chains: Sequence[Sequence[Draft]]) -> dict[str, float]:
    pairs = [(old.text, new.text) for drafts in chains for old, new in pairwise(drafts)]
    return {
        "copied": statistics.fmean(old == new for old, new in pairs),
        "similarity": 1 - statistics.fmean(words.edit_distance(old, new) for old, new in pairs),
    }


def refilled(s: Setting, prompts: Sequence[Prompt], slots: int, seed: int, *, speculate: bool) -> dict[str, float]:
    """All chains mixed, every slot refilled: a run of the first turn alone, then one of all turns."""
    engine = s.engine(slots, seed, speculate=speculate)
    marks = [s.clock()]
    for turns in (1, s.turns):
        attempts = engine.run(prompts, partial(chain.generate, cfg=chain.Config(turns=turns)))
        marks.append(s.clock())
    fresh, both = (after - before for before, after in pairwise(marks))
    drafts = [attempt.drafts for attempt in attempts]
    firsts, all_ = (sum(d.num_tokens for chain_ in drafts for d in chain_[:n]) for n in (1, s.turns))
    refined = (both - fresh) / (all_ - firsts)
    return {
        "seconds_per_token": both / all_,
        "fresh_seconds_per_token": fresh / firsts,
        "refined_seconds_per_token": refined,
        "refined_over_fresh_per_token": refined / (fresh / firsts),
        "refined_over_fresh_per_draft": (both - fresh) / (s.turns - 1) / fresh,
        "acceptance": engine.num_accepted / max(1, engine.num_proposed),
    } | _copying(drafts)


def alternating(name: str, arm: Any, repeats: int) -> dict[str, Any]:
    """Medians of both arms over repeats that change which one goes first."""
    runs: dict[str, list[Any]] = {"with": [], "without": []}
    for repeat in range(repeats):
        for key in ("with", "without") if repeat % 2 == 0 else ("without", "with"):
            runs[key].append(arm(seed=repeat, speculate=key == "with"))
            print(f"{name}, {key}: {_rounded(runs[key][-1])}", flush=True)
    return {key: _median(found) for key, found in runs.items()}


def _median(runs: Sequence[Any]) -> Any:
    """The median of every number, through nested dictionaries."""
    if isinstance(runs[0], dict):
        return {key: _median([run[key] for run in runs]) for key in runs[0]}
    return float(f"{statistics.median(runs):.4g}")


def _rounded(run: Any) -> Any:
    return _median([run])


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    progress.set_mode("quiet")
    task = keywords.load(keywords.Config())
    loaded = load.load(args.model, args.dtype, device=args.device)
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests(task.refine_request))
    rows, detail = list[_rows.Row](), dict[str, Any]()
    device = _child.DEVICES[args.device]
    for temperature in args.temperatures:
        how = sampling.Config(temperature=temperature, max_new_tokens=args.max_new_tokens)
        setting = Setting(loaded.model, talk, how, args.turns, CLOCKS[args.clock])
        refilled(setting, task.prompts("train", 0, 2), 2, 0, speculate=True)  # warm-up
        turns = {chains: _turns(setting, task, chains, args) for chains in args.chains}
        mixed = {slots: _mixed(setting, task, slots, args) for slots in args.slots}
        detail[str(temperature)] = {"by_turn": turns, "refilled": mixed}
        rows += rows_of(temperature, turns, mixed, device)
    _rows.write("speculation", rows, detail, args)


def _turns(setting: Setting, task: Any, chains: int, args: argparse.Namespace) -> dict[str, Any]:
    prompts = task.prompts("test", 0, -(-max(chains, args.prompts) // chains) * chains)
    found = alternating(f"{chains} chains", partial(by_turn, setting, prompts, chains), args.repeats)
    for run in found.values():
        for part, unit in product(("refined", "second"), ("draft", "token")):
            share = run[part][f"seconds_per_{unit}"] / run["fresh"][f"seconds_per_{unit}"]
            run[f"{part}_over_fresh_per_{unit}"] = round(share, 3)
    return found


def _mixed(setting: Setting, task: Any, slots: int, args: argparse.Namespace) -> dict[str, Any]:
    arm = partial(refilled, setting, task.prompts("test", 0, args.refills * slots), slots)
    found = alternating(f"{slots} slots", arm, args.repeats)
    return found | {"speedup": found["without"]["seconds_per_token"] / found["with"]["seconds_per_token"]}


def rows_of(temperature: float, turns: dict[int, Any], mixed: dict[int, Any], device: str) -> Iterator[_rows.Row]:
    """What a refinement costs beside a fresh turn, and what speculation is worth where slots are refilled."""
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    for (chains, found), (part, what) in product(turns.items(), PARTS.items()):
        run, alone = found["with"], found["without"][f"{part}_over_fresh_per_draft"]
        similar, taken = run[part]["similarity"], run[part]["acceptance"]
        goal = "<= 0.5" if chains <= FEW and similar >= COPYING else ""
        note = f"words kept {similar:.2f}, guesses accepted {taken:.2f}; without speculation {alone:.2f}"
        name = f"{what} over a fresh turn, {chains} at a time, {how}"
        share = run[f"{part}_over_fresh_per_draft"]
        yield _rows.row(name, "share of the time", share, device=device, goal=goal, note=note)
    for slots, found in mixed.items():
        note = f"words kept {found['with']['similarity']:.2f}"
        name = f"chains with speculation over without, {slots} slots refilled, {how}"
        yield _rows.row(name, "times as fast", found["speedup"], device=device, goal=">= 1", note=note)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A refinement turn against a fresh one, with and without speculation.")
    parser.add_argument("--model", default="smollm2-135m", help="short name, hub id or folder")
    parser.add_argument("--dtype", default="bfloat16")
    _child.add_device(parser)
    parser.add_argument("--chains", type=int, nargs="*", default=[1, 2, 4, 8, 16, 64], help="chains at a time")
    parser.add_argument("--prompts", type=int, default=4, help="chains in all, at least")
    parser.add_argument("--slots", type=int, nargs="*", default=[8, 64], help="slots that are refilled")
    parser.add_argument("--refills", type=int, default=2, help="prompts for each of them")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes, one repeat: a check, not a measurement")
    parser.add_argument("--out", type=Path, default=_rows.RESULTS / "speculation.json")
    args = parser.parse_args()
    if args.quick:
        args.chains, args.slots, args.repeats = [1], [8], 1
    return args


if __name__ == "__main__":
    main()
