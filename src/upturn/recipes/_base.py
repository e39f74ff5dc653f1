"""What recipes share: the settings of every run, fresh prompts, and the loop of collecting and training."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from upturn._model import Strict
from upturn.config import Plugin, Scorer, Task, plugin
from upturn.engines.sampling import Config as Sampling
from upturn.errors import NothingToLearn
from upturn.lab.lab import Attempts, Lab, Measure, Model, Options, Track, Training
from upturn.tracking import progress
from upturn.training.plan import Config as Train
from upturn.types import Prompt


class Run(Strict):
    """What every recipe is told."""

    model: str
    """Hub id, folder, GGUF file or short name."""
    task: Task
    seed: int = 0
    scorer: Scorer = Field(default="exact", validate_default=True)
    measure: Measure = Measure()
    options: Options = Options()
    output_dir: str | None = None
    """Run folder; runs/<name> when not given."""
    store: str | None = None
    """Where finished steps lie; <output_dir>/store when not given. Runs may share one."""
    track: Track = ()
    """Also send metrics to these: tensorboard, trackio, wandb."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many prompts in every place, for a quick look."""

    @field_validator("output_dir", "store")
    @classmethod
    def _refuse_a_file(cls, value: str | None) -> str | None:
        """What the disk says of a file in the place of a folder reads as if it were full."""
        place = Path(value).expanduser() if value else Path()
        if file := next((path for path in (place, *place.parents) if os.path.isfile(path)), None):
            raise ValueError(f"{file} is a file, and no folder")
        return value


class Iterated(Run):
    """A recipe that samples, trains, and begins again."""

    iterations: int = Field(default=3, ge=0)
    prompts: int = Field(default=500, ge=1)
    """Fresh prompts in each iteration."""
    sampling: Sampling = Sampling()
    train: Train = Train()
    measure_every: int = Field(default=1, ge=1)
    """Iterations from one measurement to the next; the last model is always measured."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one iteration does."""

    strategy: Plugin
    selection: Plugin
    objective: Plugin


class Prompts:
    """Training prompts, none of them twice."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.used = lab, 0

    def take(self, count: int) -> list[Prompt]:
        """The next prompts of the training split."""
        found = self.lab.prompts("train", self.used, count)
        self.used += len(found)
        return found


def part(room: str, name: str, **settings: Any) -> Plugin:
    """A plug-in by name."""
    return plugin(room, {"name": name} | settings)


def begin(cfg: Run, lab: Lab) -> Model:
    """The model a run starts from, measured."""
    model = lab.load(cfg.model)
    lab.measure(model, cfg.measure, "base", scorer=cfg.scorer)
    return model


Judge = Callable[[Attempts, list[Prompt], str], Attempts]
"""Drafts, their prompts and the label -> scored drafts."""


@dataclass(frozen=True, slots=True)
class Loop:
    """How iterations follow one another."""

    start: Literal["base", "last"] = "last"
    """Where each training starts from."""
    data: Literal["replace", "accumulate"] = "replace"
    """Whether a training sees the drafts of its own iteration, or of all so far."""
    reference: Model | None = None
    """The model that log-ratios count from; the one that sampled when not given."""
    judge: Judge | None = None
    """How drafts are scored; by the run's scorer when not given."""
    first: int = 1
    """The number of the first iteration."""


def say_ended(label: str, nothing: NothingToLearn) -> None:
    """Iterations end with what was learnt so far."""
    progress.say(f"{label}: {nothing.what} No more iterations: the model before it is the last one.")


def iterate(
    cfg: Iterated,
    lab: Lab,
    base: Model,
    what: Round,
    how: Loop = Loop(),
    prompts: Prompts | None = None,
) -> Model:
    """So many times: sample from the current model, judge, select, train, measure.

    It ends early where the drafts of a later iteration teach nothing, as those of a perfect or a collapsed model.
    """
    prompts = prompts or Prompts(lab)
    model, drafts, measured = base, [], base
    for iteration in range(how.first, how.first + cfg.iterations):
        label = f"iteration {iteration}"
        asked = prompts.take(cfg.prompts)
        made = lab.generate(model, asked, what.strategy, cfg.sampling, label)
        judged = how.judge(made, asked, label) if how.judge else lab.score(made, cfg.scorer, label)
        drafts = [*drafts, judged] if how.data == "accumulate" else [judged]
        try:
            examples = lab.select(drafts, what.selection, label)
        except NothingToLearn as nothing:
            if model is base:
                raise
            say_ended(label, nothing)
            if measured is not model:
                lab.measure(model, cfg.measure, f"iteration {iteration - 1}", iteration - 1, cfg.scorer)
            break
        training = Training(objective=what.objective, train=cfg.train)
        model = lab.train(base if how.start == "base" else model, examples, training, label, iteration, how.reference)
        if iteration % cfg.measure_every == 0 or iteration == how.first + cfg.iterations - 1:
            lab.measure(model, cfg.measure, label, iteration, cfg.scorer)
            measured = model
    return model
