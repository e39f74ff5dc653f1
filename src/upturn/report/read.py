"""A run folder as records: what `report` and `compare` show is read here, and nothing is kept for the next time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from upturn.errors import RunError
from upturn.evaluation import assemble
from upturn.evaluation.assemble import Measured
from upturn.evaluation.study import Study
from upturn.evaluation.summary import Measurement, Summary, drafts_file
from upturn.types import Attempt, attempt_from_json

AGAIN = "Run the same command again: it writes anew what is missing."


@dataclass(frozen=True, slots=True)
class Run:
    """Everything in a run folder that is shown."""

    folder: Path
    summary: Summary
    measured: tuple[Measured, ...]
    """One per measurement, in order."""
    config: str
    """The text of config.yaml; '' where there is none."""
    losses: tuple[tuple[str, tuple[float, ...]], ...]
    """(label, the loss of each optimizer step) per training."""


def read(folder: Path) -> Run:
    """A run, finished or not. Raises RunError that names every file that is missing, or what cannot be read."""
    try:
        return _read(folder)
    except OSError as error:
        place = error.filename or folder
        what = f"It cannot be read: {error.strerror or error}."
        raise RunError(str(place), what, "See that you may read it, or copy the run to where you may.") from error


def _read(folder: Path) -> Run:
    if not folder.is_dir():
        raise RunError(str(folder), "There is no such folder.", "Give the folder of a run.")
    summary = Summary.read(folder / "summary.json")
    lacking = [str(path) for m in summary.measurements if not (path := folder / drafts_file(m.label)).is_file()]
    if lacking:
        what = f"Its summary speaks of drafts that are not there: {', '.join(lacking)}."
        raise RunError(f"run folder {folder}", what, AGAIN)
    config = folder / "config.yaml"
    return Run(
        folder,
        summary,
        tuple(_measured(folder, measured) for measured in summary.measurements),
        config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        _losses(folder / "metrics.jsonl"),
    )


def study_of(folder: Path) -> Study:
    """The study of a run folder. Raises RunError like `read`."""
    return both(folder)[1]


def both(folder: Path) -> tuple[Run, Study]:
    """A run and its study. Raises RunError like `read`."""
    run = read(folder)
    return run, assemble.study(run.summary, run.measured)


def _measured(folder: Path, row: Measurement) -> Measured:
    def attempts(*, parallel: bool = False, reward: bool = False) -> list[Attempt] | None:
        path = folder / drafts_file(row.label, parallel=parallel, reward=reward)
        return _attempts(path) if path.is_file() else None

    return Measured(
        label=row.label,
        iteration=row.iteration,
        chain=attempts() or [],
        parallel=attempts(parallel=True) or [],
        chain_rewards=attempts(reward=True),
        parallel_rewards=attempts(parallel=True, reward=True),
        kl_start=row.kl_start,
        kl_previous=row.kl_previous,
    )


def _attempts(path: Path) -> list[Attempt]:
    found = []
    with path.open("rb") as lines:  # so that a line that is no text is named, too
        for number, line in enumerate(lines, 1):
            try:
                attempt = attempt_from_json(json.loads(line))
                if len(attempt.scores) != len(attempt.drafts):
                    raise ValueError("a draft without a score")
            except (ValueError, TypeError, KeyError) as error:
                raise RunError(f"{path}, line {number}", "This is not a scored attempt.", AGAIN) from error
            found.append(attempt)
    return found


def _losses(path: Path) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """Steps without a finite loss are left out; so is the last line of a file that is being written."""
    losses: dict[str, list[float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            step = json.loads(line)
            label, loss = str(step["label"]), float(step["loss"])
        except (ValueError, TypeError, KeyError):
            continue
        if abs(loss) < float("inf"):
            losses.setdefault(label, []).append(loss)
    return tuple((label, tuple(values)) for label, values in losses.items())
