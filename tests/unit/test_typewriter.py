"""A text that is shown while it is written."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from upturn.cli.typewriter import FRAMES, typewriter

TALE = "Once upon a time there was a dog that sat in the moonlight by the river."


def told(text: str, **how: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=16, height=5, **how)  # type: ignore[arg-type]
    with typewriter(console) as types:
        types(lambda: text)
        time.sleep(3 / FRAMES)
    return file.getvalue()


def test_the_end_of_a_long_text_is_shown_and_goes():
    shown = told(TALE, force_terminal=True)
    assert "river." in shown and "Once" not in shown
    assert shown.endswith("\x1b[2K")  # the last thing written clears a line


def test_half_a_character_is_not_shown():
    assert "\N{REPLACEMENT CHARACTER}" not in told("moon \N{REPLACEMENT CHARACTER}", force_terminal=True)


@pytest.mark.parametrize("how", [{"force_terminal": False}, {"force_terminal": True, "quiet": True}])
def test_nothing_is_shown_where_nobody_looks(how: dict[str, bool]):
    assert told(TALE, **how) == ""
