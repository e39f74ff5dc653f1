"""One table of arms: accuracy, refining, controls, cost, and what is better than the first arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from upturn.cli import reports
from upturn.evaluation import turns
from upturn.evaluation.compare import ArmRow, Comparison, Contrast, compare
from upturn.evaluation.stats import Estimate
from upturn.evaluation.summary import Summary
from upturn.report import read

MEASURING = ("measure ", "parallel ", "upstream of ")
"""Drafts of these labels are made to measure, not to train."""
HEAD = ("arm", "turn 1", "last turn", "gain", "w→r", "r→w", "vote of 4", "pass@{k}", "KL", "tokens", "minutes",
        "last turn against the first arm", "p (Holm)")  # fmt: skip


def table(folders: Mapping[str, Sequence[Path]]) -> str:
    """Markdown, one row per arm; the last measured model of each run, means over runs."""
    runs = {arm: [read.read(folder) for folder in paths] for arm, paths in folders.items()}
    found = compare(
        {arm: [reports.last_of(run) for run in some] for arm, some in runs.items()}, against=next(iter(runs))
    )
    k = min(len(a.drafts) for some in runs.values() for run in some for a in run.measured[-1].parallel)
    lines = [f"| {' | '.join(HEAD).format(k=k)} |", f"|{'---|' * len(HEAD)}"]
    for row in found.arms:
        measured = runs[row.name]
        cells = [*_accuracies(row), *_flips(measured), *_controls(measured, k), *_cost(measured), *_against(found, row)]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _accuracies(row: ArmRow) -> list[str]:
    return [_percent(row.first), _percent(row.last), _points(row.gain)]


def _flips(runs: Sequence[read.Run]) -> list[str]:
    flips = [run.summary.measurements[-1].flips for run in runs]
    known = [flip for flip in flips if flip]
    return [str(sum(f.wrong_to_right for f in known)), str(sum(f.right_to_wrong for f in known))]


def _controls(runs: Sequence[read.Run], k: int) -> list[str]:
    parallel = [run.measured[-1].parallel for run in runs]
    votes = [fmean(turns.vote(turns.scores_of(a)[:4]) for a in attempts) for attempts in parallel]
    passed = [turns.pass_at_k(attempts, k) for attempts in parallel]
    moved = [run.summary.measurements[-1].kl_start for run in runs]
    known = [kl for kl in moved if kl is not None]
    return [f"{100 * fmean(votes):.1f}", f"{100 * fmean(passed):.1f}", f"{fmean(known):.3f}" if known else ""]


def _cost(runs: Sequence[read.Run]) -> list[str]:
    tokens, seconds = zip(*(_spent(run.summary) for run in runs), strict=True)
    return [f"{fmean(tokens) / 1e6:.2f}M", f"{fmean(seconds) / 60:.1f}"]


def _spent(summary: Summary) -> tuple[int, float]:
    """Tokens generated for training and trained on (as separate rows), and the seconds this took."""
    made = [
        stage
        for stage in summary.stages
        if stage.name.startswith("generate ") and not stage.name.removeprefix("generate ").startswith(MEASURING)
    ]
    tokens = sum(stage.tokens for stage in made) + sum(row.tokens for row in summary.training)
    return tokens, sum(stage.seconds for stage in made) + sum(row.seconds for row in summary.training)


def _against(found: Comparison, row: ArmRow) -> list[str]:
    contrast: Contrast | None = next(
        (c for c in found.contrasts if c.after == row.name and c.what == "last turn"), None
    )
    return [_points(contrast.difference), _p(contrast)] if contrast else ["", ""]


def _p(contrast: Contrast) -> str:
    if contrast.p_holm < 0.001:
        return "<0.001"
    return f"{'≤' if contrast.at_most else ''}{contrast.p_holm:.3f}"


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _points(change: Estimate) -> str:
    return f"{100 * change.value:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})"
