"""A text as it is written, below what was printed before; gone when it is printed itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

FRAMES = 10
"""Pictures per second."""
MARGIN = 2
"""Lines of the terminal that stay free."""
Types = Callable[[Callable[[], str] | None], None]
"""Takes what tells the text as far as it has come, asked for each picture in a thread of its own; None clears."""


@contextmanager
def typewriter(console: Console) -> Iterator[Types]:
    """Inside, the end of a growing text is shown, as much as fits; nothing where nobody looks, in a pipe or a file."""
    if not console.is_interactive or console.quiet:
        yield lambda text: None
        return
    told: Callable[[], str] = str

    def types(text: Callable[[], str] | None) -> None:
        nonlocal told
        told = text or str
        if text is None:  # or what is printed next would stand above the old picture for a moment
            live.refresh()

    with Live(
        get_renderable=lambda: _end(console, told()), console=console, transient=True, refresh_per_second=FRAMES
    ) as live:
        yield types


def _end(console: Console, text: str) -> Text:
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")[-console.width * console.height :]
    lines = Text(text, style="dim").wrap(console, console.width)
    return Text("\n").join(lines[-max(1, console.height - MARGIN) :])
