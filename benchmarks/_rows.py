"""What every benchmark writes: rows of (ours, peer, ratio, goal), with the machine they were measured on."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, Unpack

import _facts

from upturn._model import Strict

RESULTS = _facts.HERE / "results"
NOT_MEASURED = "not measured"
PLACES = ("out", "curve", "vllm_python", "llama_cpp_python")
"""Options that name places of one machine; they are not recorded."""


class Row(Strict):
    """One line of the table in docs/performance.md."""

    name: str
    device: str
    unit: str
    ours: float | None
    peer: float | None = None
    peer_version: str = ""
    peer_options: str = ""
    ratio: float | None = None
    """`ours / peer`; None where there is no peer."""
    goal: str = ""
    """Such as `>= 6` or `< 0.3`: of the ratio where there is a peer, else of `ours`."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or a number."""
        value = self.ours if self.ratio is None else self.ratio
        if not self.goal or value is None:
            return None
        sign, number = self.goal.split()
        tests = {">=": value >= float(number), "<=": value <= float(number), "<": value < float(number)}
        return tests[sign]


class Said(TypedDict):
    """What a row says of a peer, and where both ran."""

    version: str
    options: str
    goal: NotRequired[str]
    device: NotRequired[str]


def row(name: str, unit: str, ours: float, *, device: str = "cpu", goal: str = "", note: str = "") -> Row:
    """A measured number that has no peer."""
    return Row(name=name, device=device, unit=unit, ours=figures(ours), goal=goal, note=note)


def against(name: str, unit: str, ours: float, peer: float, **said: Unpack[Said]) -> Row:
    """A measured number beside a peer's of the same run."""
    return Row(
        name=name,
        device=said.get("device", "cpu"),
        unit=unit,
        ours=figures(ours),
        peer=figures(peer),
        peer_version=said["version"],
        peer_options=said["options"],
        ratio=figures(ours / peer),
        goal=said.get("goal", ""),
    )


def missing(name: str, unit: str, device: str, *, goal: str = "", why: str = NOT_MEASURED) -> Row:
    """A row that this machine could not measure."""
    return Row(name=name, device=device, unit=unit, ours=None, goal=goal, note=why)


def figures(value: float, digits: int = 4) -> float:
    """The number with so many significant digits."""
    return float(f"{value:.{digits}g}")


def median(runs: Iterable[dict[str, Any]], key: str) -> float:
    """Median of one value over runs."""
    return statistics.median(run[key] for run in runs)


def write(benchmark: str, rows: Sequence[Row], detail: dict[str, Any], args: Any) -> Path:
    """`results/<benchmark>.json`, or the file that `--out` names."""
    path = getattr(args, "out", None) or RESULTS / f"{benchmark}.json"
    options = {name: value for name, value in vars(args).items() if name not in PLACES}
    if "model" in options:  # of a folder, its name is enough
        options["model"] = "/".join(Path(args.model).parts[-2:])
    record = {"benchmark": benchmark, "command": f"python benchmarks/{Path(sys.argv[0]).name}", "options": options}
    record |= {"where": _facts.facts(), "rows": [row.model_dump() for row in rows], "detail": detail}
    _facts.write(path, record)
    for one in rows:
        print(line(one))
    print(f"written to {path}")
    return path


def line(one: Row) -> str:
    """A row in one line of the terminal."""
    if one.ours is None:
        return f"{one.name} ({one.device}): {one.note}"
    beside = f", peer {one.peer}, ratio {one.ratio}" if one.ratio is not None else ""
    goal = f", goal {one.goal}: {'met' if one.met else 'missed'}" if one.goal else ""
    return f"{one.name} ({one.device}): {one.ours} {one.unit}{beside}{goal}"
