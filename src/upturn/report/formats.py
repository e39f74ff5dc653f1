"""Numbers as text, the same on the page and in the terminal."""

from __future__ import annotations

from typing import Literal

from upturn.evaluation.phrases import Interval, between, counted, percent, signed
from upturn.evaluation.study import Drift, Study

__all__ = [
    "Tone",
    "between",
    "counted",
    "duration",
    "headline",
    "listing",
    "memory",
    "p_value",
    "percent",
    "signed",
    "tone",
]

Tone = Literal["", "better", "worse"]
"""What an interval shows: all of it above 0, all of it below 0, or neither ('')."""

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def headline(study: Study) -> str:
    """What is said of a run first: its verdict, or why there is none."""
    if study.verdict:
        return study.verdict.sentence
    return _unjudged(study.models[-1].drift) if study.models else "Nothing has been measured yet."


def _unjudged(drift: Drift) -> str:
    if drift.reward is None or drift.reward_first is None:
        return "No verifier judged these answers; without one, and without rewards, turns cannot be compared."
    first, last = (f"{reward:.3g}".replace("-", "−") for reward in (drift.reward_first, drift.reward))
    compared = f"its mean is {first} at the first turn and {last} at the last"
    return f"No verifier judged these answers; only the reward says how turns compare: {compared}."


def tone(interval: Interval) -> Tone:
    """What the interval of a difference shows."""
    return "better" if interval.low > 0 else "worse" if interval.high < 0 else ""


def duration(seconds: float) -> str:
    """'3.2 s', '5 min 12 s', '2 h 05 min'."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def p_value(p: float, *, at_most: bool = False) -> str:
    """'0.031'; below 0.001 as a power of ten, and never 0. '≤0.031' where only its upper end is known."""
    if at_most:
        return f"≤{p_value(p)}"
    if p >= 0.001:
        return f"{p:.3f}"
    if p < 1e-99:
        return "<10⁻⁹⁹"
    digits, exponent = f"{p:.0e}".split("e")
    return f"{digits}·10⁻{str(-int(exponent)).translate(_SUPERSCRIPTS)}"


def memory(mebibytes: float) -> str:
    """'640 MiB', '3.2 GiB'."""
    return f"{mebibytes:.0f} MiB" if mebibytes < 1000 else f"{mebibytes / 1024:.1f} GiB"


def listing(names: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
