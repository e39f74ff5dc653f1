"""When to stop refining: what each rule would have answered on the chains that were sampled, and its price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

from upturn.evaluation import stats
from upturn.evaluation.controls import can_vote
from upturn.evaluation.study import RuleName, StopRule
from upturn.evaluation.turns import judged_of, right_of
from upturn.types import Attempt


class Answer(NamedTuple):
    """What a rule may look at; only the oracle may look at `right`."""

    text: str
    answer: str
    right: float
    """NaN where it could not be judged."""
    tokens: int


Chain = Sequence[Answer]
Stop = Callable[[Chain], int]
"""Answers that a rule lets the chain make."""


def stops(chain: Sequence[Attempt]) -> tuple[StopRule, ...]:
    """Every fixed number of turns, then each other rule with all turns to spend. A stop is judged by its own answer."""
    chains = [list(_answers(attempt)) for attempt in chain]
    longest = max(map(len, chains), default=0)
    rules = [_rule("fixed", turns, chains, partial(_fixed, turns)) for turns in range(1, longest + 1)]
    others: dict[RuleName, Stop] = {"unchanged": _unchanged, "agreement": _agreement, "oracle": _oracle}
    if not can_vote(chain):
        del others["agreement"]
    if longest > 1:
        rules += [_rule(name, longest, chains, stop) for name, stop in others.items()]
    return tuple(rules)


def _answers(attempt: Attempt) -> Iterator[Answer]:
    tokens: Counter[int] = Counter()
    for draft in attempt.drafts:
        tokens[draft.turn] += draft.num_tokens
    for turn, (draft, score) in sorted(judged_of(attempt).items()):
        yield Answer(draft.text, score.answer, right_of(score), tokens[turn])


def _fixed(turns: int, chain: Chain) -> int:
    return min(turns, len(chain))


def _unchanged(chain: Chain) -> int:
    return next((k + 1 for k in range(1, len(chain)) if chain[k].text == chain[k - 1].text), len(chain))


def _agreement(chain: Chain) -> int:
    agree = (k + 1 for k in range(1, len(chain)) if chain[k].answer and chain[k].answer == chain[k - 1].answer)
    return next(agree, len(chain))


def _oracle(chain: Chain) -> int:
    return next((k for k, answer in enumerate(chain, start=1) if answer.right == 1), len(chain))


def _rule(name: RuleName, turns: int, chains: Sequence[Chain], stop: Stop) -> StopRule:
    made = [chain[: stop(chain)] for chain in chains]
    return StopRule(
        name=name,
        turns=turns,
        accuracy=stats.share([answers[-1].right for answers in made]),
        tokens=fmean(sum(answer.tokens for answer in answers) for answers in made),
        mean_turns=fmean(len(answers) for answers in made),
    )
