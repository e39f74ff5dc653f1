"""The state of a run, read from its folder: the event log, or what older runs left in summary.json."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from upturn.errors import RunError
from upturn.tracking.events import FILE

Event = dict[str, Any]
Status = Literal["running", "finished", "stopped", "failed", "killed", "unknown"]
"""'killed': the process is gone without a last word. 'unknown': an old run that left no events, and no end."""
WINDOW = 60
"""Progress events that the rate is taken from: a minute of them."""


@dataclass(slots=True)
class Step:
    """One durable step of the run."""

    name: str
    state: Literal["waiting", "began", "done", "cached"] = "waiting"
    seconds: float = 0.0
    """Wall time when it was really done."""
    began: float = 0.0
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a piece of work was at some time."""

    time: float
    label: str
    done: int
    total: int
    unit: str
    rate: float
    extra: str


@dataclass(frozen=True, slots=True)
class Measured:
    """The turns of one model."""

    label: str
    accuracy: dict[int, float]
    """Turn -> share of right answers."""
    gain: tuple[float, float, float] | None
    """Points that the last turn adds to the first, and the ends of their interval."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one turn."""

    turn: int
    text: str
    right: bool | None
    """None where nobody has judged it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One attempt."""

    label: str
    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class End:
    """The last word of a run."""

    time: float
    status: Status
    message: str


@dataclass(slots=True)
class Replay:
    """What the events so far say of a run."""

    start: Event = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    progress: deque[Progress] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """Of the piece of work that goes on now; empty between two."""
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    """Label -> optimizer step -> loss; the last label is the last training."""
    measured: dict[str, Measured] = field(default_factory=dict)
    """By label, in order."""
    sample: Sample | None = None
    end: End | None = None
    last_time: float = 0.0

    def take(self, event: Event) -> None:
        """Go on by one event. One that is not understood changes nothing: another version may have written it."""
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            self._take(event)
            self.last_time = max(self.last_time, float(event["time"]))

    def _take(self, event: Event) -> None:
        match event["kind"]:
            case "start":
                self.start, self.end = event, None
                self.steps = [Step(name) for name in event.get("steps", ())]
                self.progress.clear()
                self.measured.clear()  # a resumed run tells them again
            case "stage":
                self._stage(event["name"], event["state"], event)
            case "progress":
                self._progress(_progress(event))
            case "train":
                step, loss = int(event["step"]), float(event["loss"])
                self.losses.setdefault(event["label"], {})[step] = loss
            case "measure":
                self.measured[event["label"]] = _measured(event)
            case "draft":
                answers = tuple(Answer(int(d["turn"]), str(d["text"]), d["right"]) for d in event["drafts"])
                self.sample = Sample(event["label"], str(event["prompt"]), answers)
            case "end" if event.get("pid") == self.start.get("pid"):  # two processes may share a run folder
                self.end = End(event.get("time", 0.0), event["status"], event.get("message", ""))
                self.progress.clear()

    def _stage(self, name: str, state: Any, event: Event) -> None:
        same = [step for step in self.steps if step.name == name]
        step = next((step for step in same if step.state in ("waiting", "began")), None)
        if step is None and same:
            return  # told by a second process on the same run folder
        if step is None:
            self.steps.append(step := Step(name))
        step.state, step.seconds = state, event.get("seconds") or 0.0
        self.progress.clear()
        if state == "began":
            step.began = event["time"]
            self.losses.pop(name.removeprefix("train "), None)  # a resumed training tells its steps again

    def _progress(self, now: Progress) -> None:
        if self.progress and (self.progress[-1].label, self.progress[-1].total) != (now.label, now.total):
            self.progress.clear()
        self.progress.append(now)

    @property
    def rate(self) -> float:
        """Units per second of the work that goes on: lately, or since it began where little is known."""
        recent = list(self.progress)[1:]  # what a resumed step finds done is told with the second event
        if len(recent) < 2 or recent[-1].done == recent[0].done:
            return self.progress[-1].rate
        return (recent[-1].done - recent[0].done) / max(recent[-1].time - recent[0].time, 1e-9)

    @property
    def here(self) -> bool:
        """Whether it runs, or ran, on this machine; of another one's processes nothing can be told."""
        return self.start.get("host") == socket.gethostname()

    def status(self) -> Status:
        """How the run stands, by its last word and by whether its process lives."""
        if self.end:
            return self.end.status
        pid = self.start.get("pid")
        if pid is None:
            return "unknown"
        return "running" if not self.here or _lives(pid) else "killed"


def _progress(event: Event) -> Progress:
    return Progress(
        time=float(event["time"]),
        label=str(event["label"]),
        done=int(event["done"]),
        total=int(event["total"]),
        unit=str(event["unit"]),
        rate=float(event["rate"]),
        extra=str(event["extra"]),
    )


def _measured(event: Event) -> Measured:
    gain = event["gain"]
    return Measured(
        event["label"],
        {int(row["turn"]): float(row["accuracy"]) for row in event["turns"]},
        (gain["points"], gain["low"], gain["high"]) if gain else None,
    )


def _lives(pid: int) -> bool:
    if sys.platform == "win32":
        return True  # signal 0 would end it there
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Source:
    """A run folder that is read again and again; only what was added to the log is read anew."""

    def __init__(self, folder: Path) -> None:
        """Raises RunError where there is no run to see."""
        self.folder, self._log, self._summary = folder, folder / FILE, folder / "summary.json"
        self._replay, self._offset = Replay(), 0
        if not folder.is_dir():
            mend = "Name the folder of a run, once it has begun."
            raise RunError(f"run folder {folder}", "There is no such folder.", mend)
        if not self._log.is_file() and not self._summary.is_file():
            what = "It holds no run: neither events nor a summary.json."
            raise RunError(f"run folder {folder}", what, "Name the folder of a run, such as runs/demo.")

    def read(self) -> Replay:
        """The run as it stands."""
        if not self._log.is_file():
            return _replayed(_from_summary(self.folder))
        with self._log.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:  # the folder was made anew
                self._replay, self._offset = Replay(), 0
            file.seek(self._offset)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        for event in parsed(whole):
            self._replay.take(event)
        return self._replay


def parsed(lines: bytes) -> Iterator[Event]:
    """Events of a log; a line that a killed run left half-written is skipped."""
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                yield event


def _replayed(events: Iterable[Event]) -> Replay:
    replay = Replay()
    for event in events:
        replay.take(event)
    return replay


def _from_summary(folder: Path) -> Iterator[Event]:
    """The events that a run without a log would have told, as far as its summary and its metrics know."""
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_bytes())
        yield {"kind": "start"} | {name: summary[name] for name in ("name", "recipe", "model", "task")}
        stages, measurements, status = summary["stages"], summary["measurements"], summary["status"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        mend = "Run the same command again: it writes the file anew."
        raise RunError(str(path), f"This is not a summary of a run: {error}", mend) from error
    for stage in stages:
        yield {"kind": "stage", "state": "cached" if stage["cached"] else "done"} | stage
    metrics = folder / "metrics.jsonl"
    for entry in parsed(metrics.read_bytes() if metrics.is_file() else b""):
        yield {"kind": "train"} | entry
    for measurement in measurements:
        yield {"kind": "measure"} | measurement
    if status != "running":
        yield {"kind": "end", "status": status}
