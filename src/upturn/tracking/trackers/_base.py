"""What all trackers share: the run they are told of, and events made into named numbers."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = "upturn"
"""The project of all runs, where a tracker's own setting names no other."""
Numbers = dict[str, float]
Log = Callable[[Numbers, int, float], None]
"""Takes metrics by name, their step, and the time in unix seconds."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a tracker is told at the start."""

    name: str
    folder: Path
    settings: dict[str, Any]
    """The resolved config."""

    def identity(self) -> str:
        """Eight characters that stay with the run folder, so that a resumed run goes on in the tracker too."""
        path = self.folder / ".tracking-id"
        if not path.is_file():
            path.write_text(secrets.token_hex(4))
        return path.read_text()


class Metrics:
    """A sink of `train/<metric>` by optimizer step, counted over the whole run, and `measure/...` by iteration."""

    def __init__(self, name: str, log: Log, close: Callable[[bool], None]) -> None:
        """`close` is told whether the run finished."""
        self._name, self._log, self._close = name, log, close
        self._past, self._finished = 0, False
        """Optimizer steps of earlier trainings, whether done in this session or read back; and how the run ended."""

    def __str__(self) -> str:
        return self._name

    def emit(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "train":
                self._log(_train(event), self._past + event["step"], event["time"])
            case "measure":
                self._log(_measure(event), event["iteration"], event["time"])
            case "stage" if event["name"].startswith("train ") and event["state"] != "began":
                self._past += event["facts"]["steps"]
            case "end":
                self._finished = event["status"] == "finished"

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            self._close(self._finished)


def _train(event: dict[str, Any]) -> Numbers:
    metrics = {name: value for name, value in event.items() if name not in ("time", "kind", "label", "step")}
    return {f"train/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}


def _measure(event: dict[str, Any]) -> Numbers:
    numbers = {f"measure/turn_{row['turn']}": row["accuracy"] for row in event["turns"]}
    return numbers | ({"measure/gain": event["gain"]["points"]} if event["gain"] else {})
