"""What the engines have in common: the strategy they run, and how a caller waits for them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from upturn.errors import DataError
from upturn.types import Draft, Kind, Prompt

T = TypeVar("T")
Generate = Callable[[Prompt, Any], Coroutine[Any, Any, list[Draft]]]


def next_turn(shown: Sequence[Draft], kind: Kind) -> int:
    """The turn of a draft that is shown these: a critique belongs to the turn of the answer before it."""
    last = max((draft.turn for draft in shown), default=0)
    return max(last, 1) if kind == "critique" else last + 1


def refuse_empty(prompts: Sequence[Prompt]) -> None:
    """Every question must say something, else DataError for the first."""
    if empty := [prompt.id for prompt in prompts if not prompt.text.strip()]:
        raise DataError(f"prompt {empty[0]}", "It is empty.", "Ask something.")


def outside_loops(work: Callable[[], T]) -> T:
    """The result of work that starts an event loop, also where one is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@contextmanager
def few_collections() -> Iterator[None]:
    """Collect only what is made within: to look through all modules and models again stops a run for 0.2 s."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
