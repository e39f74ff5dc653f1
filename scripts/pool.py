"""Several seeds of one recipe as one Markdown table: `python scripts/pool.py runs/demo runs/demo-seed1 ...`.

Accuracies are means over seeds. The interval of the gain is a bootstrap over seeds and prompts
(`upturn.evaluation.turns.pooled_gain`); flips are summed over seeds. The vote is that of all direct answers of a
measurement, whatever their tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from upturn.evaluation.summary import Measurement, Summary, drafts_file
from upturn.evaluation.turns import pooled_gain
from upturn.types import Attempt, attempt_from_json


def attempts_of(run: Path, label: str) -> list[Attempt]:
    """The scored attempts of one measurement."""
    return [attempt_from_json(json.loads(line)) for line in (run / drafts_file(label)).read_text().splitlines()]


def last_turn(measured: Iterable[Measurement]) -> int:
    """The last turn that was measured in each of these; a strategy may need fewer than its drafts."""
    return min(len(one.turns) for one in measured)


def row(runs: list[Path], summaries: list[Summary], place: int, num_turns: int) -> str:
    """One line of the table: the same measurement in every run."""
    measured = [summary.measurements[place] for summary in summaries]
    label, last = measured[0].label, last_turn(measured)
    accuracies = [f"{100 * mean(m.turns[t].accuracy for m in measured):.1f}" for t in range(last)]
    accuracies += [""] * (num_turns - last)
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
    places = range(len(summaries[0].measurements))
    num_turns = max(last_turn(summary.measurements[place] for summary in summaries) for place in places)
    heads = ["model", *(f"turn {t + 1}" for t in range(num_turns)), "gain, 95% interval", "w→r", "r→w", "vote"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for place in places:
        print(row(runs, summaries, place, num_turns))
    print(f"\n{len(runs)} seeds, {summaries[0].measurements[0].n} held-out prompts each.")


if __name__ == "__main__":
    main(sys.argv[1:])
