"""What the engine works on: drafts that were asked for, and what each slot holds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
    uniforms: Any = field(compare=False)
    done: asyncio.Future[Draft] = field(compare=False)
    copying: Copying = field(compare=False)
    cached: int = field(compare=False, default=0)
    token_ids: list[int] = field(compare=False, default_factory=list)
    logprobs: list[float] = field(compare=False, default_factory=list)

    def next_uniforms(self, steps: int) -> Any:
        """The numbers that choose the next tokens; behind the last possible token, which nobody reads, the last one."""
        first = len(self.token_ids)
        found = self.uniforms[first : first + steps]
        missing = steps - len(found)
        return np.append(found, self.uniforms[-1:].repeat(missing)) if missing else found

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
