"""Trackio: a run of the project 'upturn' or $TRACKIO_PROJECT; look at it with `trackio show`."""

from __future__ import annotations

import os

import trackio  # type: ignore[import-not-found]

from upturn.tracking.events import Sink
from upturn.tracking.trackers._base import PROJECT, Metrics, Numbers, Run


def start(run: Run) -> Sink:
    """Begin a run, or go on with the one of the same run folder."""
    tracked = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=f"{run.name}-{run.identity()}",  # Trackio knows runs by their names alone
        resume="allow",
        config=run.settings,
    )

    def log(numbers: Numbers, step: int, when: float) -> None:
        tracked.log(numbers, step=step)

    return Metrics("trackio", log, lambda finished: tracked.finish())
