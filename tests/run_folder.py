"""Run folders made by hand: chains whose turns are right or wrong as told, and every file that a page is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from upturn.evaluation.summary import Stage, Summary, TrainingRow, drafts_file, measure
from upturn.evaluation.turns import majority
from upturn.types import Attempt, Draft, Prompt, Score, to_json

LABELS = ("base", "sft", "iteration 1")

HOSTILE = (
    "</script><script>alert(1)</script> <!-- not a comment --> \"quoted\" 'too' & <b>bold</b>\n"
    "bell \x07, escape \x1b[31m, nul \x00, \u202eright to left\u202c, "
    "שלום עולם, 世界こんにちは, half \ud83d, {{ 7 * 7 }}"
)
"""What a model may well write."""


def chain(id: str, *right: bool, text: str = "an answer") -> Attempt:
    """Turn t is right or wrong as told; every draft says which turn it is."""
    drafts = tuple(
        Draft(t, t + 1, (t - 1,) if t else (), f"{text}, turn {t + 1}", (7, 7), (-1.0, -1.0), "stop", 9, 3)
        for t in range(len(right))
    )
    return Attempt(Prompt(id, f"question {id}"), drafts, tuple(Score(float(r), r) for r in right))


def chains(better: int, worse: int, stayed: int, text: str = "an answer") -> list[Attempt]:
    """Chains of two turns."""
    flips = [(False, True)] * better + [(True, False)] * worse + [(True, True)] * stayed
    return [chain(str(place), *flip, text=text) for place, flip in enumerate(flips)]


def direct(right: Sequence[Sequence[bool]]) -> list[Attempt]:
    """Parallel answers: one row per prompt, one column per answer; right ones all say 'yes'."""
    return [_parallel(str(place), row) for place, row in enumerate(right)]


def _parallel(id: str, right: Sequence[bool]) -> Attempt:
    attempt = chain(id, *right)
    drafts = tuple(replace(draft, turn=1, parents=()) for draft in attempt.drafts)
    scores = tuple(Score(float(r), r, answer="yes" if r else f"no {place}") for place, r in enumerate(right))
    return Attempt(attempt.prompt, drafts, scores)


def summary_of(*runs: list[Attempt], vote: list[Attempt] | None = None, **changes: Any) -> Summary:
    """A finished run of as many models."""
    votes = majority(vote) if vote else None
    measured = [
        measure(label, max(place - 1, 0), attempts, vote=votes, drift={"start": 0.2 * place} if place else {})
        for place, (label, attempts) in enumerate(zip(LABELS, runs, strict=False))
    ]
    trained = TrainingRow(
        label="sft", iteration=0, pairs=12, steps=3, tokens=90, seconds=75, dropped={"<tie>": 4}, label_precision=0.75,
        chosen_earlier=0.125, final_loss=0.7, metrics={"grad_norm": 1.5},
    )  # fmt: skip
    told = {"upturn": "0.1.0", "recipe": "evolve", "name": "small", "model": "tiny", "task": "keywords", "seed": 0}
    stages = (
        Stage(name="generate measure base", seconds=2, cached=True, tokens=400, peak_memory_mb=640.0),
        Stage(name="train sft", seconds=75, cached=False, tokens=90),
    )
    settings = {"status": "finished", "turns": 2, "measurements": measured, "training": [trained], "stages": stages}
    return Summary.model_validate(told | settings | changes)


def write(
    folder: Path,
    summary: Summary,
    runs: Sequence[list[Attempt]],
    parallel: Sequence[list[Attempt]] = (),
    config: str = "recipe: evolve\nseed: 0\nnote: <b>bold</b>\n",
) -> Path:
    """Everything that a run leaves and a page reads."""
    (folder / "drafts").mkdir(parents=True, exist_ok=True)
    summary.write(folder / "summary.json")
    (folder / "config.yaml").write_text(config)
    steps = [{"label": "sft", "step": step, "loss": 1 / step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text(_lines(steps))
    labels = [row.label for row in summary.measurements]
    for label, attempts in zip(labels, runs, strict=True):
        (folder / drafts_file(label)).write_text(_lines(map(to_json, attempts)))
    for label, attempts in zip(labels, parallel, strict=False):
        (folder / drafts_file(label, parallel=True)).write_text(_lines(map(to_json, attempts)))
    return folder


def rewarded(attempts: Sequence[Attempt]) -> list[Attempt]:
    """As a training scorer judges them that likes late drafts."""
    return [
        replace(attempt, scores=tuple(Score(float(draft.index), False) for draft in attempt.drafts))
        for attempt in attempts
    ]


def whole(folder: Path) -> Path:
    """Three models that refine ever better, with parallel answers and a training scorer, and one hostile chain."""
    runs = [chains(2, 20, 78), chains(5, 5, 90), [*chains(30, 2, 67), chain("hostile", False, True, text=HOSTILE)]]
    answers = direct([[place % 2 == 0, True, place % 3 == 0] for place in range(100)])
    write(folder, summary_of(*runs, vote=answers), runs, [answers] * 3)
    for label, attempts in zip(LABELS, runs, strict=True):
        for judged, parallel in ((attempts, False), (answers, True)):
            path = folder / drafts_file(label, parallel=parallel, reward=True)
            path.write_text(_lines(map(to_json, rewarded(judged))))
    return folder


def _lines(records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
