"""What every selection rule gives: examples to learn from, and an account of everything that made none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from upturn.types import Attempt, Draft, Example, Group, Pair, Prompt, Score

REASONS = {
    "no score": "without a score",
    "cut": "where a draft that it takes was cut at the length limit",
    "low": "whose best draft scores below min_chosen",
    "one draft": "with a single draft, and none to compare it with",
    "tied": "whose drafts are tied",
    "margin": "whose scores differ by less than the margin",
    "same text": "whose drafts read the same",
    "no further draft": "without a further draft",
    "too few drafts": "with too few drafts",
    "no answer": "with no final answer in the last drafts",
    "disagree": "whose last drafts disagree",
    "all right": "whose drafts are all right",
    "all wrong": "whose drafts are all wrong",
    "none right": "with no right draft",
    "no right draft": "with no right draft",
    "nothing refined": "where no draft was refined",
    "no flip": "where no refinement turned wrong to right, or right to wrong, as asked for",
    "no critique": "without a critique by the scorer",
}
"""Why prompts make no example, as it goes on behind their number; an own rule's reason stands for itself."""
Key = Callable[[Prompt, str], str]
"""Prompt and answer -> the canonical final answer, as in `Task.vote_key`."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The outcome of a rule.

    A selection file holds `Config` (a strict, frozen pydantic model) and
    `select(attempts, cfg, key=text) -> Selection`; one that asks which drafts are right, and not only what scores they
    have, says so by `uses_right(cfg) -> bool`. Each attempt offers a rule a fixed number of slots (1, or
    `pairs_per_prompt`). Each slot becomes an example, which is a pair or a group of drafts, or is counted in `dropped`,
    so that `len(examples) + sum(dropped.values()) == len(attempts) * slots`.
    """

    examples: Sequence[Example]
    dropped: dict[str, int]
    """Reason -> slots without an example."""
    set_aside: dict[str, int]
    """Reason -> drafts that could not be chosen: 'cut' (not complete), 'no score' (NaN)."""

    @property
    def pairs(self) -> list[Pair]:
        """The examples that are pairs."""
        return [example for example in self.examples if isinstance(example, Pair)]


@dataclass(frozen=True, slots=True)
class Quality:
    """What a rule's labels are worth; both NaN where there is no pair."""

    label_precision: float
    """Share of the pairs whose chosen draft is right and whose rejected draft is wrong. Pairs do not tell whether a
    verifier judged: where none did, no draft is right, the share is 0, and a study leaves it out."""
    chosen_earlier: float
    """Share of the pairs whose chosen draft has the lower turn: the chain made it worse."""


def text(prompt: Prompt, answer: str) -> str:
    """The simplest key: the answer without outer white space."""
    return answer.strip()


def label_precision(pairs: list[Pair]) -> Quality:
    """How often the labels are true by the verifier, and how often the chosen draft came first."""
    if not pairs:
        return Quality(math.nan, math.nan)
    true = sum(pair.chosen_right and not pair.rejected_right for pair in pairs)
    earlier = sum(pair.chosen.turn < pair.rejected.turn for pair in pairs)
    return Quality(true / len(pairs), earlier / len(pairs))


def collect(attempts: list[Attempt], choose: Callable[[Attempt], Sequence[Example] | str], slots: int = 1) -> Selection:
    """Apply a rule to each attempt: it gives 1 to `slots` examples, or the reason why there is none."""
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    set_aside: Counter[str] = Counter()
    for attempt in attempts:
        chosen = choose(attempt)
        if isinstance(chosen, str):
            dropped[chosen] += slots
        else:
            examples += chosen
            dropped["no further draft"] += slots - len(chosen)
        set_aside["cut"] += sum(not draft.complete for draft in attempt.drafts)
        set_aside["no score"] += sum(math.isnan(score.value) for score in attempt.scores)
    return Selection(examples, dict(+dropped), dict(+set_aside))


def why_none(dropped: Mapping[str, int], num_attempts: int) -> str:
    """How many attempts gave no example, by reason, where none gave one: all slots of an attempt share its reason."""
    slots = max(1, sum(dropped.values()) // max(1, num_attempts))
    return ", ".join(f"{count // slots} {REASONS.get(reason, reason)}" for reason, count in dropped.items())


def same(one: Draft, other: Draft) -> bool:
    """Whether two drafts read the same; such drafts make no pair."""
    return one.text.strip() == other.text.strip()


def pair(attempt: Attempt, chosen: Draft, rejected: Draft, p: float = 1.0) -> Pair:
    """A pair of an attempt's drafts, with the verifier's word on both where they were scored."""
    scores = attempt.scores or [Score(0.0, False)] * len(attempt.drafts)
    better, worse = scores[chosen.index], scores[rejected.index]
    return Pair(attempt.prompt, chosen, rejected, p, better.right, worse.right, better.critique, worse.critique)


def judged(attempt: Attempt) -> dict[int, Score]:
    """The scores by index of their drafts, without those whose value is no finite number."""
    scored = zip(attempt.drafts, attempt.scores, strict=True)
    return {draft.index: score for draft, score in scored if math.isfinite(score.value)}


def group(attempt: Attempt, values: Mapping[int, float]) -> Group:
    """The attempt with a value for each index that learns; all other drafts are only shown."""
    return Group(attempt, tuple(values.get(draft.index) for draft in attempt.drafts))


def distinct(drafts: Iterable[Draft]) -> list[Draft]:
    """The first draft of each text."""
    first: dict[str, Draft] = {}
    for draft in drafts:
        first.setdefault(draft.text.strip(), draft)
    return list(first.values())
