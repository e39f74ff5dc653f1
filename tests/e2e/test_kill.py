"""Faults from outside: whatever stops a run, the same command goes on, and the end is the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one helper process has forked, killed and resumed runs."""
    folder = tmp_path_factory.mktemp("forks") / "runs"
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    helper = [sys.executable, str(Path(__file__).with_name("forks.py")), str(folder)]
    done = subprocess.run(helper, capture_output=True, text=True, env=one_thread, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def outcome(place: Path) -> dict[str, Any]:
    return json.loads((place / "outcome.json").read_text())


@pytest.fixture(scope="module")
def unbroken(place: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    assert outcome["whole"] == 0
    found = small_run.lasting(place / "whole")
    kinds = (
        "model/model.safetensors",
        "model/README.md",
        "drafts/base.jsonl",
        "summary.json",
        "metrics.jsonl",
    )
    assert set(kinds) < found.keys()
    assert any(name.endswith("/examples.jsonl") for name in found)
    return found


def assert_same(found: dict[str, Any], wanted: dict[str, Any], name: str) -> None:
    assert found.keys() == wanted.keys()
    for path, content in wanted.items():
        if path == "summary.json":
            content = content | {"name": name}
        if path == "model/README.md":
            content = content.replace(b"# whole\n", f"# {name}\n".encode())
        assert found[path] == content, path


def test_a_run_killed_at_every_step_ends_like_an_unbroken_one(
    place: Path, outcome: dict[str, Any], unbroken: dict[str, Any]
):
    killed = outcome["killed"]
    assert killed["code"] == 0
    assert killed["kills"] == len(killed["events"])
    assert_same(small_run.lasting(place / "killed"), unbroken, "killed")


def test_kills_came_at_every_boundary_and_inside_generation_and_training(place: Path, outcome: dict[str, Any]):
    events = outcome["killed"]["events"]
    boundaries = [event for event in events if event.startswith("rename to store/")]
    assert len(boundaries) == len(list((place / "whole" / "steps").iterdir()))
    for inside in (
        "2 forward passes after start",
        "rename to generate/chunk-00001.jsonl",
        "2 forward passes after generate/chunk-00000.jsonl",
        "rename to generate/drafts.jsonl",
        "rename to train/reference.safetensors",
        "2 forward passes after train/reference.safetensors",
        "2 forward passes after train/checkpoint",
        "rename to train/checkpoint.old",
        "rename to train/checkpoint between two renames",
        "rename to killed/model",
    ):
        assert inside in events


def test_a_killed_run_leaves_no_rubbish_in_the_store(place: Path, outcome: dict[str, Any]):
    folders = {path.name for path in (place / "killed" / "store").iterdir() if path.is_dir()}
    assert not [name for name in folders if name.endswith(".part")]
    for folder in (place / "killed" / "store").iterdir():
        if folder.is_dir():
            assert not [path.name for path in folder.iterdir() if path.name.startswith((".", "checkpoint", "chunk"))]


def test_two_processes_on_one_store_do_no_harm(place: Path, outcome: dict[str, Any], unbroken: dict[str, Any]):
    assert outcome["two"]["codes"] == [0, 0], (place / "two.out").read_text()
    assert_same(small_run.lasting(place / "two"), unbroken, "two")
    without = {name: content for name, content in unbroken.items() if not name.startswith("store/")}
    assert_same(small_run.lasting(place / "twin"), without, "two")  # which is called after its config


def test_a_second_process_on_one_folder_stops_at_once(place: Path, outcome: dict[str, Any]):
    assert outcome["two"]["third"] == 2
    assert f"A run is at work here (process {outcome['two']['first']})." in (place / "two.out").read_text()


def test_ctrl_c_stops_within_seconds_and_says_how_to_go_on(outcome: dict[str, Any]):
    stopped = outcome["interrupted"]
    assert stopped["code"] == 130
    assert stopped["seconds"] < 10
    assert stopped["said"].strip() == "Stopped. Run the same command again to go on where it stopped."


def test_a_full_disk_is_one_message_and_the_next_run_goes_on(
    place: Path, outcome: dict[str, Any], unbroken: dict[str, Any]
):
    *full, enough = outcome["full"]
    for attempt, step in zip(full, ("generate", "train"), strict=True):
        assert attempt["code"] == 2
        assert "Traceback" not in attempt["said"]
        assert f"store/{step}-" in attempt["said"] and "It cannot be written: File too large." in attempt["said"]
        assert "finished work is kept" in attempt["said"]
    assert enough["code"] == 0
    assert_same(small_run.lasting(place / "full"), unbroken, "full")
