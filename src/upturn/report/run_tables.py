"""The tables about a run: pairs, training, and what every step took."""

from __future__ import annotations

from collections.abc import Sequence

from upturn.evaluation.summary import Stage, TrainingRow
from upturn.report.formats import duration, memory
from upturn.report.tables import (
    DASH,
    Cell,
    Column,
    Table,
    columns,
    count,
    decimal,
    head,
    share,
    with_bars,
    without_empty,
    words,
)


def pairs(training: Sequence[TrainingRow]) -> Table:
    """What the selection kept, and how good it is."""
    reasons = list(dict.fromkeys(reason for row in training for reason in row.dropped))
    heads = columns(
        "training", Column("pairs", kind="bar"), "precise | chosen right, rejected wrong",
        "chosen is earlier | the chain made it worse", *(Column("no pair", reason) for reason in reasons),
    )  # fmt: skip
    bars = with_bars([count(row.pairs) for row in training], [row.pairs for row in training])
    rows = tuple(
        (
            head(row.label),
            bar,
            share(row.label_precision),
            share(row.chosen_earlier),
            *(count(row.dropped.get(reason)) for reason in reasons),
        )
        for row, bar in zip(training, bars, strict=True)
    )
    note = "Counted over all pairs of each training, so there are no intervals."
    return without_empty(Table("Pairs", heads, rows, note))


def optimisation(training: Sequence[TrainingRow]) -> Table:
    """Steps, tokens and time of each training."""
    rows = tuple(
        (head(row.label), count(row.steps), count(row.tokens), Cell(duration(row.seconds)), decimal(row.final_loss, 4))
        for row in training
    )
    heads = columns("training", "steps", "tokens", "time", "loss | mean of the last tenth of the steps")
    return Table("Optimisation", heads, rows)


def last_steps(training: Sequence[TrainingRow]) -> Table:
    """All metrics of each training, as means over the last tenth of its steps."""
    names = sorted({name for row in training for name in row.metrics})
    rows = tuple((head(name), *(_number(row.metrics.get(name)) for row in training)) for name in names)
    return Table("Means over the last tenth of the steps", columns("metric", *(row.label for row in training)), rows)


def _number(value: float | None) -> Cell:
    return DASH if value is None else Cell(f"{value:.3g}".replace("-", "−"))


def kinds_of_stage(stages: Sequence[Stage]) -> Table:
    """Time and tokens by kind of step."""
    kinds = list(dict.fromkeys(_kind(stage) for stage in stages))
    groups = [[stage for stage in stages if _kind(stage) == kind] for kind in kinds]
    seconds = [sum(stage.seconds for stage in group) for group in groups]
    bars = with_bars([Cell(duration(total)) for total in seconds], seconds)
    rows = [
        (head(kind), count(len(group)), bar, count(sum(stage.tokens for stage in group)), _memory(group))
        for kind, group, bar in zip(kinds, groups, bars, strict=True)
    ]
    tokens = count(sum(stage.tokens for stage in stages))
    total = (head("all"), count(len(stages)), Cell(duration(sum(seconds))), tokens, _memory(stages))
    heads = columns("steps", "number", Column("time", kind="bar"), "tokens", "memory | peak")
    return without_empty(Table("By kind of step", heads, (*rows, total), strong=frozenset({len(rows)})))


def _kind(stage: Stage) -> str:
    return stage.name.split(" ", 1)[0]


def _memory(stages: Sequence[Stage]) -> Cell:
    peaks = [stage.peak_memory_mb for stage in stages if stage.peak_memory_mb is not None]
    return Cell(memory(max(peaks))) if peaks else DASH


def stages(stages: Sequence[Stage]) -> Table:
    """Every step of the run."""
    bars = with_bars([Cell(duration(stage.seconds)) for stage in stages], [stage.seconds for stage in stages])
    rows = tuple(
        (words(stage.name), bar, count(stage.tokens or None), _memory([stage]), words(_state(stage)))
        for stage, bar in zip(stages, bars, strict=True)
    )
    step, time, state = Column("step", kind="words"), Column("time", kind="bar"), Column("this run", kind="words")
    heads = columns(step, time, "tokens", "memory | peak", state)
    return without_empty(Table("All steps", heads, rows))


def _state(stage: Stage) -> str:
    return "read back" if stage.cached else "done"
