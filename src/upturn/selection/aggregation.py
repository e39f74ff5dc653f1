"""A right answer as what should be made of several others: Aggregation Fine-Tuning (AFT, arXiv:2501.11877).

With `direct` it is the hybrid of GSR (arXiv:2509.00084), which keeps the model answering by itself. Both papers take
their targets from a stronger model; here the target is one of the model's own answers, which the verifier found right.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from upturn._model import Strict
from upturn.selection._base import Key, Selection, collect, judged, text
from upturn.types import Attempt, Draft, Group


class Config(Strict):
    """How many answers are shown."""

    proposals: int = Field(default=4, ge=1)
    """The first so many direct answers are shown, right or wrong, cut or not."""
    direct: bool = False
    """Whether the target is learnt as a direct answer, too."""


def uses_right(cfg: Config) -> bool:
    """Always."""
    return True


def select(attempts: list[Attempt], cfg: Config, key: Key = text) -> Selection:
    """A group of each scored attempt: the proposals, and the first right complete draft behind them at turn 2.

    Only direct answers take part. The target's ids are as they were sampled, and so is what the sampler told of it,
    although it was sampled without the proposals.

    Dropped: 'too few drafts', 'no score' (none behind the proposals), 'no right draft', 'cut' (all right ones).
    """
    return collect(attempts, lambda attempt: _choose(attempt, cfg))


def _choose(attempt: Attempt, cfg: Config) -> list[Group] | str:
    answers = [draft for draft in attempt.drafts if not draft.parents]
    proposals, rest = answers[: cfg.proposals], answers[cfg.proposals :]
    if not rest:
        return "too few drafts"
    scores = judged(attempt)
    scored = [draft for draft in rest if draft.index in scores]
    if not scored:
        return "no score"
    right = [draft for draft in scored if scores[draft.index].right]
    if not right:
        return "no right draft"
    complete = [draft for draft in right if draft.complete]
    return [_group(attempt, proposals, complete[0], cfg)] if complete else "cut"


def _group(attempt: Attempt, proposals: list[Draft], target: Draft, cfg: Config) -> Group:
    taken = [*proposals, target, *([target] if cfg.direct else [])]
    score = dict(zip((draft.index for draft in attempt.drafts), attempt.scores, strict=True))
    drafts = [replace(draft, index=place) for place, draft in enumerate(taken)]
    shown = tuple(range(len(proposals)))
    drafts[len(proposals)] = replace(drafts[len(proposals)], turn=2, parents=shown)
    values = (*[None] * len(proposals), *[1.0] * (len(taken) - len(proposals)))
    return Group(Attempt(attempt.prompt, tuple(drafts), tuple(score[draft.index] for draft in taken)), values)
