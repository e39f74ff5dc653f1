"""Local sampling: static KV cache, slots kept full, drafts that do not depend on their neighbours.

A strategy is a coroutine that asks for one draft after another; the engine mixes drafts of all prompts and turns in
one batch. When a draft ends, its slot goes to the next turn of the same prompt, which reuses the question and, where
the template allows, the draft itself.

A refinement is guessed from the drafts it was shown (`_propose`): the guess is fed along with the last token, every
place chooses its token with its own uniform number, and tokens count up to the first that was not the guess. So a
draft is the same with and without speculation, at any temperature, where logits are the same: in float32 up to
rounding, which moves a token only where a uniform number falls within it. In bfloat16 the last bits of a logit depend
on the batch's shape, so drafts part at near-ties; their distribution is the same. On a CPU with our own products (x86),
where all layers are of the common kind (`models._common`) and top_p is 1, they do not: drafts are the same to the bit.
A greedy draft follows from its context alone: a chain that repeats a draft, so comes to a context that it had, gets the
answer that it had, and siblings share one.

How much is proposed follows from counts and never from a clock: the same run gives the same bytes.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from upturn.engines import _base, _propose, sampling
from upturn.engines._base import Generate
from upturn.engines._passes import Launched, Ready, kind_of
from upturn.engines._propose import Copying, Proposer
from upturn.engines._requests import Held, Request, Slot, shared
from upturn.engines._slots import Span
from upturn.errors import DataError
from upturn.models.chat import Chat
from upturn.types import Attempt, Draft, FinishReason, Kind, Prompt

PREFILL_TOKENS = 4096
"""Most context tokens computed in one forward pass."""
TEMPLATE_TOKENS = 16
"""Least common beginning of all contexts that is worth a forward pass of its own."""
OVERLAP = 64
"""Fewest running drafts that are fed in two halves, by turns: one on the device, one in the program."""
BEGINNING = 60
"""Characters of a prompt that a message quotes."""


class Local:
    """Engine over a `transformers` model in this process."""

    def __init__(
        self,
        model: nn.Module,
        chat: Chat,
        cfg: sampling.Config,
        *,
        seed: int,
        slots: int = 64,
        speculate: bool = True,
    ) -> None:
        self.model, self.chat, self.cfg, self.seed, self.num_slots = model.eval(), chat, cfg, seed, slots
        config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
        self.longest = int(config.max_position_embeddings)
        self.max_new_tokens = cfg.max_new_tokens or 256
        self.speculate = speculate
        self._ends = frozenset(chat.end_ids)
        self._ready = Ready(self.model, cfg, slots)
        self._cache: Any = None
        self._passes: Any = None
        self.num_forwards = self.num_tokens_computed = self.num_proposed = self.num_accepted = 0

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Every question must say something and leave room for an answer, else DataError for the first."""
        _base.refuse_empty(prompts)
        sizes = [len(self.chat.context(prompt.text, ())) for prompt in prompts]
        long = [place for place, size in enumerate(sizes) if size >= self.longest]
        if long:
            raise DataError(
                f"prompt {prompts[long[0]].id}, '{_beginning(prompts[long[0]].text)}'",
                f"It has {sizes[long[0]]} tokens with its template, and the model takes {self.longest}. "
                f"{len(long)} of {len(prompts)} prompts are too long.",
                "Drop or shorten such prompts, or use a model with a longer context.",
            )

    def run(
        self,
        prompts: Sequence[Prompt],
        generate: Generate,
        on_draft: Callable[[Draft], None] = lambda draft: None,
        on_tokens: Callable[[Sequence[int]], None] = lambda token_ids: None,
    ) -> list[Attempt]:
        """Run a strategy over all prompts; attempts come back in the order of the prompts.

        `on_tokens` is told whenever a draft grew what it has so far, for somebody who reads along with a single one.
        """
        self._on_tokens = on_tokens

        def work() -> list[Attempt]:
            with torch.inference_mode(), _base.few_collections(), self._ready.opened() as (cache, passes):
                self._cache, self._passes = cache, passes
                return asyncio.run(self._run(prompts, generate, on_draft))

        return _base.outside_loops(work)

    async def _run(
        self, prompts: Sequence[Prompt], generate: Generate, on_draft: Callable[[Draft], None]
    ) -> list[Attempt]:
        self._slots = [Slot() for _ in range(self.num_slots)]
        self._flying: list[Launched] = []
        self._queue: list[tuple[tuple[int, int], Request]] = []  # earlier prompts first: later turns before new ones
        self._on_draft = on_draft
        self._answers: defaultdict[int, dict[tuple[int, ...], Draft]] = defaultdict(dict)  # greedy ones, by prompt
        self._proposer = Proposer(_propose.COSTS.get(kind_of(self._cache), _propose.NO_SAVING))
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
                    self._answers.pop(order, None)
        finally:
            for task in live.values():
                task.cancel()
            self._cache = self._passes = None
        return [Attempt(prompt, tuple(drafts[order])) for order, prompt in enumerate(prompts)]

    def _sampler(self, order: int) -> Callable[[Prompt, Sequence[Draft]], Any]:
        calls = 0

        async def sample(prompt: Prompt, shown: Sequence[Draft], request: str = "", kind: Kind = "answer") -> Draft:
            nonlocal calls
            index, calls = calls, calls + 1
            context = self.chat.context(prompt.text, shown, request, kind)
            space = self.longest - len(context)
            most = self.max_new_tokens + self._passes.burst - 1  # a burst may go on behind the last possible token
            asked = Request(
                order=(order, index),
                context=context,
                parents=tuple(draft.index for draft in shown),
                turn=_base.next_turn(shown, kind),
                kind=kind,
                request=request,
                space=space,
                most=min(self.max_new_tokens, space),
                uniforms=sampling.uniforms(self.seed, f"{prompt.id}/{index}", most),
                done=asyncio.get_running_loop().create_future(),
                copying=self._copying([draft for draft in shown if draft.kind == kind]),
            )
            heapq.heappush(self._queue, (asked.order, asked))
            return await asked.done

        return sample

    def _copying(self, shown: Sequence[Draft]) -> Copying:
        """A new draft is guessed from those of its kind: an answer is no critique's copy."""
        drafts = [draft.token_ids for draft in shown] if self.speculate else []
        return Copying(_propose.begin(drafts, self._ends))

    def _admit(self) -> None:
        """Give free slots to waiting requests."""
        if self._queue and (free := [row for row, slot in enumerate(self._slots) if slot.request is None]):
            self._fill(free)
        if not self._queue and not self._cache.native:
            self._compact()

    def _fill(self, free: list[int]) -> None:
        """The first requests into these slots. Siblings with one context wait until it is computed for the first of
        them, greedy ones of a prompt until that is done."""
        budget, is_greedy = PREFILL_TOKENS, self.cfg.temperature == 0
        running = [slot.request for slot in self._slots if slot.request]
        contexts = {request.context for request in running if not request.token_ids}
        greedy = {(request.order[0], request.context) for request in running if is_greedy}
        waiting: list[Request] = []
        if not self._flying and not any(slot.ids for slot in self._slots):
            self._compute_template()
        held = Held(self._slots)
        while self._queue and free and budget > 0:
            _, request = heapq.heappop(self._queue)
            if len(request.context) >= self.longest:
                self._finish(request, "context")
            elif known := self._answers[request.order[0]].get(request.context):
                self._repeat(request, known)
            elif request.context in contexts or (request.order[0], request.context) in greedy:
                waiting.append(request)
            else:
                mine = held.of(request.order[0])
                row = next((r for r in mine if self._slots[r].request is None), free[0])
                free.remove(row)
                self._take_over(row, request, held, mine)
                contexts.add(request.context)
                budget -= len(request.context) - request.cached
        for request in waiting:
            heapq.heappush(self._queue, (request.order, request))

    def _take_over(self, row: int, request: Request, held: Held, mine: list[int]) -> None:
        """Put a request into a slot, with as much of its context as its prompt's slots hold, or for a new one any."""
        slot, wanted = self._slots[row], list(request.context[:-1])
        own, donor, best = held.longest_shared(wanted, row, mine)
        if best > own:
            self._cache.copy(donor, row, own, best)
        slot.ids = wanted[:best]
        slot.prompt, slot.request, request.cached = request.order[0], request, best
        held.changed(row)

    def _step(self) -> None:
        """Start a forward pass, and take what an earlier one gave: this one too, where passes do not overlap."""
        running = [row for row, slot in enumerate(self._slots) if slot.request is not None]
        flying = {row for launched in self._flying for row in launched.rows}
        halves = self._passes.overlaps and len(running) >= OVERLAP
        rows = [row for row in running if row not in flying][: -(-len(running) // 2) if halves else None]
        if rows:
            self._flying.append(self._launch(rows))
        while len(self._flying) > (1 if halves and rows else 0):
            launched = self._flying.pop(0)
            (tokens, logprobs), first = launched.pending(), 0
            for row, guess in zip(launched.rows, launched.guesses, strict=True):
                last = first + launched.steps + len(guess)
                self._take(row, guess, tokens[first:last], logprobs[first:last])
                first = last

    def _launch(self, rows: list[int]) -> Launched:
        """One forward pass: feed what each slot has not seen yet and a guess behind it."""
        running = [self._slots[row].running for row in rows]
        sizes = [len(request.token_ids) for request in running]
        most = min(self._passes.burst, min([r.space - size for r, size in zip(running, sizes, strict=True)]))
        rooms = [request.most - size - 1 for request, size in zip(running, sizes, strict=True)]
        guesses, steps = self._proposer.propose([request.copying for request in running], rooms, most)
        fed, spans, numbers = list[int](), list[Span](), list[np.ndarray]()
        for row, request, size, guess in zip(rows, running, sizes, guesses, strict=True):
            start, more = len(self._slots[row].ids), len(guess)
            new = request.token_ids[-1:] or request.context[start:]
            fed += new
            fed += guess
            spans.append(Span(row, start, len(new) + more, 1 + more))
            numbers.append(request.uniforms[size : size + steps + more])
        uniforms = np.concatenate(numbers).reshape((-1, steps) if steps > 1 else -1)
        self.num_forwards += steps
        self.num_tokens_computed += len(fed) + (steps - 1) * len(rows)
        return Launched(rows, guesses, steps, self._passes.start(fed, spans, uniforms))

    def _compute_template(self) -> None:
        """What the first contexts of a run have in common, once: all slots will take it from the first one."""
        contexts = sorted(request.context[:-1] for _, request in self._queue if len(request.context) < self.longest)
        if len(contexts) > 1 and (size := shared([*contexts[0]], [*contexts[-1]])) >= TEMPLATE_TOKENS:
            self._slots[0].ids = [*contexts[0][:size]]
            self._passes.start(self._slots[0].ids, [Span(0, 0, size, 1)], np.empty(0))
            self.num_forwards += 1
            self.num_tokens_computed += size

    def _take(self, row: int, guess: tuple[int, ...], tokens: list[int], logprobs: list[float]) -> None:
        """Append sampled tokens up to the first that was not guessed. What was fed behind it will be overwritten."""
        slot = self._slots[row]
        request = slot.running
        if guess:
            accepted = _propose.num_equal(guess, tokens)
            self._proposer.learn(request.copying, accepted, len(guess))
            self.num_proposed += len(guess)
            self.num_accepted += accepted
            tokens = tokens[: accepted + 1]
        room, reason = request.most - len(request.token_ids), None
        tokens = tokens[:room]
        if not self._ends.isdisjoint(tokens):
            reason = "stop"
            tokens = tokens[: 1 + next(place for place, token in enumerate(tokens) if token in self._ends)]
        elif len(tokens) == room:
            reason = "length" if request.most == self.max_new_tokens else "context"
        slot.ids += request.token_ids[-1:] or request.context[len(slot.ids) :]
        slot.ids += tokens[:-1]
        request.token_ids += tokens
        request.logprobs += logprobs[: len(tokens)]
        self._on_tokens(request.token_ids)
        if reason:
            slot.request = None
            self._finish(request, reason)
        elif request.copying.pointer.source:
            request.copying.pointer = request.copying.pointer.follow(request.token_ids, len(tokens))

    def _repeat(self, request: Request, known: Draft) -> None:
        """Answer as the same context was answered."""
        request.token_ids, request.logprobs = [*known.token_ids], [*known.sampler_logprobs]
        request.cached = len(request.context)
        self._on_tokens(request.token_ids)
        self._finish(request, known.finish_reason)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        draft = Draft(
            index=request.order[1],
            turn=request.turn,
            parents=request.parents,
            text=self.chat.decode(request.token_ids),
            token_ids=tuple(request.token_ids),
            sampler_logprobs=tuple(request.logprobs),
            finish_reason=reason,
            prompt_tokens=len(request.context),
            cached_tokens=request.cached,
            kind=request.kind,
            request=request.request,
        )
        if self.cfg.temperature == 0:
            self._answers[request.order[0]][request.context] = draft
        self._on_draft(draft)
        request.done.set_result(draft)

    def _compact(self) -> None:
        """Move running drafts to the first slots, so that a shrinking batch costs less."""
        busy = [row for row, slot in enumerate(self._slots) if slot.request is not None]
        holes = [row for row in range(len(busy)) if self._slots[row].request is None]
        for hole, row in zip(holes, reversed(busy), strict=False):
            self._cache.swap(hole, row, max(len(self._slots[hole].ids), len(self._slots[row].ids)))
            self._slots[hole], self._slots[row] = self._slots[row], self._slots[hole]


def _beginning(text: str) -> str:
    """The first words of a prompt, by which it can be found where its id is a hash."""
    words = " ".join(text.split())
    return words if len(words) <= BEGINNING else f"{words[:BEGINNING]}..."


async def _settle() -> None:
    """Let every coroutine that can go on do so; gathered siblings need one more round."""
    for _ in range(4):
        await asyncio.sleep(0)
