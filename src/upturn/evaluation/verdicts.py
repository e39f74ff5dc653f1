"""Can this model refine? The verdict on the last measured model, by the rules of docs/measures.md:

1. The gain (last turn against first) is *proven* where McNemar's p is below 0.005 (Benjamin et al. 2018), and
   *suggested* where its 95 % interval leaves out 0. One test, fixed beforehand: no correction for many looks.
2. It is *backed* where fresh answers do not explain it: the last turn also differs from the mean parallel answer on
   the same prompts, by a 95 % interval. Without parallel answers McNemar stands alone.
3. Proven and backed: `refines` or `harms`. Proven but not backed: `unclear`.
4. Not proven, and drafts hardly change: nothing to judge but copies. Suggested by six flips or more, backed, and
   lopsided (five flips to three, or more): `unclear`. Else nothing was gained by refining, and the verdict says what
   happened instead: `answers` where it is proven that the first turn gained over the base's, `copies`, `unclear` where
   so few prompts flipped that nothing could be proven, and else `churns`.
"""

from __future__ import annotations

from collections.abc import Sequence

from upturn.evaluation import controls, stats
from upturn.evaluation.phrases import between, percent, signed
from upturn.evaluation.study import CostPoint, Method, ModelStudy, Revision, Verdict
from upturn.evaluation.turns import LEAST_FLIPS, Gain, Transition

PROVEN = 0.005
"""p-value of McNemar's test that a verdict asks for (Benjamin et al. 2018, "Redefine statistical significance")."""
PROVEN_WIDTH = 2.807 / 1.960
"""Half width of a normal interval at 99.5 % over that at 95 %."""
LOPSIDED = 5 / 8
"""Share of flips in one direction from which a suggested gain is left open and not called churn."""
MIN_FLIPS = stats.least_flips(PROVEN)
"""Fewer flips cannot prove anything, even all in one direction: 9."""
COPIED = 0.5
"""Share of last drafts that repeat the first from which a model is said to copy."""
SMALL_EDIT, FEW_FLIPS = 0.1, 0.05
"""Mean edit distance, and share of prompts that flip, up to which drafts are said to hardly change."""


def verdict(models: Sequence[ModelStudy]) -> Verdict | None:
    """About the last model. None where nothing was measured, or no verifier judged."""
    if not models or not models[-1].judged:
        return None
    model = models[-1]
    flips = _flips(model)
    if model.gain is None or flips is None:
        return Verdict(kind="unclear", sentence=f"Unclear: there is no later turn to compare with ({model.n} prompts).")
    proven, backed = flips.p_value < PROVEN, _backed(model, model.gain)
    if proven and backed:
        return _refines(model, model.gain) if model.gain.points > 0 else _harms(model, model.gain)
    if proven:
        return _unclear(model.gain, _not_backed(model))
    changes = not _hardly_changes(model.revisions[-1], flips)
    if changes and _suggested(model.gain) and backed and _hints(flips):
        return _unclear(model.gain, f"a hint and no proof (p = {flips.p_value:.3f}, asked for is {PROVEN})")
    return _no_gain(models, model.gain, flips)


def _no_gain(models: Sequence[ModelStudy], gain: Gain, flips: Transition) -> Verdict:
    model, change = models[-1], models[-1].revisions[-1]
    gained = f"turn {gain.last} against turn {gain.first}: {signed(gain.points)} points ({_within(gain)})"
    copied = f"{percent(change.copied)} of last drafts repeat the first"
    right, wrong = flips.wrong_to_right, flips.right_to_wrong
    if _answers(model):
        sentence = f"It answers better but does not refine: {_first_turn(models)}; {gained}, {copied}."
        return Verdict(kind="answers", sentence=sentence)
    if _hardly_changes(change, flips):
        return Verdict(kind="copies", sentence=f"It copies: {copied}; {gained}{_mentioned(models)}.")
    if right + wrong < MIN_FLIPS:
        few = f"only {right + wrong} of {flips.n} prompts changed sides, too few to prove anything"
        return Verdict(kind="unclear", sentence=f"Unclear: {few}; {gained}{_mentioned(models)}.")
    churned = f"{percent(1 - change.copied)} of last drafts are new, {right} became right and {wrong} wrong"
    return Verdict(kind="churns", sentence=f"It churns: {churned}; {gained}{_null(model)}{_mentioned(models)}.")


def _flips(model: ModelStudy) -> Transition | None:
    ends = model.gain and (model.gain.first, model.gain.last)
    return next((test.flips for test in model.tests if (test.flips.first, test.flips.last) == ends), None)


def _suggested(gain: Gain) -> bool:
    return gain.low > 0 or gain.high < 0


def _backed(model: ModelStudy, gain: Gain) -> bool:
    if model.excess is None:
        return True
    return model.excess.low > 0 if gain.points > 0 else model.excess.high < 0


def _hints(flips: Transition) -> bool:
    """Lopsided flips, and as many as a test at the 5 % level can tell from chance: the bootstrap of fewer cannot."""
    more, fewer = sorted((flips.wrong_to_right, flips.right_to_wrong), reverse=True)
    return more + fewer >= LEAST_FLIPS and more >= LOPSIDED * (more + fewer)


def _answers(model: ModelStudy) -> bool:
    """A first turn proven better than that of the base: by the interval, and by a test that few flips do not pass."""
    if model.direct_gain is None or model.direct_p is None:
        return False
    return _wider(model.direct_gain).low > 0 and model.direct_p < PROVEN


def _hardly_changes(change: Revision, flips: Transition) -> bool:
    few = flips.wrong_to_right + flips.right_to_wrong <= FEW_FLIPS * flips.n
    return change.copied >= COPIED or (few and change.edit_distance <= SMALL_EDIT)


def _wider(gain: Gain) -> Gain:
    """The interval widened from 95 % to 99.5 %, as if it were normal: what a proven gain must leave 0 out of."""
    low, high = (gain.points + PROVEN_WIDTH * (end - gain.points) for end in (gain.low, gain.high))
    return gain.model_copy(update={"low": low, "high": high})


def _refines(model: ModelStudy, gain: Gain) -> Verdict:
    sentence = f"It refines: {_compared(gain)}{_null(model)}{_price(model)}."
    return Verdict(kind="refines", sentence=sentence)


def _harms(model: ModelStudy, gain: Gain) -> Verdict:
    return Verdict(kind="harms", sentence=f"It harms: {_compared(gain)}{_null(model)}.")


def _unclear(gain: Gain, why: str) -> Verdict:
    return Verdict(kind="unclear", sentence=f"Unclear: {_compared(gain)}, {why}.")


def _not_backed(model: ModelStudy) -> str:
    assert model.excess is not None
    points = f"{signed(100 * model.excess.value)} points ({between(model.excess, 100)})"
    return f"but against the mean of its other direct answers by {points}"


def _first_turn(models: Sequence[ModelStudy]) -> str:
    direct = models[-1].direct_gain
    if direct is None:
        return ""
    often = f"{abs(direct.points):.1f} points {'more' if direct.points > 0 else 'less'} often"
    return f"turn 1 is right {often} than that of {models[-1].base} ({_within(direct)})"


def _mentioned(models: Sequence[ModelStudy]) -> str:
    """The first turn's gain where its 95 % interval leaves 0 out, though not as far as a verdict asks for."""
    direct = models[-1].direct_gain
    return f"; {_first_turn(models)}" if direct and _suggested(direct) else ""


def _compared(gain: Gain) -> str:
    often = f"{abs(gain.points):.1f} points {'more' if gain.points > 0 else 'less'} often"
    return f"turn {gain.last} is right {often} than turn {gain.first} ({_within(gain)})"


def _within(gain: Gain) -> str:
    return f"95% interval {between(gain)}, {gain.n:,} prompts"


def _null(model: ModelStudy) -> str:
    return f"; fresh answers would give {signed(model.control.points)}" if model.control else ""


def _price(model: ModelStudy) -> str:
    """The vote at the chain's tokens, or else the largest vote with its share of them; '' where tokens are unknown."""
    refined, votes = _points(model, "refine"), _points(model, "majority")
    tokens = refined[-1].tokens if refined else 0
    if not tokens or not votes:
        return ""
    equal = controls.at_equal_tokens(votes, tokens)
    if equal is not None:
        return f"; a vote of direct answers with as many tokens is right {_against(equal.value, refined[-1])}"
    most = votes[-1]
    share = f"{100 * most.tokens / tokens:.0f}% of its tokens"
    return f"; a vote of {most.k} direct answers with {share} is right {_against(most.accuracy.value, refined[-1])}"


def _against(accuracy: float, refined: CostPoint) -> str:
    return f"{percent(accuracy)} of the time against {percent(refined.accuracy.value)}"


def _points(model: ModelStudy, method: Method) -> list[CostPoint]:
    return [point for point in model.costs if point.method == method]
