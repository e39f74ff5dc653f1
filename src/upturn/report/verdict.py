"""A run in plain words, honest about what its intervals allow to say."""

from __future__ import annotations

from typing import Literal

from upturn.evaluation.summary import Measurement, Summary
from upturn.evaluation.turns import Gain

_ORDINALS = ("zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")


def direction(gain: Gain) -> Literal["better", "worse", "unclear"]:
    """What the interval of a gain shows: all of it above 0, all of it below 0, or neither."""
    return "better" if gain.low > 0 else "worse" if gain.high < 0 else "unclear"


def signed(points: float) -> str:
    """'+12.3', '−5.5', '0.0': percentage points with a real minus sign."""
    text = f"{points:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def interval(gain: Gain) -> str:
    """'8.1 to 16.5': the ends of a gain's interval."""
    return f"{signed(gain.low)} to {signed(gain.high)}".replace("+", "")


def ordinal(turn: int) -> str:
    """'fourth'; from ten on '10th'."""
    return _ORDINALS[turn] if turn < len(_ORDINALS) else f"{turn}th"


def percent(share: float) -> str:
    """'23.4%'."""
    return f"{100 * share:.1f}%"


def headline(summary: Summary) -> str:
    """The one sentence to remember: what the last measured model gains by refining."""
    if not summary.measurements:
        return "Nothing has been measured yet."
    last = summary.measurements[-1]
    unfinished = {"finished": "", "running": "So far: ", "stopped": "Stopped early: "}[summary.status]
    sentence = _after(last, len(summary.measurements)) + _gained(last)
    return unfinished + sentence if unfinished else sentence[0].upper() + sentence[1:]


def details(summary: Summary) -> str:
    """The sentences that put the headline into proportion: before training, the first turn, a vote."""
    if not summary.measurements:
        return ""
    first, last = summary.measurements[0], summary.measurements[-1]
    found = [_before(first, last)] if first is not last else []
    return " ".join([*found, _vote(last)]).strip()


def verdict(summary: Summary) -> str:
    """Headline and details as one paragraph."""
    return f"{headline(summary)} {details(summary)}".strip()


def _after(last: Measurement, num_measurements: int) -> str:
    if last.iteration:
        return f"after {last.iteration} iteration{'s' if last.iteration > 1 else ''}, "
    return f"after {last.label}, " if num_measurements > 1 else ""


def _gained(last: Measurement) -> str:
    gain = last.gain
    if gain is None:
        turns = last.turns
        right = f"the first turn is right {percent(turns[0].accuracy)} of the time" if turns else "no turn was"
        return f"{right} ({last.n:,} prompts); there is no later turn to compare it with."
    later, base = f"a {ordinal(gain.last)} turn", f"the {ordinal(gain.first)}"
    within = f"95% interval {interval(gain)}, {gain.n:,} prompts"
    match direction(gain):
        case "better":
            return f"{later} is right {abs(gain.points):.1f} points more often than {base} ({within})."
        case "worse":
            return f"{later} is right {abs(gain.points):.1f} points less often than {base} ({within})."
        case _:
            clear = f"{later} is not clearly better or worse than {base}"
            return f"{clear}: {signed(gain.points)} points ({within})."


def _before(first: Measurement, last: Measurement) -> str:
    words = []
    if gain := first.gain:
        did = {
            "better": f"gained {gain.points:.1f} points",
            "worse": f"lost {-gain.points:.1f} points",
            "unclear": f"made no clear difference ({signed(gain.points)} points)",
        }[direction(gain)]
        words.append(f"Before training, refining {did} (interval {interval(gain)}).")
    if first.turns and last.turns:
        old, new = first.turns[0].accuracy, last.turns[0].accuracy
        words.append(f"The first turn went from {percent(old)} to {percent(new)}.")
    return " ".join(words)


def _vote(last: Measurement) -> str:
    vote = last.majority
    if vote is None or last.gain is None or not last.tokens:
        return ""
    more = 100 * (vote.tokens / last.tokens - 1)
    tokens = "the same number of" if abs(more) < 0.5 else f"{abs(more):.0f}% {'more' if more > 0 else 'fewer'}"
    return (
        f"A vote of {vote.votes} direct answers, with {tokens} tokens, is right {percent(vote.accuracy)} "
        f"of the time; turn {last.gain.last} is right {percent(last.turns[-1].accuracy)}."
    )
