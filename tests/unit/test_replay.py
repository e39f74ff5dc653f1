"""The state of a run, from what its log says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from upturn.errors import RunError
from upturn.tracking import events, replay

Event = dict[str, Any]


def state(*told: Event) -> replay.Replay:
    made = replay.Replay()
    for second, event in enumerate(told):
        made.take({"time": 100.0 + second} | event)
    return made


def start(**facts: Any) -> Event:
    return {"kind": "start", "name": "mine", "pid": os.getpid(), "host": socket.gethostname()} | facts


def stage(name: str, kind: str, **facts: Any) -> Event:
    return {"kind": "stage", "name": name, "state": kind} | facts


def at(done: int, **facts: Any) -> Event:
    told = {"label": "sft", "done": done, "total": 100, "unit": "steps", "rate": 9.0, "extra": ""}
    return {"kind": "progress"} | told | facts


def dead() -> int:
    """The id of a process that is no more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_run_without_a_last_word_runs_or_was_killed():
    assert state(start()).status() == "running"
    assert state(start(pid=dead())).status() == "killed"
    assert state(start(pid=dead(), host="elsewhere")).status() == "running"
    assert state(start(pid=None)).status() == "unknown"


@pytest.mark.parametrize("status", ["finished", "stopped", "failed"])
def test_a_last_word_counts_until_the_next_start(status: str):
    end = {"kind": "end", "status": status, "message": "", "pid": os.getpid()}
    assert state(start(), end).status() == status
    assert state(start(), end, start()).status() == "running"


def test_the_end_of_another_process_is_not_the_end():
    other = dead()
    assert state(start(pid=other), start(), {"kind": "end", "status": "finished", "pid": other}).status() == "running"


def test_steps_go_from_waiting_to_done_in_the_order_planned():
    plan = start(steps=["generate sft", "train sft", "generate sft"])
    found = state(
        plan,
        stage("generate sft", "cached", seconds=7.0, facts={}),
        stage("train sft", "began"),
        stage("train sft", "done", seconds=3.0, facts={}),
        stage("generate sft", "began"),
        stage("unplanned", "done", seconds=1.0),
        stage("train sft", "cached", seconds=3.0),  # a second process on the same run folder
    )
    assert [(step.name, step.state, step.seconds, step.began) for step in found.steps] == [
        ("generate sft", "cached", 7.0, 0.0),
        ("train sft", "done", 3.0, 102.0),
        ("generate sft", "began", 0.0, 104.0),
        ("unplanned", "done", 1.0, 0.0),
    ]


def test_a_training_that_is_taken_up_again_replaces_what_it_told():
    train = {"kind": "train", "label": "sft"}
    found = state(
        stage("train sft", "began"),
        *(train | {"step": step, "loss": 9.0} for step in (1, 2, 3)),
        start(),
        stage("train sft", "began"),
        *(train | {"step": step, "loss": 1.0} for step in (1, 2)),
    )
    assert found.losses == {"sft": {1: 1.0, 2: 1.0}}


def test_the_rate_leaves_out_what_was_there_before():
    # told at second 0; 60 of 100 were found done; then 2 a second
    found = state(at(0), at(61), at(63), at(65))
    assert found.rate == 2.0
    assert state(at(0), at(61)).rate == 9.0, "as the bar says"
    assert state(at(5, label="other"), at(0), at(1), at(4)).rate == 3.0
    assert not state(at(0), stage("train sft", "done")).progress


def test_what_is_not_understood_changes_nothing():
    odd: list[Event] = [
        {},
        {"kind": "later"},
        {"kind": "train", "label": "sft", "step": "x", "loss": 1},
        {"kind": "measure", "label": "base"},
        {"kind": "progress", "label": "sft"},
        at(1, total="many"),
        {"kind": "stage"},
        {"kind": ["list"]},
        {"kind": "draft", "drafts": [None]},
    ]
    assert state(*odd) == replay.Replay(last_time=107.0), "the unknown kinds move the clock"


def test_the_log_is_read_on_from_where_it_was(tmp_path: Path):
    log = tmp_path / events.FILE
    line = json.dumps(start() | {"time": 1.0}).encode()
    log.write_bytes(line + b"\n" + b'{"time": 2.0, "kind": "st')
    source = replay.Source(tmp_path)
    assert source.read().steps == []
    with log.open("ab") as file:
        file.write(b'age", "name": "a", "state": "began"}\n')
    assert [step.name for step in source.read().steps] == ["a"]
    log.write_bytes(line + b"\n")  # the folder was removed and the run begun anew
    assert source.read().steps == []


def test_no_folder_and_no_run_are_one_clear_message(tmp_path: Path):
    with pytest.raises(RunError, match="no such folder"):
        replay.Source(tmp_path / "absent")
    with pytest.raises(RunError, match="holds no run"):
        replay.Source(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(RunError, match="not a summary"):
        replay.Source(tmp_path).read()
