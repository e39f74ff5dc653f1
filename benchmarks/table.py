"""The table of docs/performance.md, rewritten from all files of benchmarks/results: no number is typed by hand."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import _facts
import _rows

DOCUMENT = _facts.HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- table: written by benchmarks/table.py -->", "<!-- end of table -->"
SIZES = ("prompts", "slots", "chains", "pairs", "turns", "repeats")
"""Options that the heading of a table tells, where a benchmark has them."""
COLUMNS = ("what", "device", "unit", "ours", "peer", "ratio", "goal", "met", "how the peer ran")
NO = "–"
KINDS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bfloat16", "avx2": "AVX2"}
"""Kinds of processors by the best of their instructions."""
OTHER = "other"


def main() -> None:
    """Read the results, rewrite the table."""
    parser = argparse.ArgumentParser(description="Rewrite the table of docs/performance.md.")
    parser.add_argument("--results", type=Path, default=_rows.RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    args = parser.parse_args()
    records = read(args.results)
    args.document.write_text(replace(args.document.read_text(), markdown(records)))
    print(f"{sum(len(record['rows']) for record in records)} rows written to {args.document}")


def read(folder: Path) -> list[dict[str, Any]]:
    """The records that have rows, by name of their file. What nobody has measured yet is told once."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    known = [_parts(row) for record in records for row in record.get("rows", ()) if row["ours"] is not None]
    for record in records:
        rows, record["rows"] = record.get("rows", ()), []
        for row in rows:
            if row["ours"] is None:
                if any(_parts(row) <= parts for parts in known):
                    continue
                known.append(_parts(row))
            record["rows"].append(row)
    return [record for record in records if record["rows"]]


def _parts(row: dict[str, Any]) -> set[str]:
    """The device and the parts of a name; a measured row may say more, such as a temperature, than a missing one."""
    return {row["device"], *row["name"].split(", ")}


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """All goals, then one table per benchmark, each below the machine that measured it."""
    parts = [overview(records), *((*heading(record), "", *table(record["rows"])) for record in records)]
    return "\n\n".join("\n".join(part) for part in parts)


def overview(records: Sequence[dict[str, Any]]) -> Iterable[str]:
    """What has a goal, by kind of machine: a ratio, or ours where there is no peer."""
    goals: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for record in records:
        size = _size(record["options"].get("prompts", NO))
        for one in map(_rows.Row.model_validate, record["rows"]):
            if one.goal:
                found = goals.setdefault((one.device, one.name, one.goal), {}).setdefault(kind(record, one), {})
                found |= {} if one.ours is None else {size: reached(one)}
    seen = {name for found in goals.values() for name in found}
    processors = (*KINDS.values(), OTHER)
    kinds = [name for name in (*processors, *sorted(seen.difference(processors))) if name in seen]
    yield "### Goals"
    yield ""
    yield "By kind of processor or GPU, **bold** where met; in brackets the number of prompts where several were run."
    yield ""
    yield from _header(("what", "device", "goal", *kinds))
    for (device, name, goal), found in sorted(goals.items(), key=lambda item: item[0][0]):
        yield _line((name, device, goal, *(_by_size(found.get(kind, {})) for kind in kinds)))


def kind(record: dict[str, Any], one: _rows.Row) -> str:
    """Of the GPU that a row was measured on, else of the processor."""
    if one.device == "gpu" and (name := record["where"].get("gpu")):
        return next((word for word in name.split() if any(map(str.isdigit, word))), name)
    return next((name for flag, name in KINDS.items() if flag in record["where"]["flags"]), OTHER)


def reached(one: _rows.Row) -> str:
    """The number that a goal is about."""
    value = number(one.ours if one.ratio is None else one.ratio)
    return f"**{value}**" if one.met else value


def _by_size(found: dict[str, str]) -> str:
    if len(found) < 2:
        return "".join(found.values()) or NO
    return ", ".join(f"{value} ({size})" for size, value in found.items())


def heading(record: dict[str, Any]) -> Iterable[str]:
    """What was run, and where."""
    where = record["where"]
    yield f"### {record['benchmark']}"
    yield ""
    quick = " **A quick check, not a measurement.**" if record["options"].get("quick") else ""
    clock = "processor time" if record["options"].get("clock") == "cpu_seconds" else "wall time"
    cores = f"{where['cores']} cores, {record['options'].get('threads', where['threads'])} threads"
    machine = f"{where['cpu']} ({where['cpu_id']}), {cores}, {where['memory_gib']} GiB"
    if where.get("gpu"):
        machine = f"{where['gpu']} (driver {where['driver']}, CUDA {where['cuda']}); {machine}"
    versions = f"Python {where['python']}, torch {where['torch']}, transformers {where['transformers']}"
    sizes = "".join(f", {name} {_size(record['options'][name])}" for name in SIZES if name in record["options"])
    changed = f" with {where['changed_files']} changed files" if where["changed_files"] else ""
    yield f"`{record['command']}`: {machine}; {versions}; commit {where['commit'][:10]}{changed}, {where['date'][:10]};"
    yield f"load {where['load_average']} when written; {clock}{sizes}.{quick}"
    if record.get("note"):
        yield record["note"]


def _size(value: int | list[int]) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def table(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    """The rows as Markdown."""
    yield from _header(COLUMNS)
    yield from (_line(cells(_rows.Row.model_validate(row))) for row in rows)


def _header(columns: Sequence[str]) -> Iterable[str]:
    yield _line(columns)
    yield f"|{'---|' * len(columns)}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def cells(one: _rows.Row) -> tuple[str, ...]:
    """The cells of a row."""
    met = {True: "yes", False: "no", None: NO}[one.met]
    how = "; ".join(part for part in (one.peer_version, one.peer_options, one.note) if part)
    numbers = (number(one.ours), number(one.peer), number(one.ratio))
    return (one.name, one.device, one.unit, *numbers, one.goal or NO, met, how or NO)


def number(value: float | None) -> str:
    """At most four significant digits, without an exponent."""
    return NO if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def replace(document: str, written: str) -> str:
    """The document with what stands between the markers exchanged. Raises ValueError where there are none."""
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no {BEGIN!r} before {END!r}")
    return f"{head}{BEGIN}\n\n{written}\n\n{END}{tail}"


if __name__ == "__main__":
    main()
