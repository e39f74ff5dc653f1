"""What a strategy is given: the ability to ask the model, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from upturn.types import Draft, Kind, Prompt


class Sampler(Protocol):
    """Asks the model for one draft.

    A strategy file holds `Config` (a strict, frozen pydantic model with `turns`, the number of drafts for a
    prompt; where that number is another, a property `num_drafts` tells it) and
    `async generate(prompt, sample, cfg) -> list[Draft]`, which gives all drafts in the order of their indices, so
    that each draft's index is its place in the list.
    """

    async def __call__(self, prompt: Prompt, shown: Sequence[Draft], request: str = "", kind: Kind = "answer") -> Draft:
        """A new draft, by a model that sees the prompt and these earlier drafts in this order.

        `request` is what the user says behind the last of them; empty for the task's own request to refine. A critique
        belongs to the turn of the answer that it is about.

        The draft's `index` counts the calls, its `parents` are the indices of the drafts shown, its `turn` is
        one more than the highest turn shown (1 where none is). Calls that wait together make one batch.
        """
        ...


def num_drafts(cfg: Any) -> int:
    """How many drafts a strategy with this config asks for, at most, for each prompt: `num_drafts`, else `turns`."""
    return getattr(cfg, "num_drafts", cfg.turns)
