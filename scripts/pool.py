"""Several seeds of one recipe as one Markdown table: `python scripts/pool.py runs/demo runs/demo-seed1 ...`.

Accuracies are means over seeds. The interval of the gain is a bootstrap over seeds and prompts
(`upturn.evaluation.turns.pooled_gain`); flips are summed over seeds. The vote is that of all direct answers of a
measurement, whatever their tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

from upturn.evaluation.summary import Summary, drafts_file
from upturn.evaluation.turns import pooled_gain
from upturn.types import Attempt, attempt_from_json


def attempts_of(run: Path, label: str) -> list[Attempt]:
    """The scored attempts of one measurement."""
    return [attempt_from_json(json.loads(line)) for line in (run / drafts_file(label)).read_text().splitlines()]


def row(runs: list[Path], summaries: list[Summary], place: int) -> str:
    """One line of the table: the same measurement in every run."""
    measured = [summary.measurements[place] for summary in summaries]
    label, last = measured[0].label, summaries[0].turns
    accuracies = [f"{100 * mean(m.turns[t].accuracy for m in measured):.1f}" for t in range(last)]
    gain = pooled_gain([attempts_of(run, label) for run in runs], 1, last)
    flips = [m.flips for m in measured if m.flips]
    votes = [m.majority.accuracy for m in measured if m.majority]
    cells = [
        label,
        *accuracies,
        f"{gain.points:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})",
        str(sum(flip.wrong_to_right for flip in flips)),
        str(sum(flip.right_to_wrong for flip in flips)),
        f"{100 * mean(votes):.1f}" if votes else "",
    ]
    return "| " + " | ".join(cells) + " |"


def main(folders: list[str]) -> None:
    """Print the table."""
    runs = [Path(folder) for folder in folders]
    summaries = [Summary.read(run / "summary.json") for run in runs]
    turns = range(1, summaries[0].turns + 1)
    heads = ["model", *(f"turn {t}" for t in turns), "gain, 95% interval", "w→r", "r→w", "vote"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for place in range(len(summaries[0].measurements)):
        print(row(runs, summaries, place))
    print(f"\n{len(runs)} seeds, {summaries[0].measurements[0].n} held-out prompts each.")


if __name__ == "__main__":
    main(sys.argv[1:])
