"""How long a person waits: `upturn --help`, and the first token of `upturn refine` with everything on disk.

Measures   whole commands, each in a fresh process, until they end. The first token is that of a command which makes
           one token and stops, so it counts loading, the first forward pass and leaving.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _rows

UPTURN = (sys.executable, "-m", "upturn.cli.main")
QUESTION = "Name one river."


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    first_token = ("refine", QUESTION, "--model", args.model, "--turns", "1", "--max-new-tokens", "1", "--json")
    commands = {"upturn --help": (("--help",), "< 0.3"), "first token of upturn refine": (first_token, "< 3")}
    rows: list[_rows.Row] = []
    detail: dict[str, Any] = {}
    for name, (arguments, goal) in commands.items():
        seconds(arguments)  # fills the file cache
        detail[name] = took = [seconds(arguments) for _ in range(args.repeats)]
        rows.append(_rows.row(name, "s", statistics.median(took), goal=goal))
    _rows.write("startup", rows, detail, args)


def seconds(arguments: tuple[str, ...]) -> float:
    """Wall time of one command. Raises CalledProcessError when it fails."""
    began = time.perf_counter()
    subprocess.run([*UPTURN, *arguments], check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - began, 4)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Start-up times.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two repeats: a check, not a measurement")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.repeats = 2
    return args


if __name__ == "__main__":
    main()
