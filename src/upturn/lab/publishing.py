"""The folder of the published model: what a run puts there, and what it must not take away from there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock

from upturn.errors import RunError
from upturn.evaluation.summary import Summary
from upturn.lab.store import sync, sync_all
from upturn.models import card, folders

SUMS = ".published.sha256"
"""Names the files that were published, each with its sum, as `sha256sum -c` reads them."""
KINDS = (
    *(card.REFINING, "README.md", "*config.json", "*.safetensors", "*.safetensors.index.json", "*.jinja"),
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
)
"""What may lie in a folder that was published before there were sums."""


def check(target: Path, read: Iterable[Path] = ()) -> None:
    """Raises RunError where publishing would take away what no run put there, or a folder that this run reads from.

    A run asks before it begins, since hours later it could only throw its model away.
    """
    with _lock(target) if target.exists() else nullcontext():  # a plan writes nothing
        _refuse(target, read)


def publish(
    source: Path, target: Path, summary: Summary, about: str, refining: card.Refining, read: Iterable[Path] = ()
) -> None:
    """Copy the final model into the run folder, with a card that shows its turn table, and how it refines.

    The model that lies there goes once the new one has its place: a kill leaves one of them whole.
    """
    part, old = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.old")
    with _lock(target):
        _refuse(target, read)
        shutil.rmtree(part, ignore_errors=True)
        _copy(source, part)
        (part / "README.md").write_text(card.final(summary, about))
        (part / card.REFINING).write_text(refining.model_dump_json(indent=2) + "\n")
        (part / SUMS).write_text("".join(f"{folders.sha256_of(path)}  {name}\n" for name, path in _files(part).items()))
        sync_all(part)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(part, target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def _lock(target: Path) -> FileLock:
    return FileLock(target.with_name(f".{target.name}.lock"))


def _copy(source: Path, target: Path) -> None:
    """Copy contents alone: files get the mode that new ones get here, and weights are saved closed to others."""
    for name, path in _files(source).items():
        if name != SUMS:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def _refuse(target: Path, read: Iterable[Path]) -> None:
    for path in read:
        if path.resolve().is_relative_to(target.resolve()):
            raise _refusal(target, f"This run reads from it ({path}), and would put its own model in its place.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise _refusal(target, "It is no folder of its own, and this run would put its model in its place.")
    if foreign := _foreign(target):
        some = ", ".join(sorted(foreign)[:4]) + (", ..." if len(foreign) > 4 else "")
        what = f"This run would put its model in its place, and it holds what no run put there: {some}."
        raise _refusal(target, what)


def _foreign(folder: Path) -> list[str]:
    """Files that no run published, or that were changed since."""
    files = _files(folder)
    if sums := files.pop(SUMS, None):
        told = (line.partition("  ") for line in sums.read_text().splitlines())
        ours = {name: found for found, _, name in told}
        return [name for name, path in files.items() if path.is_symlink() or ours.get(name) != folders.sha256_of(path)]
    if card.REFINING not in files:
        return list(files)
    return [name for name in files if not any(fnmatch(name, kind) for kind in KINDS) or "/" in name]


def _files(folder: Path) -> dict[str, Path]:
    """All files below a folder by their names in it; a link is a file, wherever it leads."""
    found = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix(): path for path in found}


def _refusal(target: Path, what: str) -> RunError:
    return RunError(f"folder {target}", what, "Set output_dir to another folder, or move this one away.")
