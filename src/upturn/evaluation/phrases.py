"""Numbers in plain words, with a real minus sign."""

from __future__ import annotations

from typing import Protocol


class Interval(Protocol):
    """Anything with the ends of an interval."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def signed(number: float, places: int = 1) -> str:
    """'+12.3', '−5.5', '0.0'."""
    text = f"{number:+.{places}f}".replace("-", "−")
    return text if any(digit in text for digit in "123456789") else text[1:]


def between(interval: Interval, scale: float = 1.0) -> str:
    """'8.1 to 16.5': the ends of an interval."""
    return f"{signed(scale * interval.low)} to {signed(scale * interval.high)}".replace("+", "")


def percent(share: float) -> str:
    """'23.4%'."""
    return f"{100 * share:.1f}%"


def counted(number: int, noun: str) -> str:
    """'1 step', '2 steps', '1,200 steps'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
