"""Prompts with reference answers from JSONL files or a hub data set, checked line by line."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from upturn.errors import DataError
from upturn.tasks._base import Split
from upturn.types import Prompt

TEST_SHARE = 0.1
"""Share of the prompts that is held out where the data has no test part of its own."""

Records = Iterable[tuple[str, object]]
"""Records with their places, such as "train.jsonl, line 7"; a `ValueError` is one that cannot be read."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which fields are read, and how."""

    prompt: str
    answer: str | None
    """None where no answer is needed."""
    instruction: str = ""
    """Stands after each prompt, two lines below."""
    gold: Callable[[str], str] = str.strip
    """The reference out of the answer field; '' where it holds none, a `ValueError` where it cannot be used."""


_Rows = dict[str, tuple[str, str]]
"""The prompt field without outer white space -> the prompt's full text, and the reference."""


class Table:
    """The prompts of both splits and their references, each prompt once and in one split only.

    A prompt of both parts stays in the test split. Without a test part, `test_share` of the prompts, chosen by
    their hash, is the test split. Prompts are compared and hashed as they stand in their field, without outer white
    space and without the instruction, so that no instruction moves one to the other split. A prompt's id is made of
    its full text, so it outlives changes of the file.
    """

    def __init__(self, data: str, columns: Columns, test_share: float, subset: str | None = None) -> None:
        self.data = data
        self._parts: dict[Split, _Rows] = {
            split: _checked(records, columns, f"{data}: {split} part") for split, records in _open(data, subset).items()
        }
        if "test" not in self._parts:
            self._divide(test_share)
        self._finish()

    def use_test(self, other: Table) -> None:
        """Take all of another table as the test split, and all of this one as the train split."""
        self._parts = {"train": self._all(), "test": other._all()}
        self._finish()

    def prompts(self, split: Split, start: int, count: int) -> list[Prompt]:
        """`count` prompts from place `start` in the order of the file; fewer at its end."""
        if split not in self._parts:
            raise DataError(self.data, f"There is no {split} part.", f"Add {split}.jsonl beside the other part.")
        rows = list(self._parts[split].values())[start : start + count]
        return [Prompt(_id(text), text) for text, _ in rows]

    def reference(self, prompt: Prompt) -> str:
        """The reference answer, found by the prompt's id."""
        if prompt.id not in self._references:
            raise DataError(
                f"{self.data}: prompt {prompt.id}",
                "This prompt is not in the data (any more), so there is no reference answer for it.",
                "Use the data that the prompt came from.",
            )
        return self._references[prompt.id]

    @property
    def key(self) -> str:
        """Digest of the prompts' ids and references, wherever the data is and in whatever order."""
        return hashlib.sha256(json.dumps(sorted(self._references.items())).encode()).hexdigest()

    def _all(self) -> _Rows:
        return {bare: row for part in self._parts.values() for bare, row in part.items()}

    def _divide(self, share: float) -> None:
        rows = self._parts["train"]
        held = {bare for bare in rows if int(_id(bare), 16) < share * 16**_ID_DIGITS}
        self._parts = {
            "train": {bare: row for bare, row in rows.items() if bare not in held},
            "test": {bare: row for bare, row in rows.items() if bare in held},
        }

    def _finish(self) -> None:
        for bare in self._parts["test"]:
            self._parts.get("train", {}).pop(bare, None)
        self._references = {_id(text): reference for text, reference in self._all().values()}


_ID_DIGITS = 16


def _id(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_ID_DIGITS]


def _open(data: str, subset: str | None) -> dict[Split, Records]:
    path = Path(data).expanduser()
    if path.is_dir():
        parts: dict[Split, Records] = {}
        for split in ("train", "test"):
            if (path / f"{split}.jsonl").exists():
                parts[split] = _lines(path / f"{split}.jsonl")
        if parts:
            return parts
        raise DataError(data, "The folder holds neither train.jsonl nor test.jsonl.", _nearest(path / "train.jsonl"))
    if path.exists():
        return {"test" if path.stem == "test" else "train": _lines(path)}
    if path.suffix in (".jsonl", ".json") or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise DataError(data, "There is no such file or folder.", _nearest(path))
    return _from_hub(data, subset)


def _nearest(path: Path) -> str:
    """Says what stands nearest to a missing path."""
    while not path.parent.exists():
        path = path.parent
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"Did you mean '{path.parent / near[0]}'?" if near else f"Look into '{path.parent}'."


def _lines(path: Path) -> Records:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(str(path), f"The file cannot be read: {error.strerror}.", "Check its rights.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                record: object = json.loads(line)
            except (ValueError, RecursionError) as error:
                record = ValueError(f"This is not JSON: {error}.")
            yield f"{path}, line {number}", record


def _from_hub(name: str, subset: str | None) -> dict[Split, Records]:
    try:
        import datasets
        import datasets.exceptions
    except ModuleNotFoundError as error:
        mend = "Install it with: pip install 'upturn[hub]'. For a local file, " + _nearest(Path(name)).lower()
        raise DataError(name, "Data sets of the hub need the package 'datasets'.", mend) from error
    try:
        found: Mapping[str, Any] = datasets.load_dataset(name, subset)  # pyright: ignore[reportAssignmentType]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        what = f"There is no such file or folder here, and the hub did not give it: {error}."
        mend = f"Check the name and the network, or give a folder. {_nearest(Path(name))}"
        raise DataError(name, what, mend) from error
    splits: tuple[Split, ...] = ("train", "test")
    parts: dict[Split, Records] = {split: _rows(name, split, found[split]) for split in splits if split in found}
    if not parts:
        raise DataError(name, f"It has only the splits {', '.join(found)}.", "Choose data with 'train' or 'test'.")
    return parts


def _rows(name: str, split: str, rows: Iterable[object]) -> Records:
    for number, row in enumerate(rows, start=1):
        yield f"{name}, {split} row {number}", row


def _checked(records: Records, columns: Columns, name: str) -> _Rows:
    """The rows; of equal prompts the first counts. Problems are counted, the first named."""
    rows: _Rows = {}
    problems: list[tuple[str, str]] = []
    total = 0
    for place, record in records:
        total += 1
        try:
            prompt, reference = _row(record, columns)
            text = f"{prompt}\n\n{columns.instruction}" if columns.instruction else prompt
            rows.setdefault(prompt.strip(), (text, reference))
        except ValueError as problem:
            problems.append((place, str(problem)))
    if problems:
        where, what = problems[0]
        more = f" {len(problems)} of {total} records have problems; this is the first." if len(problems) > 1 else ""
        raise DataError(where, what + more, "Correct the data, or name other columns.")
    if not rows:
        raise DataError(name, "There is not one record.", "Give data with at least one prompt.")
    return rows


def _row(record: object, columns: Columns) -> tuple[str, str]:
    """The prompt field and the reference; a `ValueError` says what is wrong with the record."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, Mapping):
        raise ValueError("This is not a JSON object.")
    prompt = _text(record, columns.prompt)
    if not prompt.strip():
        raise ValueError(f"The prompt in '{columns.prompt}' is empty.")
    reference = ""
    if columns.answer is not None:
        reference = columns.gold(_text(record, columns.answer))
        if not reference:
            raise ValueError(f"There is no answer in '{columns.answer}'.")
    return prompt, reference


def _text(record: Mapping[Any, object], field: str) -> str:
    value = record.get(field)
    if isinstance(value, float):
        return format(Decimal(str(value)), "f")  # an exponent would be read as a second number
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, str):
        return value
    if field in record:
        raise ValueError(f"The field '{field}' is not text.")
    near = difflib.get_close_matches(field, map(str, record), n=1) or [str(name) for name in record]
    raise ValueError(f"The field '{field}' is missing; there is: {', '.join(near)}.")
