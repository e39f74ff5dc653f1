"""What the engine works on: drafts that were asked for, and what each slot holds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from upturn.engines._propose import Copying
from upturn.types import Draft, Kind

NOTHING = -1
"""Behind what a slot holds; no token has this id."""


@dataclass(slots=True)
class Request:
    """One draft: as it was asked for, and as far as it has come."""

    order: tuple[int, int]
    """(prompt, draft)."""
    context: tuple[int, ...]
    parents: tuple[int, ...]
    turn: int
    kind: Kind
    request: str
    space: int
    """Tokens that fit into the model behind the context."""
    most: int
    """Tokens that the draft may get."""
    uniforms: np.ndarray
    """The numbers that choose its tokens."""
    done: asyncio.Future[Draft]
    copying: Copying
    cached: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


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


class Held:
    """What slots hold, while it changes only with what is told: searched many times in a row."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._prompts = [slot.prompt for slot in slots]
        self._columns: dict[int, list[int]] = {}

    def of(self, prompt: int) -> list[int]:
        """The slots of a prompt."""
        return places(self._prompts, prompt)

    def longest_shared(self, wanted: list[int], row: int, mine: Sequence[int]) -> tuple[int, int, int]:
        """How many of the tokens wanted a slot holds, and which slot holds most of them, and how many: of some slots,
        or of all that go on as wanted."""
        own = best = shared(self._slots[row].ids, wanted)
        donor, other = row, -1
        if mine == [row]:
            return own, row, own
        while best < len(wanted) and (other := self._next(other, best, wanted[best], mine)) >= 0:
            if (size := shared(self._slots[other].ids, wanted)) > best:
                donor, best = other, size
        return own, donor, best

    def changed(self, row: int) -> None:
        """A slot holds something else."""
        slot = self._slots[row]
        self._prompts[row] = slot.prompt
        for place, column in self._columns.items():
            column[row] = slot.ids[place] if place < len(slot.ids) else NOTHING

    def _next(self, row: int, place: int, token: int, mine: Sequence[int]) -> int:
        """The first slot behind this one that has a token at a place, -1 where there is none."""
        if mine:
            ids = ((other, self._slots[other].ids) for other in mine if other > row)
            return next((other for other, held in ids if held[place : place + 1] == [token]), -1)
        if place not in self._columns:
            held = [slot.ids for slot in self._slots]
            self._columns[place] = [ids[place] if place < len(ids) else NOTHING for ids in held]
        try:
            return self._columns[place].index(token, row + 1)
        except ValueError:
            return -1


def places(values: Sequence[int], value: int) -> list[int]:
    """Where a value stands."""
    found = list[int]()
    for _ in range(values.count(value)):
        found.append(values.index(value, found[-1] + 1 if found else 0))
    return found
