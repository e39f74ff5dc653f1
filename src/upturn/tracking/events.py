"""What happens in a run, while it happens: flat records that go to every open sink, first of all to a file.

    start      name, recipe, model, task, config, steps (names of the planned ones), pid, host
    stage      name, state ('began', 'done', 'cached'), seconds, facts
    progress   label, done, total, unit, rate, extra; at most one per second and label, and the last one
    train      label, step, and every metric of that optimizer step
    measure    label, iteration, n, turns (turn, accuracy, low, high), gain (points, low, high)
    draft      label, prompt, drafts (turn, text, right): a sample now and then
    end        status ('finished', 'stopped', 'failed'), message, pid

Every event has `time`, in unix seconds, and `kind`. Events shape no result: whatever ails a sink is said once, and the
run goes on.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from upturn.errors import UpturnError
from upturn.types import Attempt

FILE = ".events.jsonl"
"""The log's place in a run folder, one event a line. A resumed run appends to it."""
SAMPLE_EVERY = 10.0
"""Seconds between two samples of drafts."""
LONGEST = 2000
"""Characters that are kept of a text."""


class Sink(Protocol):
    """Where events go; `str()` is what messages call it."""

    def emit(self, event: dict[str, Any]) -> None:
        """Take one event; what it raises is caught."""
        ...

    def close(self) -> None:
        """No event comes after this."""
        ...


class File:
    """Appends each event as one line of JSON, written at once; opened at the first event."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._torn = False
        """Whether the file may end in half a line, which the next event must not continue."""

    def __str__(self) -> str:
        return str(self._path)

    def emit(self, event: dict[str, Any]) -> None:
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
            self._torn = self._file.tell() > 0
        line = b"\n" * self._torn + _json(event).encode() + b"\n"
        self._torn = True
        if (self._file.write(line) or 0) < len(line):
            raise OSError("the disk took half a line")
        self._torn = False

    def close(self) -> None:
        if self._file:
            self._file.close()


_sinks: tuple[Sink, ...] = ()
_failed: set[int] = set()
"""Sinks of which a failure has been said."""
_last: dict[str, float] = {}
"""When something rare was last told."""


def emit(kind: str, /, **facts: Any) -> None:
    """Send one event to every open sink."""
    if not _sinks:
        return
    event = {"time": round(time.time(), 3), "kind": kind} | facts
    for sink in _sinks:
        try:
            sink.emit(event)
        except Exception as error:  # of a disk, of somebody's server: nothing here is worth a run
            _say_once(sink, error)


def due(name: str, seconds: float) -> bool:
    """True at most once in so many seconds for each name, and never where nobody listens."""
    now = time.monotonic()
    if not _sinks or now - _last.get(name, -math.inf) < seconds:
        return False
    _last[name] = now
    return True


def sample(label: str, attempts: Sequence[Attempt]) -> None:
    """Now and then, one attempt with its answer of each turn; the first one that has more than one turn."""
    attempt = next((a for a in attempts if len({draft.turn for draft in a.drafts}) > 1), None)
    if attempt is None or not due(f"draft {bool(attempt.scores)}", SAMPLE_EVERY):
        return
    judged = any(score.right for a in attempts for score in a.scores)  # a reward model calls nothing right
    scores = attempt.scores if judged else (None,) * len(attempt.drafts)
    answers: dict[int, dict[str, Any]] = {}
    for draft, score in zip(attempt.drafts, scores, strict=True):
        right = score.right if score else None
        answers.setdefault(draft.turn, {"turn": draft.turn, "text": draft.text[:LONGEST], "right": right})
    emit("draft", label=label, prompt=attempt.prompt.text[:LONGEST], drafts=list(answers.values()))


@contextmanager
def record(sinks: Sequence[Sink], **start: Any) -> Iterator[None]:
    """Send the events of this block to the sinks, between a 'start' with these facts and an 'end'."""
    global _sinks
    outer, _sinks = _sinks, tuple(sinks)
    _failed.clear()
    _last.clear()
    pid = os.getpid()
    emit("start", **start, pid=pid, host=socket.gethostname())
    try:
        yield
    except BaseException as error:
        status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        emit("end", status=status, message=_message(error), pid=pid)
        raise
    else:
        emit("end", status="finished", message="", pid=pid)
    finally:
        for sink in _sinks:
            try:
                sink.close()
            except Exception as error:
                _say_once(sink, error)
        _sinks = outer


def _message(error: BaseException) -> str:
    text = str(error) if isinstance(error, UpturnError) else f"{type(error).__name__}: {error}".removesuffix(": ")
    return text[:LONGEST]


def _say_once(sink: Sink, error: Exception) -> None:
    from upturn.tracking import progress  # its bars are events too

    if id(sink) not in _failed:
        _failed.add(id(sink))
        progress.say(f"{sink}: {type(error).__name__}: {error}. The run goes on; some of its events are lost.")


def _json(event: dict[str, Any]) -> str:
    try:
        return json.dumps(event, separators=(",", ":"), allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_finite(event), separators=(",", ":"), default=str)


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
