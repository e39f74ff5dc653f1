"""`summary.json`: the numbers of a run, for machines and the report. Every field is in docs/summary.md."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from upturn._model import Strict, problems
from upturn.errors import RunError
from upturn.evaluation.turns import Gain, Majority, Transition, TurnRow, gain, judged, transitions, turn_table
from upturn.types import Attempt

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")]
"""The name of a model within a run: 'base', 'sft', 'iteration 1'. Also names its file of drafts."""


class Measurement(Strict):
    """One model of the run on the held-out prompts."""

    label: Label
    """Which model: 'base', 'sft', 'iteration 1' and so on."""
    iteration: int
    """0 before the first preference iteration."""
    n: int
    """Held-out prompts."""
    turns: tuple[TurnRow, ...]
    """One row per turn."""
    transitions: tuple[Transition, ...]
    """One row per pair of turns; none where no verifier judged."""
    gain: Gain | None
    """The last turn against the first; null where there is only one turn, or no verifier judged."""
    majority: Majority | None
    """The vote of all k direct answers, whatever their tokens (at equal tokens: `costs` of the study); null where there
    were none, or no verifier judged."""
    kl_start: float | None = None
    """Nats per token: KL(this model || the first measured one), along turn 1 of this model's chains."""
    kl_previous: float | None = None
    """The same against the model measured before."""
    tokens: int
    """Tokens generated over all turns, without the vote's."""
    upstream: str = ""
    """The model whose answers it corrected; '' where it refined its own. Only models behind the same are compared."""
    rewarded_alone: bool = False
    """Whether the training scorer is known to judge each draft without a look at the others. A vote does not."""

    @property
    def flips(self) -> Transition | None:
        """The transition between the two turns that `gain` compares."""
        ends = self.gain and (self.gain.first, self.gain.last)
        return next((row for row in self.transitions if (row.first, row.last) == ends), None)


class TrainingRow(Strict):
    """One training of the run."""

    label: Label
    """Which model came out: 'sft', 'iteration 1' and so on."""
    iteration: int
    """0 before the first preference iteration."""
    pairs: int
    """Pairs that were trained on, or groups of drafts of one prompt."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Tokens trained on, contexts included, as if every row stood alone."""
    seconds: float
    """Wall time."""
    dropped: dict[str, int]
    """Candidates that made no example, by reason."""
    label_precision: float | None
    """Share of the pairs whose chosen draft is right and whose rejected draft is wrong, by the verifier; None where
    groups of drafts were trained on, or no verifier judged any of the drafts that they were chosen from."""
    chosen_earlier: float | None
    """Share of the pairs whose chosen draft has the lower turn: the chain made it worse."""
    final_loss: float | None
    """Mean loss over the last tenth of the steps."""
    metrics: dict[str, float | None] = Field(default_factory=dict)
    """Means of further numbers over the last tenth of the steps, by name."""


class Stage(Strict):
    """One durable step of the run."""

    name: str
    """What was done."""
    seconds: float
    """Wall time when it was really done."""
    cached: bool
    """Whether this run read it back instead of doing it."""
    tokens: int = 0
    """Tokens generated or trained on."""
    peak_memory_mb: float | None = None
    """Most memory in use while it was done, in MiB: of the GPU where there is one, else of the process."""


class Summary(Strict):
    """All numbers of a run."""

    upturn: str
    """Version of upturn that wrote this."""
    recipe: str
    """Name of the recipe."""
    name: str
    """Name of the run."""
    model: str
    """The model the run started from."""
    task: str
    """Name of the task."""
    seed: int
    """Seed of the run."""
    status: Literal["running", "finished", "stopped"]
    """Whether the numbers are complete."""
    turns: int
    """Turns per attempt in the measurements."""
    measurements: tuple[Measurement, ...] = ()
    """In the order they were made: the first is the model before training."""
    training: tuple[TrainingRow, ...] = ()
    """In the order they were made."""
    stages: tuple[Stage, ...] = ()
    """In the order they were done."""

    def write(self, path: Path) -> None:
        """Write JSON by rename: a reader sees the old file or the new one. NaN and infinity become null."""
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> Summary:
        """The inverse of `write`."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            mend = "Give the folder of a run that has measured something."
            raise RunError(str(path), "There is no such file.", mend) from error
        except OSError as error:
            mend = "See that it is a file that you may read."
            raise RunError(str(path), f"It cannot be read: {error.strerror or error}.", mend) from error
        except (ValidationError, UnicodeDecodeError) as error:
            mend = "Run the same command again: it writes the file anew."
            raise RunError(str(path), f"This is not a summary of a run: {problems(error)}.", mend) from error


def measure(
    label: str,
    iteration: int,
    attempts: Sequence[Attempt],
    *,
    vote: Majority | None = None,
    drift: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Measurement:
    """The measurement of one model from its scored attempts; `drift` has the KL by 'start' and 'previous'."""
    known = judged(attempts)
    rows, flips = turn_table(attempts), transitions(attempts) if known else []
    ends = flips and (rows[0].turn, rows[-1].turn) in {(flip.first, flip.last) for flip in flips}
    return Measurement(
        label=label,
        iteration=iteration,
        n=len(attempts),
        turns=tuple(rows),
        transitions=tuple(flips),
        gain=gain(attempts, rows[0].turn, rows[-1].turn, seed) if ends else None,
        majority=vote if known else None,
        kl_start=(drift or {}).get("start"),
        kl_previous=(drift or {}).get("previous"),
        tokens=sum(row.tokens for row in rows),
    )


def drafts_file(label: str, *, parallel: bool = False, reward: bool = False) -> str:
    """Where a run folder holds the scored attempts of a measurement, one JSON line each.

    The chains by default, the independent answers of the controls with `parallel`; judged by the verifier, or by
    the scorer that trains with `reward`.
    """
    kind = ".parallel" * parallel + ".reward" * reward
    return f"drafts/{label.replace(' ', '-')}{kind}.jsonl"
