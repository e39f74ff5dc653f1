"""What `report` and `compare` do: read run folders, group runs into arms, write pages and print tables."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from upturn.errors import RunError
from upturn.evaluation.compare import Comparison, Run, compare
from upturn.evaluation.study import Study
from upturn.report import arms as shapes
from upturn.report import comparison as pages
from upturn.report import page, read

Arms = dict[str, list[Path]]
"""Name -> run folders."""


def write_page(run: read.Run, study: Study, *, open_page: bool) -> Path:
    """Write the page of a run anew and return its path. Raises RunError where that cannot be."""
    path = page.write(run.folder / page.FILE, page.render(run, study))
    if open_page:
        webbrowser.open(path.resolve().as_uri())
    return path


def side_by_side(
    runs: Sequence[Path], explicit: Sequence[str], against: str | None, output: Path
) -> tuple[Path, Comparison, list[shapes.ArmCurve], list[str]]:
    """Compare arms; write the page; return its path, the numbers, the curves, and how runs became arms.

    Raises RunError where no run is named, one cannot be read, or the page cannot be written.
    """
    if not runs and not explicit:
        raise RunError("compare", "No run is named.", "Name two run folders or more: upturn compare runs/a runs/b")
    folders, notes = arms_of(runs, explicit)
    names = _reference_first(list(folders), against)
    loaded = {name: [last_model(folder) for folder in folders[name]] for name in names}
    found = compare(loaded, against=names[0])
    curves = shapes.curves(loaded)
    return pages.write_comparison(output, found, curves, notes), found, curves, notes


def arms_of(runs: Sequence[Path], explicit: Sequence[str]) -> tuple[Arms, list[str]]:
    """Named arms first, then the other runs; those that differ only in their seed become one arm.

    Raises RunError where a name or a run is given twice, or a named arm cannot be read.
    """
    arms: Arms = dict(map(_named, explicit))
    if len(arms) < len(explicit):
        raise RunError("--arm", "Two arms have the same name.", "Give each arm a name of its own.")
    groups, notes = _alike(runs), []
    if len(groups) == 1 and not arms and groups[0][1:]:
        notes.append("The runs differ only in their seed: each is an arm, and the differences are those between seeds.")
        groups = [[folder] for folder in runs]
    for group in groups:
        name = _free_name(group[0], arms)
        arms[name] = group
        if group[1:]:
            notes.append(f"{', '.join(map(str, group))} differ only in their seed: one arm, {name}.")
    _check_once([folder for folders in arms.values() for folder in folders])
    return arms, notes


def _named(text: str) -> tuple[str, list[Path]]:
    name, equals, runs = text.partition("=")
    folders = [Path(run) for run in runs.split(",") if run]
    if not equals or not name or not folders:
        what = "This is not of the form NAME=RUN,RUN."
        raise RunError(f"--arm '{text}'", what, "Example: --arm evolve=runs/a,runs/b")
    return name, folders


def _check_once(folders: Iterable[Path]) -> None:
    seen: set[Path] = set()
    for folder in folders:
        if (place := folder.resolve()) in seen:
            raise RunError(f"run {folder}", "It is given twice, and would count as two runs.", "Name each run once.")
        seen.add(place)


def _alike(runs: Sequence[Path]) -> list[list[Path]]:
    """Runs in groups that differ only in their seed; a seed that comes again starts a group of its own."""
    groups: list[tuple[str, set[Any], list[Path]]] = []
    for folder in runs:
        settings, seed = _settings(folder)
        for same, seeds, group in groups:
            if same == settings and seed not in seeds:
                seeds.add(seed)
                group.append(folder)
                break
        else:
            groups.append((settings, {seed}, [folder]))
    return [group for _, _, group in groups]


def _settings(folder: Path) -> tuple[str, Any]:
    """The config without what may differ within an arm, and the seed. Without a config a run is like no other."""
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(str(path), f"It cannot be read: {error}.", "Name arms with --arm, or mend the file.") from error
    if not isinstance(config, dict):
        return str(folder.resolve()), None
    seed = config.pop("seed", None)
    for key in ("output_dir", "store"):
        config.pop(key, None)
    if isinstance(config.get("task"), dict):
        config["task"].pop("seed", None)
    return json.dumps(config, sort_keys=True, default=str), seed


def _free_name(folder: Path, taken: Iterable[str]) -> str:
    """The folder's name, with as many of its parents as it takes to be new."""
    parts = folder.resolve().parts
    names = ["/".join(parts[-length:]) for length in range(1, len(parts) + 1)]
    return next((name for name in names if name not in taken), names[-1])


def _reference_first(names: list[str], against: str | None) -> list[str]:
    if against is None:
        return names
    if against not in names:
        raise RunError(f"--against {against}", "There is no such arm.", f"Choose one of: {', '.join(names)}.")
    return [against, *(name for name in names if name != against)]


def last_model(folder: Path) -> Run:
    """The last measured model of a run."""
    return last_of(read.read(folder))


def last_of(found: read.Run) -> Run:
    """The last measured model of a run that is read already."""
    if not found.measured:
        raise RunError(f"run folder {found.folder}", "Nothing has been measured yet.", "Wait, or leave this run out.")
    last = found.measured[-1]
    return Run(found.summary.seed, last.label, last.chain, last.parallel or None)


def show_comparison(path: Path, found: Comparison, curves: Sequence[shapes.ArmCurve], notes: Sequence[str]) -> None:
    """Print the tables, what they say, and where the page is."""
    from upturn.report import terminal

    console = terminal.console()
    for note in notes:
        console.print(note, style="dim", highlight=False)
    for table in (pages.arm_table(found, curves), pages.contrast_table(found)):
        console.print(terminal.table(table))
    for sentence in pages.headlines(found):
        console.print(sentence, highlight=False)
    console.print(f"Page: {path}", highlight=False, soft_wrap=True)
