"""A text that is shown while it is written."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console

from upturn.cli.typewriter import typewriter

TALE = "Once upon a time there was a dog that sat in the moonlight by the river."
PATIENCE = 20.0
TERMINAL = {"force_terminal": True, "force_interactive": True, "_environ": {"TERM": "xterm"}}


def console(file: io.StringIO, **how: Any) -> Console:
    return Console(file=file, width=16, height=5, **how)


def appears(file: io.StringIO, text: str) -> bool:
    """Whether it is drawn before long."""
    until = time.monotonic() + PATIENCE
    while text not in file.getvalue() and time.monotonic() < until:
        time.sleep(0.01)
    return text in file.getvalue()


def test_a_text_is_drawn_while_it_grows_and_goes():
    file = io.StringIO()
    with typewriter(console(file, **TERMINAL)) as types:
        types(lambda: "loading")
        assert appears(file, "loading")
        types(lambda: TALE)
        assert appears(file, "river.")  # the end; there is no room for the rest
    assert "Once" not in file.getvalue()
    assert file.getvalue().endswith("\x1b[2K")  # the last thing written clears a line


def test_half_a_character_is_not_shown():
    file = io.StringIO()
    with typewriter(console(file, **TERMINAL)) as types:
        types(lambda: "moon \N{REPLACEMENT CHARACTER}")
        assert appears(file, "moon")
    assert "\N{REPLACEMENT CHARACTER}" not in file.getvalue()


@pytest.mark.parametrize("how", [{"force_terminal": False}, TERMINAL | {"quiet": True}])
def test_nothing_is_shown_where_nobody_looks(how: dict[str, Any]):
    file = io.StringIO()
    with typewriter(console(file, **how)) as types:
        types(lambda: TALE)
    assert file.getvalue() == ""
