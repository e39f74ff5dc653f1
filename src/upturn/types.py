"""The nouns that cross rooms: plain frozen records, no torch.

One prompt has an *attempt*: a list of drafts. Each draft knows which earlier drafts it was shown (`parents`),
so chains, stars, parallel samples and aggregation are the same data with other parents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

FinishReason = Literal["stop", "length", "context"]
"""Why a draft ended: an end token was sampled, `max_new_tokens` was reached, or the model's context was full."""


Kind = Literal["answer", "critique"]
"""A critique is no answer: it is shown to the model, and never judged."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question. The reference answer is not here: it lives in the task, so no strategy can leak it."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Draft:
    """One answer at some turn, as it was really sampled."""

    index: int
    """Place in its attempt's list of drafts."""
    turn: int
    """1 is the direct answer, 2 and more are refinements."""
    parents: tuple[int, ...]
    """Indices of the drafts that stood in its context, in the order shown."""
    text: str
    """Decoded answer without special tokens."""
    token_ids: tuple[int, ...]
    """Sampled ids; the end token is the last one if and only if it was sampled. Empty for a text that was written, by
    an endpoint or by a verifier."""
    sampler_logprobs: tuple[float, ...]
    """Natural log-probability of each sampled id under the unmodified model (temperature 1, no top-p)."""
    finish_reason: FinishReason
    prompt_tokens: int
    """Tokens of the context."""
    cached_tokens: int
    """How many of those were already in the KV cache; all where the draft is that of an equal context."""
    num_tokens_told: int | None = None
    """Tokens generated, where an endpoint tells only their number, or a critique was generated before."""
    kind: Kind = "answer"
    request: str = ""
    """What the user said to get it, behind the drafts shown; empty for the task's own request."""
    critique: str = ""
    """The critique that this answer was to follow."""
    kept: bool = False
    """Whether the model was not asked for it: it is the earlier answer, with its ids, in which a critique found nothing
    to change. It cost nothing."""
    critique_tokens: int = 0
    """How many of its tokens are those of the critique folded into it (`answers`)."""

    @property
    def num_tokens(self) -> int:
        """Tokens generated; 0 where an endpoint tells neither ids nor their number."""
        return len(self.token_ids) if self.num_tokens_told is None else self.num_tokens_told

    @property
    def complete(self) -> bool:
        """Whether the model ended the answer itself. A cut draft is never taught as complete."""
        return self.finish_reason == "stop"


@dataclass(frozen=True, slots=True)
class Score:
    """A scorer's judgement of one draft."""

    value: float
    """Higher is better. Verifiers use [0, 1]; a reward model any real number; NaN where no judgement was possible."""
    right: bool
    """Whether the answer counts as right (False where only a reward model judged)."""
    note: str = ""
    """Why, in a few words; also holds the reason of a failed judgement."""
    answer: str = ""
    """Canonical final answer, by which drafts vote and agree; '' where the draft has none."""
    critique: str = ""
    """What the verifier has to say, as a model should learn to say it; '' where it says nothing."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A prompt with its drafts and, once scored, one score per draft."""

    prompt: Prompt
    drafts: tuple[Draft, ...]
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """A better and a worse draft of one prompt."""

    prompt: Prompt
    chosen: Draft
    rejected: Draft
    p: float = 1.0
    """Probability that chosen is better: 1 is a hard label, 1/2 a tie."""
    chosen_right: bool = False
    rejected_right: bool = False
    chosen_critique: str = ""
    """What the verifier says of the chosen draft; '' where it says nothing."""
    rejected_critique: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Drafts of one prompt to learn from, each in the context in which it was sampled."""

    attempt: Attempt
    values: tuple[float | None, ...]
    """What the objective makes of each draft: a weight, an advantage, a win rate; None where it is only shown."""


Example = Pair | Group
"""What an objective learns from."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of a context and of the target whose log-probability is asked for."""

    context: tuple[int, ...]
    target: tuple[int, ...]


def written_critique(answer: Draft, said: str) -> Draft:
    """A verifier's critique of an answer, as a draft that stands behind it."""
    return Draft(answer.index + 1, answer.turn, (answer.index,), said, (), (), "stop", 0, 0, kind="critique")


GENERIC_CRITIQUE = (
    "Check this answer step by step. Name each mistake and say how to mend it, but do not write a new answer. "
    "If nothing is wrong, write: no changes needed."
)
"""A request for a critique that fits any task."""


@dataclass(frozen=True, slots=True)
class Requests:
    """What the user says behind a draft, unless the strategy says something else."""

    refine: str
    critique: str = GENERIC_CRITIQUE

    def behind(self, shown: Sequence[Draft], request: str = "", kind: Kind = "answer") -> list[str]:
        """What stands behind each of the drafts shown: what led to the next one, and to the new one."""
        asked = [*((draft.request, draft.kind) for draft in shown[1:]), (request, kind)] if shown else []
        return [own or (self.critique if kind == "critique" else self.refine) for own, kind in asked]


def answers(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The attempts without critiques: each is folded into the answers that were to follow it, with its tokens.

    An answer then has the answer that was criticised as its parent, and drafts are numbered anew.
    """
    return [_folded(attempt) if any(d.kind == "critique" for d in attempt.drafts) else attempt for attempt in attempts]


def _folded(attempt: Attempt) -> Attempt:
    by_index = {draft.index: draft for draft in attempt.drafts}
    kept = [draft for draft in attempt.drafts if draft.kind == "answer"]
    place = {draft.index: number for number, draft in enumerate(kept)}

    def folded(draft: Draft) -> Draft:
        shown = [by_index[index] for index in draft.parents]
        critiques = [each for each in shown[-1:] if each.kind == "critique"]
        tokens = sum(each.num_tokens for each in critiques)
        return replace(
            draft,
            index=place[draft.index],
            parents=tuple(place[each.index] for each in shown if each.kind == "answer"),
            num_tokens_told=draft.num_tokens + tokens if tokens else draft.num_tokens_told,
            critique_tokens=tokens,
            prompt_tokens=draft.prompt_tokens + sum(each.prompt_tokens for each in critiques),
            cached_tokens=draft.cached_tokens + sum(each.cached_tokens for each in critiques),
            critique=critiques[0].text if critiques else "",
        )

    return Attempt(attempt.prompt, tuple(folded(draft) for draft in kept))


def to_json(record: Any) -> dict[str, Any]:
    """Any record of this module as plain JSON data."""
    return asdict(record)


def line_of(record: Any) -> str:
    """Any record of this module as a line of a `.jsonl` file, without its end."""
    return json.dumps(to_json(record), separators=(",", ":"))


def attempt_from_json(data: dict[str, Any]) -> Attempt:
    """The inverse of `to_json` for an attempt."""
    return Attempt(
        Prompt(**data["prompt"]),
        tuple(draft_from_json(draft) for draft in data["drafts"]),
        tuple(Score(**score) for score in data["scores"]),
    )


def draft_from_json(data: dict[str, Any]) -> Draft:
    """The inverse of `to_json` for a draft."""
    lists: dict[str, Any] = {name: tuple(data[name]) for name in ("parents", "token_ids", "sampler_logprobs")}
    return Draft(**(data | lists))


def example_from_json(data: dict[str, Any]) -> Example:
    """The inverse of `to_json` for a pair or a group."""
    if "attempt" in data:
        return Group(attempt_from_json(data["attempt"]), tuple(data["values"]))
    return pair_from_json(data)


def pair_from_json(data: dict[str, Any]) -> Pair:
    """The inverse of `to_json` for a pair."""
    records = {
        "prompt": Prompt(**data["prompt"]),
        "chosen": draft_from_json(data["chosen"]),
        "rejected": draft_from_json(data["rejected"]),
    }
    return Pair(**(data | records))
