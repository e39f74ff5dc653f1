"""Numbers as text, the same on the page and in the terminal."""

from __future__ import annotations

from typing import Literal

from upturn.evaluation.phrases import Interval, between, percent, signed

__all__ = ["NOTHING", "Tone", "between", "duration", "listing", "memory", "p_value", "percent", "signed", "tone"]

Tone = Literal["", "better", "worse"]
"""What an interval shows: all of it above 0, all of it below 0, or neither ('')."""

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


NOTHING = "Nothing has been measured yet."
"""What there is to say of a run without a measurement."""


def tone(interval: Interval) -> Tone:
    """What the interval of a difference shows."""
    return "better" if interval.low > 0 else "worse" if interval.high < 0 else ""


def duration(seconds: float) -> str:
    """'3.2 s', '5 min 12 s', '2 h 05 min'."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def p_value(p: float) -> str:
    """'0.031'; below 0.001 as a power of ten, and never 0."""
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
