"""Texts as words: edit distance between two, and how many n-grams of many are distinct."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

_WORD = re.compile(r"[\u3040-\u9fff]|[^\s\u3040-\u9fff]+")


def words(text: str) -> list[str]:
    """Runs between white space; kana and Chinese characters are words of their own."""
    return _WORD.findall(text)


def edit_distance(old: str, new: str) -> float:
    """Levenshtein distance of the words over the number of words of the longer text, 0 to 1."""
    return Levenshtein.normalized_distance(words(old), words(new))


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct word n-grams over all word n-grams of the texts together (Li et al. 2016, arXiv:1510.03055)."""
    grams = [gram for text in map(words, texts) for gram in zip(*(text[start:] for start in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else None
