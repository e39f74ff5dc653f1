"""Speculation from the drafts shown: which tokens a refinement probably writes next, and how many are worth a try.

A refinement copies much of the draft that it was shown, so that draft's next tokens are a free guess at its own. The
place to copy from is followed by alignment, and found again after a miss by the longest suffix of the output
(SuffixDecoding, arXiv:2411.04975, looks for suffixes in a tree of all texts; a draft is short enough for a scan).
Everything here is a pure function of token ids and counts.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

BREAK = -1
"""Ends each draft in the source; no token has this id."""
LONGEST = 6
"""Tokens of the output's end that are compared."""
NEAR = 24
"""A single equal token counts only within so many places of the pointer."""
START = -1
"""`matched` before the first token."""
SURE = 3
"""So many equal tokens are as good as more of them."""
HOPE = 0.8
"""Chance that a proposed token is accepted, before anything is known: high, so that it is tried."""
WEIGHT = 8
"""How many judged tokens a chance that is only expected is worth."""
MOST = 8
"""Most proposed tokens of a step, in fixed costs: beyond, the fixed cost is less than an eighth of the whole."""


class Pointer(NamedTuple):
    """Where in the drafts shown the output seems to be."""

    source: tuple[int, ...] = ()
    """The drafts, oldest first, each closed by `BREAK`. End tokens are left out: the token behind the last proposed
    one is sampled anyway."""
    place: int = 0
    """`source[place]` is expected next."""
    matched: int = START
    """Tokens before `place` that equal the output's last ones; 0 where a token is thought to be replaced."""

    def proposal(self, count: int) -> tuple[int, ...]:
        """At most `count` tokens that may come next, none from beyond the draft."""
        ahead = self.source[self.place : self.place + count]
        return ahead[: ahead.index(BREAK)] if BREAK in ahead else ahead

    def follow(self, output: Sequence[int], new: int = 1) -> Pointer:
        """The pointer after the output grew by its last tokens, so many `new` ones.

        The expected token moves it on. After another one it goes where the longest end of the output stands in the
        source, of equally long ones to the nearest; where none does, the new token is taken for a replacement.
        """
        source, place, matched = self
        if not source:
            return self
        for size in range(len(output) - new + 1, len(output) + 1):
            expected, token = source[place], output[size - 1]
            if expected == token:  # the last place is a BREAK, so the pointer never leaves the source
                place, matched = place + 1, max(matched, 0) + 1
            elif token in source and (found := _found(source, place, output[:size])):
                place, matched = found
            else:
                place, matched = place + (expected != BREAK), 0
        return Pointer(source, place, matched)


def begin(drafts: Sequence[Sequence[int]], end_ids: Collection[int]) -> Pointer:
    """The pointer of a new output: at the start of the last draft shown."""
    bodies = [[token for token in draft if token not in end_ids] + [BREAK] for draft in drafts]
    return Pointer(tuple(chain.from_iterable(bodies)), sum(map(len, bodies[:-1])))


def _found(source: Sequence[int], place: int, output: Sequence[int]) -> tuple[int, int] | None:
    """Where the longest end of the output stands in the source, and its length, at most `LONGEST`."""
    end, found = 0, list[tuple[int, int, int]]()
    for _ in range(source.count(output[-1])):
        end = source.index(output[-1], end) + 1
        agreed = num_equal(source[max(0, end - LONGEST) : end][::-1], output[-LONGEST:][::-1])
        if agreed > 1 or abs(end - place) <= NEAR:
            found.append((agreed, -abs(end - place), end))
    if not found:
        return None
    agreed, _, end = max(found)
    return end, agreed


@dataclass(frozen=True, slots=True)
class Cost:
    """What a forward pass costs besides its tokens, in tokens. Measured by benchmarks/verify_cost.py."""

    fixed: float
    """To read the weights once, and to start every operation."""
    row: float
    """For the keys and values of one slot."""
    pad: float
    """For a query that pads a shorter guess to the longest one."""


COSTS = {
    "cpu": Cost(fixed=32, row=0.4, pad=0.3),
    "tiles": Cost(fixed=40, row=0.6, pad=0),
    "vectors": Cost(fixed=8, row=0.2, pad=0),
    "cuda": Cost(fixed=256, row=0, pad=0.3),
    "graphs": Cost(fixed=720, row=8, pad=0),
}
"""By device, from SmolLM2-135M with 256 tokens a slot; `tiles` and `vectors` are a CPU where our own products run.

- cpu: bfloat16 on one core with instructions for it and no tiles, measured 37, 0.57 and 0.18. The first two are rounded
  to the cautious side; `pad` 0.3 did better on recorded chains, where a single long guess promised more than it kept.
- tiles: bfloat16 on two threads with AMX, measured 74, 0.91 and 0.05 in one hour, and 42, 0.67 and 0 in another one
  when tiles were slow. By passes and tokens counted, 32 to 48 is the best at both prices, with 8 and with 64 slots.
- vectors: two threads with AVX2, measured 6.7, 0.13 and 0 in bfloat16, 9.7, 0.34 and 0 in float32: tokens are dear.
  With AVX-512 and its bfloat16: 7.7 to 9.3, 0.14 to 0.19 and 0.
- cuda: not measured; an H100 is bound by memory up to some 300 tokens.
- graphs: bfloat16 on an H200. A pass of 128 tokens takes 1.07 ms there, one of 512 takes 1.55; a row is what the
  program does for each draft between two passes, some 10 microseconds.
"""
NO_SAVING = Cost(fixed=0, row=0, pad=0)
"""Of a device that nobody measured: nothing is ever proposed."""


def allot(chances: Sequence[float], limits: Sequence[int], cost: Cost, most: int) -> list[int]:
    """How many tokens to propose for each row of a step, at most `limits` each and `most` in all.

    With chance `p` per token, the first `k` proposals of a row bring `p + p^2 + ... + p^k` tokens, and a step of `B`
    rows brings one token a row besides. So the step emits

        (B + sum over rows of p + ... + p^k) / (fixed + row * B + B + sum over rows of k)

    tokens per unit of cost. The k-th proposal of a row adds `p^k` above and 1 below, so it raises the quotient exactly
    while `p^k` is greater than it. These gains only fall along a row: to take the best remaining one as long as it
    pays gives the maximum. One row proposes much at little hope, a full batch only what is nearly certain.

    All rows are padded to the longest guess, so guesses are cut to the length at which the quotient is greatest with
    `pad` for every padded query. Context that is computed in the same step is left out: it costs the same whatever is
    proposed.
    """
    counts = _best(chances, limits, cost, most)
    if cost.pad == 0:  # then every cut lowers the quotient
        return counts
    cuts = ([min(count, longest) for count in counts] for longest in range(max(counts, default=0) + 1))
    return max(cuts, key=lambda cut: rate(chances, cut, cost))


def _best(chances: Sequence[float], limits: Sequence[int], cost: Cost, most: int) -> list[int]:
    """What `allot` does before it cuts: all gains that are greater than the quotient which they make together."""
    batch = len(chances)
    spent, top = cost.fixed + (cost.row + 1) * batch, max(chances, default=0.0)
    bar = batch / spent if spent else 1.0  # it only rises: the gains that are still greater than it are looked at again
    longest = min(max(limits, default=0), int(math.log(bar) / math.log(top)) + 1 if 0 < bar < top < 1 else 0)
    if longest <= 0:
        return [0] * batch
    gains = np.multiply.accumulate(np.repeat(np.array(chances)[:, None], longest, axis=1), axis=1)
    gains *= np.arange(longest) < np.array(limits)[:, None]
    before, taken = -1, gains > bar
    while (count := np.count_nonzero(taken)) != before:
        before, bar = count, (batch + gains[taken].sum()) / (spent + count)
        taken &= gains > bar
    if count > most:
        rows, _ = taken.nonzero()
        order = np.argsort(-gains[taken], kind="stable")  # of equal gains the first row's
        return np.bincount(rows[order[:most]], minlength=batch).tolist()
    return taken.sum(axis=1).tolist()


def rate(chances: Sequence[float], counts: Sequence[int], cost: Cost) -> float:
    """Tokens that a step is expected to emit per unit of cost, with padding."""
    batch, proposed = len(counts), sum(counts)
    emitted = sum([(1 - p ** (k + 1)) / (1 - p) if k else 1.0 for p, k in zip(chances, counts, strict=True)])
    padded = batch * max(counts, default=0) - proposed
    return emitted / (cost.fixed + (cost.row + 1) * batch + proposed + cost.pad * padded) if batch else 0.0


def burst_rate(batch: int, steps: int, cost: Cost) -> float:
    """The same for so many passes in a row without proposals, each with what the one before it chose."""
    return steps * batch / (steps * (cost.fixed + batch) + cost.row * batch) if batch else 0.0


@dataclass(slots=True)
class Tally:
    """Proposed tokens so far: how many were judged, and how many of those were accepted."""

    accepted: int = 0
    judged: int = 0

    def add(self, accepted: int, proposed: int) -> None:
        """Count one proposal. What stands behind its first miss was not judged."""
        self.accepted += accepted
        self.judged += min(accepted + 1, proposed)

    def chance(self, expected: float) -> float:
        """Share accepted, begun at what is expected, with the weight of `WEIGHT` tokens."""
        return (self.accepted + WEIGHT * expected) / (self.judged + WEIGHT)


@dataclass(slots=True)
class Copying:
    """What one running draft has copied so far."""

    pointer: Pointer
    tally: Tally = field(default_factory=Tally)
    _breaks: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._breaks = [place for place, token in enumerate(self.pointer.source) if token == BREAK]

    def ahead(self, most: int) -> int:
        """How many tokens a proposal may have: `len(self.pointer.proposal(most))`."""
        place = self.pointer.place
        return min(most, self._breaks[bisect_left(self._breaks, place)] - place) if self._breaks else 0


class Proposer:
    """Proposes for the drafts of a run, and learns how often that works. It counts and never looks at a clock."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self._tallies = defaultdict[int, Tally](Tally)

    def propose(
        self, drafts: Sequence[Copying], rooms: Sequence[int], steps: int = 1
    ) -> tuple[list[tuple[int, ...]], int]:
        """What each draft may go on with, at most so many tokens and often nothing, and how many passes to run in a
        row: up to `steps`, where that promises more than to propose."""
        none = [()] * len(drafts)
        if not any([draft.pointer.source for draft in drafts]):
            return none, steps
        expected = {matched: self._tallies[matched].chance(HOPE) for matched in range(START, SURE + 1)}
        chances = [draft.tally.chance(expected[min(draft.pointer.matched, SURE)]) for draft in drafts]
        limits = [draft.ahead(room) for draft, room in zip(drafts, rooms, strict=True)]
        counts = allot(chances, limits, self.cost, round(MOST * self.cost.fixed))
        if steps > 1 and burst_rate(len(drafts), steps, self.cost) > rate(chances, counts, self.cost):
            return none, steps
        return [draft.pointer.proposal(count) if count else () for draft, count in zip(drafts, counts, strict=True)], 1

    def learn(self, draft: Copying, accepted: int, proposed: int) -> None:
        """What became of a proposal, told before the pointer moves on."""
        draft.tally.add(accepted, proposed)
        self._tally(draft).add(accepted, proposed)

    def _tally(self, draft: Copying) -> Tally:
        """Of all proposals made behind as many equal tokens."""
        return self._tallies[min(draft.pointer.matched, SURE)]


def num_equal(guess: Sequence[int], chosen: Sequence[int]) -> int:
    """How many tokens agree before the first that does not."""
    for place, (one, other) in enumerate(zip(guess, chosen, strict=False)):
        if one != other:
            return place
    return min(len(guess), len(chosen))
