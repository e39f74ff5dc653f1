"""What changes from turn to turn: pure functions over scored attempts.

An attempt has one *answer* per turn: the first draft of that turn. A strategy that makes several drafts in a
turn (parallel, propose-and-aggregate) is judged by one of them, fixed beforehand, so that accuracies, flips
and intervals speak of independent prompts; all its drafts count where tokens are counted. Several attempts at
one prompt are not independent: the bootstrap resamples them together, Wilson and McNemar do not know of it.

An answer that could not be judged (its score is NaN) is neither right nor wrong, and is left out. A chain that ended
early keeps its last answer wherever turns are compared.

Accuracy     a_t = right_t / n, with Wilson's 95 % interval (Wilson 1927)
Flips        w2r, r2w over the prompts judged at both turns;  a_b - a_a = (w2r - r2w) / n
Test         McNemar, exact: min(w2r, r2w) ~ Binomial(w2r + r2w, 1/2), two-sided (McNemar 1947)
Detectable   2.8 * sqrt((w2r + r2w) / n^2), the difference found with 80 % power at the 5 % level
Gain         100 * (a_b - a_a) with a paired bootstrap: a prompt is resampled with all its turns (Efron 1979)
Over seeds   runs are resampled, and prompts: crossed where the runs share them, within each drawn run where each has
             its own (see `stats`)
Vote         the most frequent final answer of n parallel drafts (Wang et al. 2023, arXiv:2203.11171)
pass@k       mean of 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374, eq. 1)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import comb, isnan, nan, sqrt
from statistics import fmean

import numpy as np

from upturn._model import Strict
from upturn.evaluation import stats
from upturn.types import Attempt, Draft, Score

LEAST_FLIPS = stats.least_flips(0.05)
"""Fewer flips cannot reject at the 5 % level, even all in one direction: 6."""


class TurnRow(Strict):
    """One turn over all prompts that reached it."""

    turn: int
    """1 is the direct answer."""
    n: int
    """Prompts with an answer at this turn."""
    unjudged: int = 0
    """How many of those answers could not be judged."""
    accuracy: float
    """Share of right answers among those that could be judged, 0 to 1; it says nothing where `mean_score` is null."""
    low: float
    """Lower end of Wilson's 95 % interval of the accuracy."""
    high: float
    """Upper end of Wilson's 95 % interval of the accuracy."""
    mean_score: float | None
    """Mean score of the answers that could be judged; null where none could."""
    drafts: int
    """Drafts made in this turn; equal to n unless the strategy makes several."""
    tokens: int
    """Tokens generated in this turn, over all its drafts."""
    prompt_tokens: int
    """Tokens of the contexts of this turn, over all its drafts."""
    cached_tokens: int
    """How many of prompt_tokens did not have to be computed."""
    truncated: int
    """Drafts that were cut by the length limit or a full context."""
    copied: float | None
    """Share of the drafts that repeat the last draft they were shown, kept answers left out; null where none was shown
    one."""


class Transition(Strict):
    """What became of the prompts between two turns."""

    first: int
    """The earlier turn."""
    last: int
    """The later turn."""
    n: int
    """Prompts judged at both turns; a chain that ended early keeps its last answer."""
    wrong_to_right: int
    """Prompts that were wrong at the earlier turn and right at the later one."""
    right_to_wrong: int
    """Prompts that were right at the earlier turn and wrong at the later one."""
    stayed_right: int
    """Prompts right at both."""
    stayed_wrong: int
    """Prompts wrong at both."""
    p_value: float
    """McNemar's exact two-sided test that both flips are equally likely; not corrected for many looks."""
    detectable: float | None
    """Percentage points that so many prompts and flips could detect with 80 % power at the 5 % level; null below six
    flips, which cannot reject at that level, even all in one direction."""


class Gain(Strict):
    """How much oftener a later turn is right, in percentage points."""

    first: int
    """The earlier turn."""
    last: int
    """The later turn."""
    n: int
    """Prompts judged at both turns (in some run); a chain that ended early keeps its last answer."""
    points: float
    """100 * (accuracy at last - accuracy at first), over these prompts."""
    low: float
    """Lower end of the 95 % interval, paired bootstrap over prompts (and seeds)."""
    high: float
    """Upper end of the 95 % interval, paired bootstrap over prompts (and seeds)."""


class Majority(Strict):
    """The vote of parallel drafts: what the same model does when it answers several times and never refines."""

    votes: int
    """Drafts per prompt."""
    n: int
    """Prompts whose vote could be judged."""
    accuracy: float
    """Share of prompts whose most frequent final answer is right; a prompt without any vote is wrong."""
    low: float
    """Lower end of Wilson's 95 % interval of the accuracy."""
    high: float
    """Upper end of Wilson's 95 % interval of the accuracy."""
    oracle: float
    """Share of prompts with at least one right draft: what a perfect chooser would reach."""
    tokens: int
    """Tokens generated for all votes."""


def turn_table(attempts: Sequence[Attempt]) -> list[TurnRow]:
    """One row per turn that any attempt reached, in order."""
    drafts: defaultdict[int, list[Draft]] = defaultdict(list)
    answers: defaultdict[int, list[Score]] = defaultdict(list)
    copies: defaultdict[int, list[bool]] = defaultdict(list)
    for attempt in attempts:
        for turn, score in answers_of(attempt).items():
            answers[turn].append(score)
        for draft in attempt.drafts:
            drafts[draft.turn].append(draft)
            if draft.parents and not draft.kept:
                copies[draft.turn].append(draft.text == attempt.drafts[draft.parents[-1]].text)
    return [_turn_row(turn, drafts[turn], answers[turn], copies[turn]) for turn in sorted(drafts)]


def judged(attempts: Sequence[Attempt]) -> bool:
    """Whether a verifier judged any draft. Where it judged none, as in a task with `verifier: none`, nothing that asks
    what is right means anything."""
    return any(not isnan(score.value) for attempt in attempts for score in scores_of(attempt))


def _turn_row(turn: int, drafts: list[Draft], answers: list[Score], copies: list[bool]) -> TurnRow:
    known = [score for score in answers if not isnan(score.value)]
    accuracy, low, high = stats.wilson(sum(score.right for score in known), len(known))
    return TurnRow(
        turn=turn,
        n=len(answers),
        unjudged=len(answers) - len(known),
        accuracy=accuracy,
        low=low,
        high=high,
        mean_score=fmean(score.value for score in known) if known else None,
        drafts=len(drafts),
        tokens=_tokens(drafts),
        prompt_tokens=sum(draft.prompt_tokens for draft in drafts),
        cached_tokens=sum(draft.cached_tokens for draft in drafts),
        truncated=sum(not draft.complete for draft in drafts),
        copied=sum(copies) / len(copies) if copies else None,
    )


def transitions(attempts: Sequence[Attempt]) -> list[Transition]:
    """One row per pair of turns a < b that some prompt was judged at, in order."""
    turns = sorted({draft.turn for attempt in attempts for draft in attempt.drafts})
    rows = [_transition(attempts, first, last) for first, last in combinations(turns, 2)]
    return [row for row in rows if row.n]


def _transition(attempts: Sequence[Attempt], first: int, last: int) -> Transition:
    both = [(right_of(at_turn(attempt, first)), right_of(at_turn(attempt, last))) for attempt in attempts]
    flips = Counter((before, after) for before, after in both if not isnan(before) and not isnan(after))
    n, better, worse = flips.total(), flips[0, 1], flips[1, 0]
    return Transition(
        first=first,
        last=last,
        n=n,
        wrong_to_right=better,
        right_to_wrong=worse,
        stayed_right=flips[1, 1],
        stayed_wrong=flips[0, 0],
        p_value=stats.mcnemar(better, worse),
        detectable=280 * sqrt(better + worse) / n if better + worse >= LEAST_FLIPS else None,
    )


def gain(attempts: Sequence[Attempt], first: int, last: int, seed: int = 0) -> Gain:
    """One run: accuracy at turn `last` minus turn `first`; attempts at one prompt are resampled together."""
    return pooled_gain([attempts], first, last, seed)


def pooled_gain(runs: Sequence[Sequence[Attempt]], first: int, last: int, seed: int = 0) -> Gain:
    """The mean gain of several runs (training seeds), each run weighing the same.

    Prompts are known by their ids across runs. With few runs the seed level is itself uncertain: three seeds have only
    ten different resamples, so the interval is too narrow where trainings differ much (docs/measures.md).
    Raises ValueError where a run has no prompt judged at both turns, or reached the last one with none.
    """
    sums_RP, counts_RP = _differences(runs, first, last)
    rng = np.random.default_rng(seed)
    resampled = 100 * stats.over_runs(stats.over_prompts(sums_RP, counts_RP, rng), rng)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Gain(
        first=first,
        last=last,
        n=sums_RP.shape[1],
        points=float(100 * (sums_RP.sum(axis=1) / counts_RP.sum(axis=1)).mean()),
        low=float(low),
        high=float(high),
    )


def _differences(runs: Sequence[Sequence[Attempt]], first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Per run and prompt: the summed right(last) - right(first), and how many attempts that sums over."""
    by_prompt: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for run, attempts in enumerate(runs):
        if all(draft.turn < last for attempt in attempts for draft in attempt.drafts):
            continue
        for attempt in attempts:
            difference = right_of(at_turn(attempt, last)) - right_of(at_turn(attempt, first))
            if not isnan(difference):
                by_prompt[attempt.prompt.id].append((run, difference))
    sums, counts = np.zeros((2, len(runs), len(by_prompt)))
    for prompt, differences in enumerate(by_prompt.values()):
        for run, difference in differences:
            sums[run, prompt] += difference
            counts[run, prompt] += 1
    if not runs or not counts.any(axis=1).all():
        raise ValueError(f"a run has no prompt judged at both turn {first} and turn {last}")
    return sums, counts


def majority(attempts: Sequence[Attempt]) -> Majority:
    """The vote of each attempt's drafts."""
    votes = [(attempt, vote(scores_of(attempt))) for attempt in attempts]
    known = [(attempt, right) for attempt, right in votes if not isnan(right)]
    accuracy, low, high = stats.wilson(sum(right == 1 for _, right in known), len(known))
    return Majority(
        votes=max((len(attempt.drafts) for attempt in attempts), default=0),
        n=len(known),
        accuracy=accuracy,
        low=low,
        high=high,
        oracle=sum(any(right_of(s) == 1 for s in scores_of(a)) for a, _ in known) / max(len(known), 1),
        tokens=sum(_tokens(attempt.drafts) for attempt in attempts),
    )


def vote(scores: Sequence[Score]) -> float:
    """1 where the most frequent final answer (`Score.answer`; '' does not vote) is right, else 0; NaN where it could
    not be judged. Without any vote it is wrong, or could not be judged where no draft could.

    A tie goes to the answer that was given first, and an answer is judged by the first draft that gave it.
    """
    votes = Counter(score.answer for score in scores if score.answer)
    if not votes:
        return nan if all(isnan(score.value) for score in scores) else 0.0
    winner = votes.most_common(1)[0][0]  # keeps first-met order among equals
    return next(right_of(score) for score in scores if score.answer == winner)


def pass_at_k(attempts: Sequence[Attempt], k: int) -> float:
    """The chance that k parallel drafts hold a right one, without bias, from attempts of k drafts or more.

    Attempts of fewer judged ones are left out. Raises ValueError where an attempt has fewer than k drafts.
    """
    chances = [pass_chance(attempt, k) for attempt in attempts]
    return fmean(chance for chance in chances if not isnan(chance))


def pass_chance(attempt: Attempt, k: int) -> float:
    """The chance that k of the attempt's judged drafts, drawn without order, hold a right one: 1 - C(n-c, k) / C(n, k).

    NaN where fewer than k could be judged. Raises ValueError where it has fewer than k drafts.
    """
    if not 1 <= k <= len(attempt.drafts):
        raise ValueError(f"pass@{k} of prompt {attempt.prompt.id}: it has {len(attempt.drafts)} drafts")
    known = [score.right for score in scores_of(attempt) if not isnan(score.value)]
    n, right = len(known), sum(known)
    return 1 - comb(n - right, k) / comb(n, k) if k <= n else nan


def right_of(score: Score) -> float:
    """1 for right, 0 for wrong, NaN for an answer that could not be judged."""
    return nan if isnan(score.value) else float(score.right)


def scores_of(attempt: Attempt) -> tuple[Score, ...]:
    """One score per draft."""
    assert len(attempt.scores) == len(attempt.drafts), f"attempt {attempt.prompt.id} is not scored"
    return attempt.scores


def scored(attempt: Attempt) -> Iterator[tuple[Draft, Score]]:
    """Drafts with their scores."""
    return zip(attempt.drafts, scores_of(attempt), strict=True)


def answers_of(attempt: Attempt) -> dict[int, Score]:
    """By turn: the score of the turn's first draft."""
    answers: dict[int, Score] = {}
    for draft, score in scored(attempt):
        answers.setdefault(draft.turn, score)
    return answers


def at_turn(attempt: Attempt, turn: int) -> Score:
    """The answer that stands at a turn: that turn's, or the last one of a chain that ended before."""
    answers = answers_of(attempt)
    if turn in answers:
        return answers[turn]
    return answers[max((t for t in answers if t <= turn), default=min(answers))]


def judged_of(attempt: Attempt) -> dict[int, tuple[Draft, Score]]:
    """By turn: the turn's first draft with its score."""
    judged: dict[int, tuple[Draft, Score]] = {}
    for draft, score in scored(attempt):
        judged.setdefault(draft.turn, (draft, score))
    return judged


def _tokens(drafts: Sequence[Draft]) -> int:
    return sum(draft.num_tokens for draft in drafts)
