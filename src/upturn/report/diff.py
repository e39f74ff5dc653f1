"""What changed between two drafts, word by word."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Literal

Change = Literal["same", "added", "removed", "gap"]
"""A 'gap' is a space that only keeps removed words apart from their neighbours."""

_WORD = re.compile(r"[\u3040-\u9fff]\s*|[^\s\u3040-\u9fff]+\s*|^\s+")
"""A word with the space after it; kana and Chinese characters are words of their own."""


def word_diff(old: str, new: str) -> list[tuple[Change, str]]:
    """Pieces in reading order; the 'same' and 'added' ones together are `new`, spaces included.

    Words are compared without the space around them, so a new line break alone is no change.
    """
    pieces: list[tuple[Change, str]] = []
    for change, text in _pieces(_WORD.findall(old), _WORD.findall(new)):
        if change == "removed" and pieces and not pieces[-1][1][-1].isspace():
            pieces.append(("gap", " "))
        pieces.append((change, text))
        if change == "removed":
            pieces.append(("gap", " "))
    return pieces


def _pieces(old: list[str], new: list[str]) -> Iterator[tuple[Change, str]]:
    # From 200 words on, words that come again and again are no anchors: a model that loops would cost a second a draft.
    matcher = SequenceMatcher(None, [w.strip() for w in old], [w.strip() for w in new])
    for operation, old_from, old_to, new_from, new_to in matcher.get_opcodes():
        removed, written = "".join(old[old_from:old_to]).strip(), "".join(new[new_from:new_to])
        if operation == "equal":
            yield "same", written
            continue
        if removed:
            yield "removed", removed
        body = written.rstrip()
        if body:
            yield "added", body
        if len(body) < len(written):  # the space after the last added word is not to be underlined
            yield "same", written[len(body) :]
