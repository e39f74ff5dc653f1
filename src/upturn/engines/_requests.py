"""What the engine works on: drafts that were asked for, and what each slot holds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from upturn.engines._propose import Copying
from upturn.types import Draft, Kind


@dataclass(order=True, slots=True)
class Request:
    """One draft: as it was asked for, and as far as it has come."""

    order: tuple[int, int]
    """(prompt, draft): earlier prompts first, so later turns come before new prompts."""
    context: tuple[int, ...] = field(compare=False)
    parents: tuple[int, ...] = field(compare=False)
    turn: int = field(compare=False)
    kind: Kind = field(compare=False)
    request: str = field(compare=False)
    space: int = field(compare=False)
    """Tokens that fit into the model behind the context."""
    most: int = field(compare=False)
    """Tokens that the draft may get."""
    uniforms: list[float] = field(compare=False)
    """The numbers that choose its tokens; behind the last possible token, which nobody reads, the last one again."""
    done: asyncio.Future[Draft] = field(compare=False)
    copying: Copying = field(compare=False)
    cached: int = field(compare=False, default=0)
    token_ids: list[int] = field(compare=False, default_factory=list)
    logprobs: list[float] = field(compare=False, default_factory=list)

    def behind(self, start: int) -> list[int]:
        """Context and answer so far from a place on, without looking at all of them."""
        skipped = start - len(self.context)
        return self.token_ids[skipped:] if skipped >= 0 else [*self.context[start:], *self.token_ids]


@dataclass(slots=True)
class Slot:
    """A place in the batch, and in the cache."""

    prompt: int = -1
    ids: list[int] = field(default_factory=list)
    """Tokens whose keys and values are in the cache."""
    request: Request | None = None

    @property
    def running(self) -> Request:
        """The request, of a slot that has one."""
        assert self.request is not None
        return self.request


def shared(ids: list[int], wanted: list[int]) -> int:
    """Length of the common prefix, by halving: comparing slices is much faster than comparing numbers."""
    low, high = 0, min(len(ids), len(wanted))
    if ids[:high] == wanted[:high]:
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if ids[low:middle] == wanted[low:middle] else (low, middle)
    return low


def longest_shared(held: Iterable[tuple[int, list[int]]], wanted: list[int], best: int) -> tuple[int, int]:
    """Which list has more than `best` of what is wanted at its beginning, and how much: of those that have most the
    first one. -1 where none has more."""
    donor, end = -1, len(wanted)
    for other, ids in held:
        if best < end and len(ids) > best and ids[best] == wanted[best] and (size := shared(ids, wanted)) > best:
            donor, best = other, size
    return donor, best


def places(values: Sequence[int], value: int) -> list[int]:
    """Where a value stands."""
    found = list[int]()
    for _ in range(values.count(value)):
        found.append(values.index(value, found[-1] + 1 if found else 0))
    return found
