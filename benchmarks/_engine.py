"""Our arm of a chain: the local engine, drafts of all prompts and turns in one batch."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import _child
import _profile
import torch

from upturn.engines import local, sampling
from upturn.lab._memory import keep_freed
from upturn.models import chat, load
from upturn.strategies import chain
from upturn.tasks import keywords
from upturn.tracking import progress
from upturn.types import Attempt, Requests


def counts(attempts: list[Attempt]) -> dict[str, int]:
    """Drafts, their tokens, the context tokens that had to be computed, and the (query, key) pairs of both."""
    drafts = [draft for attempt in attempts for draft in attempt.drafts]
    computed = [draft for draft in drafts if draft.cached_tokens < draft.prompt_tokens]  # others were known already
    ends = [(d.cached_tokens, d.prompt_tokens + len(d.token_ids) - 1) for d in computed]
    return {
        "drafts": len(drafts),
        "tokens": sum(len(draft.token_ids) for draft in drafts),
        "context_tokens_computed": sum(draft.prompt_tokens - draft.cached_tokens for draft in drafts),
        "attention_pairs": sum((last - first) * (first + 1 + last) // 2 for first, last in ends),
    }


def main() -> None:
    """Answer questions with whole chains: the token counts of every draft."""
    parser = argparse.ArgumentParser(description="Our arm of chain.py.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    _child.add_device(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    progress.set_mode("quiet")
    keep_freed()  # as every stage of a run does
    task = keywords.load(keywords.Config())
    loaded = load.load(args.model, "bfloat16", device=args.device)
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests(task.refine_request))

    engines: dict[tuple[float, int], local.Local] = {}  # an engine keeps its CUDA graphs, as a peer's model does

    def chains(question: dict[str, Any]) -> tuple[int, list[Attempt]]:
        how = (question["temperature"], question["max_new_tokens"])
        if how not in engines:
            cfg = sampling.Config(temperature=how[0], max_new_tokens=how[1])
            engines[how] = local.Local(loaded.model, talk, cfg, seed=0, slots=args.slots)
        engine, strategy = engines[how], partial(chain.generate, cfg=chain.Config(turns=question["turns"]))
        engine.seed, before = question["seed"], engine.num_forwards
        attempts = engine.run(task.prompts("train", 0, question["prompts"]), strategy)
        return engine.num_forwards - before, attempts

    def handle(question: dict[str, Any]) -> dict[str, Any]:
        if question.get("profile"):
            return {"shares": _profile.of(lambda: chains(question), on_gpu=args.device == "cuda")}
        watch = _child.Stopwatch()
        forwards, attempts = chains(question)
        return watch.read() | counts(attempts) | {"forwards": forwards}

    _child.serve(handle)


if __name__ == "__main__":
    main()
