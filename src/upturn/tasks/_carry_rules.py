"""Rules of the *carry* world: fixed-width addition, answered most significant digit first.

A problem is a text such as ``"48391702+51608255"``: two zero-padded numbers of :data:`WIDTH` digits. The
answer is their sum, written with ``WIDTH + 1`` digits, for example ``"099999957"``. Many places of a problem
add up to exactly nine, so that a carry can travel far. Whoever writes the leading digit first has to look
along the whole chain of nines; whoever reads a finished draft sees from each pair of neighbouring places
whether they agree.

This module needs nothing but the standard library.
"""

from __future__ import annotations

import random

__all__ = ["NINES", "WIDTH", "grade", "make_problem", "solve"]

#: Digits of each number.
WIDTH = 8

#: Share of the places whose two digits add up to exactly nine.
NINES = 0.5


def make_problem(rng: random.Random) -> str:
    """Draw one problem; each place adds up to nine with probability :data:`NINES`."""
    left, right = [], []
    for _ in range(WIDTH):
        a = rng.randrange(10)
        b = 9 - a
        if rng.random() >= NINES:
            b = (b + rng.randrange(1, 10)) % 10
        left.append(str(a))
        right.append(str(b))
    return "".join(left) + "+" + "".join(right)


def solve(text: str) -> str:
    """Return the right answer to the problem ``text``, one digit longer than the longer number."""
    left, right = text.split("+")
    return str(int(left) + int(right)).zfill(max(len(left), len(right)) + 1)


def grade(text: str, answer: str) -> tuple[float, bool]:
    """Compare ``answer`` with the right answer to ``text``.

    Returns the share of places that hold the right digit (a missing or a surplus place counts as wrong) and
    whether the answer is exactly right. White space around the answer is ignored.
    """
    right, given = solve(text), answer.strip()
    same = sum(x == y for x, y in zip(right, given, strict=False))
    return same / max(len(right), len(given)), right == given
