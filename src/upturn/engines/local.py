"""Local sampling: static KV cache, slots kept full, drafts that do not depend on their neighbours.

A strategy is a coroutine that asks for one draft after another; the engine mixes drafts of all prompts and turns in
one batch. When a draft ends, its slot goes to the next turn of the same prompt, which reuses the question and, where
the template allows, the draft itself.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from upturn.engines import _base, sampling
from upturn.engines._base import Generate
from upturn.engines._slots import Slots, StepPlan
from upturn.errors import DataError
from upturn.models import policy
from upturn.models.chat import Chat
from upturn.types import Attempt, Draft, FinishReason, Kind, Prompt

PREFILL_TOKENS = 4096
"""Most context tokens computed in one forward pass."""
GROW = 128
"""Slots grow by whole steps of this many tokens."""


@dataclass(order=True, slots=True)
class _Request:
    order: tuple[int, int]
    """(prompt, draft): earlier prompts first, so later turns come before new prompts."""
    context: tuple[int, ...] = field(compare=False)
    parents: tuple[int, ...] = field(compare=False)
    turn: int = field(compare=False)
    uniforms: Any = field(compare=False)
    done: asyncio.Future[Draft] = field(compare=False)
    cached: int = field(compare=False, default=0)
    token_ids: list[int] = field(compare=False, default_factory=list)
    logprobs: list[float] = field(compare=False, default_factory=list)


@dataclass(slots=True)
class _Slot:
    prompt: int = -1
    ids: list[int] = field(default_factory=list)
    """Tokens whose keys and values are in the cache."""
    request: _Request | None = None


class Local:
    """Engine over a `transformers` model in this process."""

    def __init__(self, model: nn.Module, chat: Chat, cfg: sampling.Config, *, seed: int, slots: int = 64) -> None:
        self.model, self.chat, self.cfg, self.seed, self.num_slots = model.eval(), chat, cfg, seed, slots
        self.device = next(model.parameters()).device
        config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
        self.longest = int(config.max_position_embeddings)
        self.max_new_tokens = cfg.max_new_tokens or 256
        self._config = config
        self.num_forwards = 0

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Every question must say something and leave room for an answer, else DataError for the first."""
        _base.refuse_empty(prompts)
        sizes = [len(self.chat.context(prompt.text, ())) for prompt in prompts]
        long = [place for place, size in enumerate(sizes) if size >= self.longest]
        if long:
            raise DataError(
                f"prompt {prompts[long[0]].id}",
                f"It has {sizes[long[0]]} tokens with its template, and the model takes {self.longest}. "
                f"{len(long)} of {len(prompts)} prompts are too long.",
                "Drop or shorten such prompts, or use a model with a longer context.",
            )

    def run(
        self, prompts: Sequence[Prompt], generate: Generate, on_draft: Callable[[Draft], None] = lambda draft: None
    ) -> list[Attempt]:
        """Run a strategy over all prompts; attempts come back in the order of the prompts."""

        def work() -> list[Attempt]:
            with torch.inference_mode():
                return asyncio.run(self._run(prompts, generate, on_draft))

        return _base.outside_loops(work)

    async def _run(
        self, prompts: Sequence[Prompt], generate: Generate, on_draft: Callable[[Draft], None]
    ) -> list[Attempt]:
        like = next(self.model.parameters())
        self._cache = Slots(self._config, self.num_slots, GROW, like)
        self._slots = [_Slot() for _ in range(self.num_slots)]
        self._queue: list[_Request] = []
        self._on_draft = on_draft
        waiting = list(enumerate(prompts))[::-1]
        live: dict[int, asyncio.Task[list[Draft]]] = {}
        drafts: dict[int, list[Draft]] = {}
        try:
            while waiting or live:
                while waiting and len(live) < self.num_slots:
                    order, prompt = waiting.pop()
                    live[order] = asyncio.create_task(generate(prompt, self._sampler(order)))
                await _settle()
                self._admit()
                self._step()
                await _settle()
                for order in [order for order, task in live.items() if task.done()]:
                    drafts[order] = live.pop(order).result()
        finally:
            for task in live.values():
                task.cancel()
        return [Attempt(prompt, tuple(drafts[order])) for order, prompt in enumerate(prompts)]

    def _sampler(self, order: int) -> Callable[[Prompt, Sequence[Draft]], Any]:
        calls = 0

        async def sample(
            prompt: Prompt, shown: Sequence[Draft], request: str = "", kind: Kind = "answer"
        ) -> Draft:
            nonlocal calls
            index, calls = calls, calls + 1
            asked = _Request(
                order=(order, index),
                context=self.chat.context(prompt.text, shown, request),
                parents=tuple(draft.index for draft in shown),
                turn=_base.next_turn(shown, kind),
                uniforms=sampling.uniforms(self.seed, f"{prompt.id}/{index}", self.max_new_tokens),
                done=asyncio.get_running_loop().create_future(),
            )
            heapq.heappush(self._queue, asked)
            draft = await asked.done
            return replace(draft, kind=kind, request=request) if request else draft

        return sample

    def _admit(self) -> None:
        """Give free slots to waiting requests. Siblings with one context wait until the first of them is computed."""
        budget, contexts = PREFILL_TOKENS, set[tuple[int, ...]]()
        waiting: list[_Request] = []
        free = [row for row, slot in enumerate(self._slots) if slot.request is None]
        while self._queue and free and budget > 0:
            request = heapq.heappop(self._queue)
            if len(request.context) >= self.longest:
                self._finish(request, "context")
            elif request.context in contexts:
                waiting.append(request)
            else:
                row = next((r for r in free if self._slots[r].prompt == request.order[0]), free[0])
                free.remove(row)
                self._take_over(row, request)
                contexts.add(request.context)
                budget -= len(request.context) - request.cached
        for request in waiting:
            heapq.heappush(self._queue, request)
        if not self._queue:
            self._compact()

    def _take_over(self, row: int, request: _Request) -> None:
        """Put a request into a slot, with as much of its context as any slot already holds."""
        slot, wanted = self._slots[row], request.context[:-1]
        own = _shared(slot.ids, wanted)
        donor = max(range(self.num_slots), key=lambda r: (_shared(self._slots[r].ids, wanted), -r))
        best = _shared(self._slots[donor].ids, wanted)
        if best > own:
            self._cache.keys[:, row, :, own:best] = self._cache.keys[:, donor, :, own:best]
            self._cache.values[:, row, :, own:best] = self._cache.values[:, donor, :, own:best]
        slot.ids = list(wanted[: max(own, best)])
        slot.prompt, slot.request, request.cached = request.order[0], request, len(slot.ids)

    def _step(self) -> None:
        """One forward pass: feed what each slot has not seen yet, and sample the next token of each running draft."""
        rows = [row for row, slot in enumerate(self._slots) if slot.request is not None]
        if not rows:
            return
        running = [_running(self._slots[row]) for row in rows]
        starts = [len(self._slots[row].ids) for row in rows]
        new = [[*r.context, *r.token_ids][start:] for r, start in zip(running, starts, strict=True)]
        self._reserve(max(start + len(ids) for start, ids in zip(starts, new, strict=True)))
        plan = StepPlan(self._cache, rows, starts, [len(ids) for ids in new])
        ids_T = torch.tensor([i for ids in new for i in ids], device=self.device)
        hidden_T = policy.hidden_states(self.model, ids_T, plan.place_T, plan)
        self.num_forwards += 1
        last_B = torch.tensor([len(ids) for ids in new], device=self.device).cumsum(0) - 1
        logits = policy.head(self.model, hidden_T[last_B])
        uniform_B = torch.tensor([r.uniforms[len(r.token_ids)] for r in running], device=self.device)
        chosen, logprobs = sampling.choose(logits, uniform_B, self.cfg.temperature, self.cfg.top_p)
        for row, ids, token, logprob in zip(rows, new, chosen.tolist(), logprobs.tolist(), strict=True):
            self._slots[row].ids.extend(ids)
            self._take(row, token, logprob)

    def _take(self, row: int, token: int, logprob: float) -> None:
        slot = self._slots[row]
        request = _running(slot)
        request.token_ids.append(token)
        request.logprobs.append(logprob)
        reason: FinishReason | None = None
        if token in self.chat.end_ids:
            reason = "stop"
        elif len(request.token_ids) >= self.max_new_tokens:
            reason = "length"
        elif len(request.context) + len(request.token_ids) >= self.longest:
            reason = "context"
        if reason:
            slot.request = None
            self._finish(request, reason)

    def _finish(self, request: _Request, reason: FinishReason) -> None:
        draft = Draft(
            index=request.order[1],
            turn=request.turn,
            parents=request.parents,
            text=self.chat.decode(request.token_ids),
            token_ids=tuple(request.token_ids),
            sampler_logprobs=tuple(round(value, 6) for value in request.logprobs),
            finish_reason=reason,
            prompt_tokens=len(request.context),
            cached_tokens=request.cached,
        )
        self._on_draft(draft)
        request.done.set_result(draft)

    def _reserve(self, length: int) -> None:
        """Make every slot at least this long."""
        if length > self._cache.length:
            old, wanted = self._cache, -(-length // GROW) * GROW
            self._cache = Slots(self._config, self.num_slots, wanted, old.keys)
            self._cache.keys[..., : old.length, :] = old.keys
            self._cache.values[..., : old.length, :] = old.values

    def _compact(self) -> None:
        """Move running drafts to the first slots, so that a shrinking batch costs less."""
        busy = [row for row, slot in enumerate(self._slots) if slot.request is not None]
        holes = [row for row in range(len(busy)) if self._slots[row].request is None]
        for hole, row in zip(holes, reversed(busy), strict=False):
            size = len(self._slots[row].ids)
            self._cache.keys[:, hole, :, :size] = self._cache.keys[:, row, :, :size]
            self._cache.values[:, hole, :, :size] = self._cache.values[:, row, :, :size]
            self._slots[hole], self._slots[row] = self._slots[row], _Slot()


def _shared(ids: list[int], wanted: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    for place, (one, other) in enumerate(zip(ids, wanted, strict=False)):
        if one != other:
            return place
    return min(len(ids), len(wanted))


def _running(slot: _Slot) -> _Request:
    assert slot.request is not None
    return slot.request


async def _settle() -> None:
    """Let every coroutine that can go on do so; gathered siblings need one more round."""
    for _ in range(4):
        await asyncio.sleep(0)
