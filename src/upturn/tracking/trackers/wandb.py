"""Weights & Biases: a run of the project 'upturn' or $WANDB_PROJECT; its other variables (WANDB_MODE, ...) hold too."""

from __future__ import annotations

import os

import wandb  # type: ignore[import-not-found]

from upturn.tracking.events import Sink
from upturn.tracking.trackers._base import PROJECT, Metrics, Numbers, Run

AXES = {"train": "train/step", "measure": "measure/iteration"}
"""What each group of metrics is drawn against, since W&B's own step may only grow."""


def start(run: Run) -> Sink:
    """Begin a run, or go on with the one of the same run folder; local files lie in RUN/wandb."""
    tracked = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=run.identity(),
        resume="allow",
        name=run.name,
        dir=str(run.folder),
        config=run.settings,
    )
    for group, axis in AXES.items():
        tracked.define_metric(f"{group}/*", step_metric=axis)

    def log(numbers: Numbers, step: int, when: float) -> None:
        group = next(iter(numbers)).partition("/")[0]
        tracked.log(numbers | {AXES[group]: step})

    return Metrics("wandb", log, lambda finished: tracked.finish(exit_code=0 if finished else 1))
