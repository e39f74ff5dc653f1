"""Progress of long work: a bar with rate and remaining time in a terminal, plain lines in a log, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from upturn.tracking import events

Mode = Literal["auto", "plain", "quiet"]
console = Console(stderr=True)
_mode: Mode = "auto"
PLAIN_EVERY = 30.0
"""Seconds between two lines of plain progress."""
EVENT_EVERY = 1.0
"""Seconds between two events of one bar."""


def set_mode(mode: Mode) -> None:
    """Choose how progress shows: 'auto' is a bar in a terminal and plain lines elsewhere."""
    global _mode
    _mode = mode


def say(text: str) -> None:
    """One line for the user, unless quiet."""
    if _mode != "quiet":
        console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def note(text: str) -> Iterator[None]:
    """Say what is being done, for work without a count."""
    say(f"{text} ...")
    yield


class Bar:
    """Counts finished units of one piece of work."""

    def __init__(self, label: str, total: int, unit: str, bar: Progress | None) -> None:
        self._label, self._total, self._unit, self._bar = label, total, unit, bar
        self._done, self._found, self._start = 0, 0, time.monotonic()
        self._last = self._start
        self._task = bar.add_task(label, total=total, rate="", extra="") if bar else None
        self._extra, self._told = "", -1
        self._tell_if_due()

    def find(self, count: int) -> None:
        """Count units that were finished before: they say nothing of the rate."""
        self._found += count
        self.advance(count)

    def advance(self, count: int = 1, extra: str = "") -> None:
        """Count finished units; `extra` is a short figure to show, such as the loss."""
        self._done += count
        self._extra = extra
        self._tell_if_due()
        now, rate = time.monotonic(), self._rate()
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=count, rate=f"{rate:.1f} {self._unit}/s", extra=extra)
        elif _mode != "quiet" and now - self._last >= PLAIN_EVERY:
            self._last = now
            left = f"{(self._total - self._done) / rate:.0f} s left" if rate else "nothing finished yet"
            say(f"{self._label}: {self._done}/{self._total}, {rate:.1f} {self._unit}/s, {left} {extra}".rstrip())

    def close(self) -> None:
        """Tell how far it came."""
        if self._told != self._done:
            self._tell()

    def _rate(self) -> float:
        return (self._done - self._found) / max(time.monotonic() - self._start, 1e-9)

    def _tell_if_due(self) -> None:
        if events.due(f"progress {self._label}", EVENT_EVERY):
            self._tell()

    def _tell(self) -> None:
        self._told = self._done
        events.emit(
            "progress",
            label=self._label,
            done=self._done,
            total=self._total,
            unit=self._unit,
            rate=round(self._rate(), 4),
            extra=self._extra,
        )


@contextmanager
def track(label: str, total: int, unit: str) -> Iterator[Bar]:
    """A progress bar for `total` units of work."""
    if _mode != "auto" or not sys.stderr.isatty():
        with closing(Bar(label, total, unit, None)) as counted:
            yield counted
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[extra]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar, closing(Bar(label, total, unit, bar)) as counted:
        yield counted
