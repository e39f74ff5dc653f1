"""The store: a result is there whole or not at all, keys know what they depend on, work is done once."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from upturn.errors import RunError
from upturn.lab.store import MANIFEST, PID, Planned, Store, at_work, key_of, write_json, writing
from upturn.tracking import progress


def worker(done: list[str], name: str = "work") -> Any:
    def work(folder: Path) -> dict[str, Any]:
        done.append(name)
        (folder / "result.txt").write_text("whole")
        return {"count": 3}

    return work


def test_a_finished_step_is_read_back(tmp_path: Path):
    done: list[str] = []
    first = Store(tmp_path).do("step", 1, {"a": 1}, ["x"], worker(done))
    again = Store(tmp_path).do("step", 1, {"a": 1}, ["x"], worker(done))
    assert done == ["work"]
    assert (first.cached, again.cached) == (False, True)
    assert again.folder == first.folder and again.manifest["facts"] == {"count": 3}
    assert (again.folder / "result.txt").read_text() == "whole"


@pytest.mark.parametrize(
    "other", [("step", 2, {"a": 1}, ["x"]), ("step", 1, {"a": 2}, ["x"]), ("step", 1, {"a": 1}, ["y"])]
)
def test_whatever_changes_makes_another_key(other: Any):
    assert key_of("step", 1, {"a": 1}, ["x"]) != key_of(*other)


def test_the_order_of_settings_makes_no_other_key():
    assert key_of("step", 1, {"a": 1, "b": 2}, []) == key_of("step", 1, {"b": 2, "a": 1}, [])


def test_an_interrupted_step_finds_its_progress_and_drops_half_files(tmp_path: Path):
    def stop(folder: Path) -> dict[str, Any]:
        (folder / "half.txt").write_text("so far")
        (folder / ".chunk.123").write_text("torn")
        raise KeyboardInterrupt

    def go_on(folder: Path) -> dict[str, Any]:
        return {"found": (folder / "half.txt").read_text()}

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).do("step", 1, {}, [], stop)
    result = Store(tmp_path).do("step", 1, {}, [], go_on)
    assert result.manifest["facts"] == {"found": "so far"}
    assert sorted(path.name for path in result.folder.iterdir()) == ["half.txt", "manifest.json"]


def test_two_askers_share_one_work(tmp_path: Path):
    started, go_on, done, results = threading.Event(), threading.Event(), [], []

    def slow(folder: Path) -> dict[str, Any]:
        started.set()
        go_on.wait(10)
        return worker(done)(folder)

    def ask(work: Any) -> None:
        results.append(Store(tmp_path).do("step", 1, {}, [], work))

    first = threading.Thread(target=ask, args=(slow,))
    first.start()
    started.wait(10)
    second = threading.Thread(target=ask, args=(worker(done, "second"),))
    second.start()
    go_on.set()
    first.join(10)
    second.join(10)
    assert done == ["work"]
    assert sorted(result.cached for result in results) == [False, True]


def test_who_waits_says_once_for_which_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    waits, started = threading.Event(), threading.Event()

    def say(text: str) -> None:
        said.append(text)
        waits.set()

    def slow(folder: Path) -> dict[str, Any]:
        started.set()
        assert waits.wait(10)
        return {}

    monkeypatch.setattr(progress, "say", say)
    first = threading.Thread(target=Store(tmp_path).do, args=("step", 1, {}, [], slow))
    first.start()
    started.wait(10)
    found = Store(tmp_path).do("step", 1, {}, [], worker([]), label="step sft")
    first.join(10)
    assert found.cached
    assert said == [f"step sft ({found.key}): another run is at it, and this one waits for what it finds"]


def test_a_result_is_on_the_disk_before_it_counts_as_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(number: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    def renamed(source: Path, target: Path) -> None:
        order.append(f"to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    folder = Store(tmp_path).do("step", 1, {}, [], worker([])).folder
    part = f"{folder.name}.part"
    assert order == ["result.txt", part, f"to {MANIFEST}", MANIFEST, part, f"to {folder.name}", tmp_path.name]


def test_a_plan_has_the_keys_of_the_run_and_writes_nothing(tmp_path: Path):
    plan = Planned(tmp_path / "store")
    expected = plan.plan("a step", "step", 1, {"a": 1}, ["x"], {"tokens": 5})
    assert list(tmp_path.iterdir()) == []
    found = Store(tmp_path / "store").do("step", 1, {"a": 1}, ["x"], worker([]))
    assert (found.key, found.folder) == (expected.key, expected.folder)
    plan.plan("a step", "step", 1, {"a": 1}, ["x"], {"tokens": 5})
    assert [step["done"] for step in plan.steps] == [False, True]


def test_json_is_written_whole_and_sorted(tmp_path: Path):
    write_json(tmp_path / "a.json", {"b": 1, "a": 2})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("left", ["", '{"facts": {"count"', "[]", "{}", None])
def test_a_result_with_a_damaged_manifest_is_done_again(tmp_path: Path, left: str | None):
    done: list[str] = []
    manifest = Store(tmp_path).do("step", 1, {}, [], worker(done)).folder / MANIFEST
    manifest.unlink() if left is None else manifest.write_text(left)
    (manifest.parent / "other.txt").write_text("of what is damaged")
    plan = Planned(tmp_path)
    plan.plan("a step", "step", 1, {}, [], {})
    assert [step["done"] for step in plan.steps] == [False]
    again = Store(tmp_path).do("step", 1, {}, [], worker(done))
    assert done == ["work", "work"] and not again.cached
    assert sorted(path.name for path in again.folder.iterdir()) == [MANIFEST, "result.txt"]


def test_a_run_folder_has_one_run_at_a_time(tmp_path: Path):
    folder = tmp_path / "run"
    refused = rf"run folder {folder}\n    A run is at work here \(process {os.getpid()}\).\n    Wait for it, or set"
    with at_work(folder):
        with pytest.raises(RunError, match=refused), at_work(folder):
            raise AssertionError
        with at_work(tmp_path / "other"):
            pass
    (folder / PID).write_text("1")
    with at_work(folder):
        assert (folder / PID).read_text() == str(os.getpid())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
        shutil.Error([("a", "b", str(OSError(errno.ENOSPC, "No space left on device")))]),
    ],
)
def test_a_full_disk_is_a_message(tmp_path: Path, error: Exception):
    with pytest.raises(RunError, match="It cannot be written: No space left on device"), writing(tmp_path):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "gone"),
        SafetensorError("bad header"),
        RuntimeError("ours (os error 28)"),
        shutil.Error([("a", "b", str(FileNotFoundError(errno.ENOENT, "gone")))]),
    ],
)
def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path, error: Exception):
    with pytest.raises(type(error)), writing(tmp_path):
        raise error
