"""What a recipe sees: the calls it may make, what they take and what they give. Each call is a durable step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import Field, model_validator

from upturn import registry
from upturn._model import Strict
from upturn.config import Objective, Plugin, Strategy, written
from upturn.engines.api import Endpoint
from upturn.engines.sampling import Config as Sampling
from upturn.errors import RunError
from upturn.models.chat import Layout
from upturn.tracking import trackers
from upturn.training import plan
from upturn.types import Attempt, Example, Prompt, attempt_from_json, example_from_json

Track = trackers.Chosen
"""Experiment trackers that a run is sent to, by name; they change no result and stand in no key."""
Record = TypeVar("Record")


class Options(Strict):
    """How models are loaded and run; everything here can change results, so it is part of every key."""

    dtype: str = Field(default="bfloat16", pattern="^(bfloat16|float32|auto)$")
    device: str = "auto"
    layout: Layout = "auto"
    """How drafts are shown: as a conversation, or quoted in one message."""
    slots: int | None = Field(default=None, ge=1)
    """Drafts that are sampled at the same time; None: what suits the device."""
    chunk_prompts: int | None = Field(default=None, ge=1)
    """Prompts between two saves of a generation: a kill costs at most one chunk, and the batch runs empty at the end of
    each. None: four for each slot."""
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """A model on disk, or behind an endpoint."""

    key: str
    folder: Path
    """Where its files lie; of no meaning with an endpoint."""
    name: str
    endpoint: Endpoint | None = None


@dataclass(frozen=True, slots=True)
class Attempts:
    """Drafts on disk."""

    key: str
    path: Path
    num_prompts: int
    scorer: Plugin | None = None
    """What judged them."""

    def read(self) -> list[Attempt]:
        """All attempts. Raises RunError where the file is not what the step wrote."""
        return _records(self.path, self.num_prompts, attempt_from_json)


@dataclass(frozen=True, slots=True)
class Examples:
    """What a training learns from, on disk: pairs, or groups of drafts."""

    key: str
    path: Path
    count: int
    dropped: dict[str, int]
    label_precision: float | None
    """Share of the pairs whose chosen draft is right and whose rejected draft is wrong, by the verifier; None for
    groups."""
    chosen_earlier: float | None
    """Share of the pairs whose chosen draft has the lower turn; None for groups."""

    def read(self) -> list[Example]:
        """All of them. Raises RunError where the file is not what the step wrote."""
        return _records(self.path, self.count, example_from_json)


def damaged(step: Path, what: str) -> RunError:
    """The message for a step's result of which something is broken or gone; only the step itself can make it again."""
    told = f"The result of this step is damaged: {what}."
    return RunError(f"folder {step}", told, "Delete it and run the same command again.")


def _records(path: Path, count: int, made: Callable[[Any], Record]) -> list[Record]:
    found: list[Record] = []
    try:
        with path.open() as lines:
            for line in lines:
                found.append(made(json.loads(line)))
    except FileNotFoundError as error:
        raise damaged(path.parent, f"its {path.name} is gone") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path.parent, f"line {len(found) + 1} of {path.name} cannot be read") from error
    if len(found) != count:
        raise damaged(path.parent, f"{path.name} has {len(found)} lines and should have {count}")
    return found


class Lab(Protocol):
    """What a recipe may do. `Bench` does it, or only says what would be done."""

    def load(self, name: str) -> Model:
        """A model by hub id, folder, GGUF file or short name."""
        ...

    def prompts(self, split: str, start: int, count: int) -> list[Prompt]:
        """A slice of the task's prompts."""
        ...

    def generate(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        strategy: Plugin,
        how: Sampling,
        label: str,
        first: Attempts | None = None,
        purpose: str = "",
    ) -> Attempts:
        """Sample drafts. The strategy goes on from `first`, the first draft of every prompt by another model.

        The same model draws the same drafts of the same prompts again, but for another `purpose`.
        """
        ...

    def score(self, attempts: Attempts, scorer: Plugin, label: str, voters: Attempts | None = None) -> Attempts:
        """Judge drafts. `voters` are other drafts of the same prompts, for a scorer that judges by a vote."""
        ...

    def select(self, attempts: Attempts | Sequence[Attempts], selector: Plugin, label: str) -> Examples:
        """Make pairs or groups. Where there is none, as with all drafts tied, NothingToLearn.

        A ConfigError where the rule asks what is right, and the scorer leaves that to the verifier.
        """
        ...

    def train(
        self,
        model: Model,
        examples: Examples,
        how: Training,
        label: str,
        iteration: int = 0,
        reference: Model | None = None,
    ) -> Model:
        """Train a copy of the model; the reference is the model itself unless another is named."""
        ...

    def measure(
        self,
        model: Model,
        cfg: Measure,
        label: str,
        iteration: int = 0,
        scorer: Plugin | None = None,
        upstream: Model | None = None,
    ) -> None:
        """Turns, controls and drift of a model on held-out prompts.

        `scorer` is the one that trains, if any. First drafts come from `upstream` where another model is corrected.
        """
        ...

    def publish(self, model: Model, about: str) -> None:
        """Put the final model into the run folder."""
        ...


class Training(Strict):
    """One stage of training: what for, and how."""

    objective: Objective
    train: plan.Config = plan.Config()


class Measure(Strict):
    """Measuring on held-out prompts, the same for every model of a run."""

    prompts: int = Field(default=300, ge=1)
    turns: int = Field(default=4, ge=2)
    strategy: Strategy | None = None
    """How answers are refined; a chain of `turns` when not given."""
    sampling: Sampling = Sampling()
    parallel: int = Field(default=0, ge=0)
    """Independent direct answers per prompt for the controls (votes, best of n, fresh answers, pass@k); 0 leaves them
    out."""

    @model_validator(mode="before")
    @classmethod
    def _turns_are_those_of_the_strategy(cls, given: Any) -> Any:
        """One number for both: of a strategy that has turns, told here or there."""
        options = written(given.get("strategy")) if isinstance(given, dict) else {}
        if options.get("name") not in registry.names("strategies"):
            return given  # nothing to compare, or something that is refused below
        field = registry.find("strategies", options["name"]).Config.model_fields.get("turns")
        if field is None:
            return given
        asked, own = given.get("turns"), options.get("turns")
        if asked is not None and own is not None and asked != own:
            raise ValueError(f"turns is {asked} and strategy.turns is {own}: leave one of them out, or make them equal")
        turns = next(number for number in (asked, own, field.default) if number is not None)
        return given | {"turns": turns, "strategy": options | {"turns": turns}}
