"""The pydantic base of every config: strict about keys, frozen, documented fields."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

FEW = 3
"""Problems of a file that are told; the rest are counted."""


class Strict(BaseModel):
    """Unknown keys are errors; values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def problems(error: ValidationError | UnicodeDecodeError) -> str:
    """What is wrong with a file that is read into a model, in one line: 'turns: Field required; seed: ...'."""
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    found = [_problem(one["loc"], one["msg"]) for one in error.errors(include_url=False)]
    more = f"; and {len(found) - FEW} more" if found[FEW:] else ""
    return "; ".join(found[:FEW]) + more


def _problem(place: tuple[int | str, ...], what: str) -> str:
    return f"{'.'.join(map(str, place))}: {what}" if place else what
