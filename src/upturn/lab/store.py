"""The store of finished steps: a folder per result, named by its key, complete when its manifest is there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from upturn import __version__
from upturn.errors import RunError, told_by_system
from upturn.lab._memory import forget_peak, give_back, peak_mb
from upturn.tracking import progress

MANIFEST = "manifest.json"
LOCK, PID = ".run.lock", ".run.pid"
"""Hidden files of a run folder: held while a run is at work there, and by which process."""
_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
}
"""What the system says of a full, broken or forbidden disk."""


@dataclass(frozen=True, slots=True)
class Result:
    """A finished step: its key and where it lies."""

    key: str
    folder: Path
    manifest: dict[str, Any]
    cached: bool
    """Whether it was there already when asked for."""


def key_of(name: str, version: int, config: Any, inputs: Sequence[str]) -> str:
    """Hash of everything a result depends on."""
    text = json.dumps([name, version, config, list(inputs)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Planned:
    """A store that does nothing: it only remembers which steps a recipe asks for, and whether they are done.

    Keys come from names, configs and input keys alone, so a whole run can be planned before its first step.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[dict[str, Any]] = []

    def plan(
        self, label: str, name: str, version: int, config: Any, inputs: Sequence[str], guess: dict[str, Any]
    ) -> Result:
        """Note one step; `guess` stands for what it would find out."""
        key = key_of(name, version, config, inputs)
        found = _find(self.folder, name, key)
        self.steps.append({"name": label, "step": name, "key": key, "done": found is not None, "guess": guess})
        return found or Result(key, self.folder / f"{name}-{key}", {"facts": guess, "seconds": 0.0}, False)


class Store:
    """Finished steps under one folder; several runs and processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise unwritable(folder, error) from error

    def do(
        self,
        name: str,
        version: int,
        config: Any,
        inputs: Sequence[str],
        work: Callable[[Path], dict[str, Any]],
        accepts: Callable[[dict[str, Any]], bool] = lambda facts: True,
        label: str = "",
    ) -> Result:
        """Return the result of a step, doing the work only where it is not there.

        `work` gets a folder in which it may keep partial progress: an interrupted step finds it again. What it
        returns goes into the manifest. Another process that wants the same result waits, then reads it; `label` is
        what it says it waits for. A result whose facts are not accepted becomes partial progress again; one whose
        manifest cannot be read is done again from the beginning, since nothing vouches for its files.
        """
        key = key_of(name, version, config, inputs)
        if (found := _find(self.folder, name, key)) and accepts(found.manifest["facts"]):
            return found
        final, part = self.folder / f"{name}-{key}", self.folder / f"{name}-{key}.part"
        with writing(part), _alone(self.folder / f".{name}-{key}.lock", f"{label or name} ({key})"):
            if found := _find(self.folder, name, key):
                if accepts(found.manifest["facts"]):
                    return found
                shutil.rmtree(part, ignore_errors=True)
                os.replace(final, part)
            elif final.is_dir():
                aside = final.with_name(f"{final.name}.damaged")  # answers that were paid for may be in it
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(final, aside)
                progress.say(
                    f"{label or name} ({key}): its {MANIFEST} is damaged or gone, so it is done again; {aside} keeps it"
                )
            part.mkdir(exist_ok=True)
            began = time.time()
            give_back()
            forget_peak()
            facts = work(part)
            manifest = {
                "step": name,
                "key": key,
                "code_version": version,
                "config": config,
                "inputs": list(inputs),
                "upturn": __version__,
                "seconds": round(time.time() - began, 3),
                "peak_memory_mb": peak_mb(),
                "facts": facts,
            }
            sync_all(part)  # before its manifest: what has one is whole, also where the machine fails
            for stale in part.glob(".*"):  # half-written files of a killed process, and what the work left for itself
                stale.unlink()
            write_json(part / MANIFEST, manifest)
            sync(part / MANIFEST)
            sync(part)
            os.replace(part, final)
            sync(self.folder)
        return Result(key, final, manifest, False)


Steps = Store | Planned


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Be the only run in a run folder. Raises RunError where another one is at work: their files would mix.

    The system holds the lock, so a process that was killed leaves none. Stores are shared all the same.
    """
    held = FileLock(folder / LOCK)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(blocking=False)
        except Timeout as error:
            what = f"A run is at work here (process {_pid(folder)})."
            raise RunError(f"run folder {folder}", what, "Wait for it, or set output_dir to another folder.") from error
    try:
        with writing(folder):
            (folder / PID).write_text(str(os.getpid()))
        yield
    finally:
        held.release()


def _pid(folder: Path) -> str:
    """Who holds the lock of a run folder; it may not have told yet."""
    return ((folder / PID).read_text().strip() if (folder / PID).is_file() else "") or "unknown"


@contextmanager
def _alone(lock: Path, what: str) -> Iterator[None]:
    """Do something while no other process does it; say once where that means to wait."""
    held = FileLock(lock)
    try:
        held.acquire(blocking=False)
    except Timeout:
        progress.say(f"{what}: another run is at it, and this one waits for what it finds")
        held.acquire()
    try:
        yield
    finally:
        held.release()


def _find(folder: Path, name: str, key: str) -> Result | None:
    """The finished result, if it is there. A manifest that a failed disk left empty or cut tells of none."""
    place = folder / f"{name}-{key}"
    try:
        manifest = json.loads((place / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    whole = isinstance(manifest, dict) and isinstance(manifest.get("facts"), dict) and "seconds" in manifest
    return Result(key, place, manifest, True) if whole else None


def write_json(path: Path, data: Any) -> None:
    """Write by rename, so that a reader never sees half a file."""
    write_text(path, json.dumps(data, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write by rename."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    os.replace(scratch, path)


def sync_all(folder: Path) -> None:
    """Have a folder on the disk itself, with all that lies below it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk itself: else a machine that fails may keep a name alone."""
    if path.is_dir() and os.name != "posix":
        return  # only there a folder can be opened
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems know nothing of it
            raise
    finally:
        os.close(number)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make a message of a full disk or a folder that may not be written; all other errors pass."""
    try:
        yield
    except Exception as error:
        told = told_by_system(error)
        if told is None or told.errno not in _DISK:
            raise
        raise unwritable(folder, told) from error


def unwritable(path: Path, error: OSError) -> RunError:
    """The message for a full disk or a folder that cannot be written."""
    return RunError(
        f"folder {path}",
        f"It cannot be written: {error.strerror or error}.",
        "Free some space or choose another output_dir, and run the same command again: finished work is kept.",
    )
