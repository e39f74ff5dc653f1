"""Drafts per second of a refinement chain: the local engine against `generate` of transformers.

Measures   the same prompts, turns, contexts (rendered by the same chat), sampling settings, weights and
           threads. `engine`: Local with 64 slots, drafts of all prompts and turns mixed. `generate`: one call
           per turn and batch, left-padded, its own KV cache, SDPA. Alternating runs, median; both decode.
Batches    `generate` runs with batches of 16, 32 and 64 once; 64 and the fastest are then repeated.
Answers    both sample, so lengths differ a little; tokens per second stand beside drafts per second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _facts
import torch

from upturn.engines import local, sampling
from upturn.models import chat, load
from upturn.strategies import chain
from upturn.tasks import keywords
from upturn.tracking import progress
from upturn.types import Draft, Prompt

BATCHES = (16, 32, 64)
Chains = list[list[Draft]]


@dataclass(frozen=True, slots=True)
class Setting:
    """What both arms have in common."""

    talk: chat.Chat
    prompts: Sequence[Prompt]
    args: argparse.Namespace


def by_engine(model: Any, s: Setting, seed: int) -> Chains:
    """The engine's chains."""
    how = {"temperature": s.args.temperature, "max_new_tokens": s.args.max_new_tokens}
    engine = local.Local(model, s.talk, sampling.Config.model_validate(how), seed=seed, slots=s.args.slots)
    attempts = engine.run(s.prompts, partial(chain.generate, cfg=chain.Config(turns=s.args.turns)))
    return [list(attempt.drafts) for attempt in attempts]


def by_generate(model: Any, s: Setting, seed: int, *, batch: int) -> Chains:
    """The same chains by one `generate` call per turn and batch."""
    torch.manual_seed(seed)
    chains: Chains = [[] for _ in s.prompts]
    for _ in range(s.args.turns):
        for first in range(0, len(s.prompts), batch):
            places = range(first, min(first + batch, len(s.prompts)))
            contexts = [s.talk.context(s.prompts[place].text, chains[place][-1:]) for place in places]
            answers = _generate(model, s, contexts)
            for place, context, ids in zip(places, contexts, answers, strict=True):
                chains[place].append(_draft(chains[place], s.talk, context, ids))
    return chains


def _generate(model: Any, s: Setting, contexts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    width, pad = max(map(len, contexts)), s.talk.end_ids[0]
    ids = [[pad] * (width - len(context)) + list(context) for context in contexts]
    mask = [[0] * (width - len(context)) + [1] * len(context) for context in contexts]
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            do_sample=True,
            temperature=s.args.temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=s.args.max_new_tokens,
            eos_token_id=list(s.talk.end_ids),
            pad_token_id=pad,
        )
    return [_up_to_end(row, s.talk.end_ids) for row in out[:, width:].tolist()]


def _up_to_end(ids: list[int], ends: Sequence[int]) -> tuple[int, ...]:
    stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return tuple(ids[:stop])


def _draft(before: list[Draft], talk: chat.Chat, context: tuple[int, ...], ids: tuple[int, ...]) -> Draft:
    reason = "stop" if ids[-1] in talk.end_ids else "length"
    parents = (before[-1].index,) if before else ()
    return Draft(len(before), len(before) + 1, parents, talk.decode(ids), ids, (), reason, len(context), 0)


def timed(name: str, arm: Callable[[int], Chains], seed: int) -> dict[str, float]:
    """One run of an arm."""
    began = time.perf_counter()
    chains = arm(seed)
    seconds = time.perf_counter() - began
    drafts = [draft for drafts in chains for draft in drafts]
    tokens = sum(len(draft.token_ids) for draft in drafts)
    run = {
        "seconds": round(seconds, 3),
        "drafts_per_second": round(len(drafts) / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "tokens_per_draft": round(tokens / len(drafts), 2),
    }
    print(f"{name}: {run}", flush=True)
    return run


def median(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over runs, with the runs themselves."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]} | {"runs": runs}


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    progress.set_mode("quiet")
    task = keywords.load(keywords.Config())
    ours, theirs = (load.load(args.model, "bfloat16", device="cpu") for _ in range(2))
    talk = chat.load(ours.tokenizer, ours.end_ids, task.refine_request)
    few, all_ = (Setting(talk, task.prompts("train", 0, count), args) for count in (2, args.prompts))
    by_engine(ours.model, few, 0)  # warm-up
    by_generate(theirs.model, few, 0, batch=2)
    arms: dict[str, Callable[[int], Chains]] = {"engine": partial(by_engine, ours.model, all_)}
    for size in BATCHES:
        arms[f"generate-{size}"] = partial(by_generate, theirs.model, all_, batch=size)
    runs = {name: [timed(name, arm, 0)] for name, arm in arms.items()}
    best = max(list(runs)[1:], key=lambda name: runs[name][0]["drafts_per_second"])
    for seed in range(1, args.repeats):
        for name in dict.fromkeys(("engine", f"generate-{BATCHES[-1]}", best)):
            runs[name].append(timed(name, arms[name], seed))
    _write(args, {name: median(found) for name, found in runs.items()}, best)


def _write(args: argparse.Namespace, arms: dict[str, Any], best: str) -> None:
    rate = {name: arm["drafts_per_second"] for name, arm in arms.items()}
    record = {"benchmark": "chain", "dtype": "bfloat16"} | {k: v for k, v in vars(args).items() if k != "out"}
    record |= {"where": _facts.facts(), "arms": arms, "best_generate": best}
    record["speedup_over_generate_64"] = round(rate["engine"] / rate[f"generate-{BATCHES[-1]}"], 3)
    record["speedup_over_best_generate"] = round(rate["engine"] / rate[best], 3)
    _facts.write(args.out, record)
    print(f"engine: {record['speedup_over_best_generate']}x {best}, the best of generate")
    print(f"written to {args.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A refinement chain: engine against generate.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=_facts.HERE / "results" / "chain.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
