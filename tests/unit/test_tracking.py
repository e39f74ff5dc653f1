"""Events: written as they come, read back whatever happened to the file, sent on under the promised names."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from upturn.errors import ConfigError, RunError
from upturn.tracking import events, progress, replay, trackers
from upturn.types import Attempt, Draft, Prompt, Score

Event = dict[str, Any]


class Kept:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = False

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["kind"] == kind]


class Broken(Kept):
    """A sink that takes nothing."""

    def __str__(self) -> str:
        return "broken"

    def emit(self, event: Event) -> None:
        raise ConnectionError("no route")

    close = emit  # type: ignore[assignment]


def read(path: Path) -> list[Event]:
    return list(replay.parsed(path.read_bytes()))


def attempt(*turns: int, scores: tuple[bool, ...] = ()) -> Attempt:
    drafts = tuple(Draft(i, turn, (), f"text {i}", (5, 2), (0.0, 0.0), "stop", 3, 0) for i, turn in enumerate(turns))
    return Attempt(Prompt("p", "question"), drafts, tuple(Score(float(right), right) for right in scores))


# The log


def test_every_event_is_a_line_with_its_time_and_kind(tmp_path: Path):
    before = time.time()
    with events.record([events.File(tmp_path / "log")], name="mine"):
        events.emit("train", label="sft", step=1, loss=0.5)
        assert len(read(tmp_path / "log")) == 2, "written at once"
    start, train, end = read(tmp_path / "log")
    assert (start["kind"], start["name"], start["pid"], start["host"]) == (
        *("start", "mine"),
        *(os.getpid(), socket.gethostname()),
    )
    assert train | {"time": 0} == {"time": 0, "kind": "train", "label": "sft", "step": 1, "loss": 0.5}
    assert (end["status"], end["message"]) == ("finished", "")
    assert before - 0.001 <= start["time"] <= train["time"] <= end["time"] <= time.time() + 0.001


def test_a_resumed_run_appends_and_half_a_line_spoils_no_other(tmp_path: Path):
    path = tmp_path / "log"
    with events.record([events.File(path)], name="first"):
        pass
    path.write_bytes(path.read_bytes()[:-7])  # killed in the middle of a line
    with events.record([events.File(path)], name="second"):
        pass
    assert [event["kind"] for event in read(path)] == ["start", "start", "end"]
    assert [event["name"] for event in read(path)[:2]] == ["first", "second"]


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path):
    with events.record([events.File(tmp_path / "log")]):
        events.emit("stage", facts={"kl": float("nan"), "list": [float("inf"), 1.5]})
    line = (tmp_path / "log").read_text().splitlines()[1]
    assert json.loads(line, parse_constant=pytest.fail)["facts"] == {"kl": None, "list": [None, 1.5]}


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
        (ValueError("no"), "failed", "ValueError: no"),
        (RunError("where", "what", "mend"), "failed", "where\n    what\n    mend"),
    ],
)
def test_an_error_ends_the_log_and_goes_on_upwards(error: BaseException, status: str, message: str):
    kept = Kept()
    with pytest.raises(type(error)), events.record([kept]):
        raise error
    assert (kept.events[-1]["status"], kept.events[-1]["message"]) == (status, message)
    assert kept.closed
    events.emit("train")
    assert kept.events[-1]["kind"] == "end", "nobody listens any more"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_once_and_stops_nothing(capsys: pytest.CaptureFixture[str]):
    kept = Kept()
    progress.set_mode("plain")
    with events.record([events.File(Path("/dev/full")), kept]):
        events.emit("train", step=1)
    said = capsys.readouterr().err
    assert said.count("The run goes on") == 1
    assert "/dev/full: OSError: " in said
    assert [event["kind"] for event in kept.events] == ["start", "train", "end"]


def test_a_broken_sink_is_said_once_and_the_others_hear_all(capsys: pytest.CaptureFixture[str]):
    kept = Kept()
    progress.set_mode("plain")
    with events.record([Broken(), kept]):
        events.emit("train")
    assert capsys.readouterr().err.split(". ")[0] == "broken: ConnectionError: no route"
    assert len(kept.events) == 3


def test_a_disk_that_has_room_again_gets_whole_lines(tmp_path: Path):
    file = events.File(tmp_path / "log")
    file.emit({"kind": "one"})
    assert file._file
    whole = file._file
    file._file = type("Full", (), {"write": lambda self, line: whole.write(line[:5])})()  # type: ignore[assignment]
    with pytest.raises(OSError, match="half a line"):
        file.emit({"kind": "two"})
    file._file = whole
    file.emit({"kind": "three"})
    file.close()
    assert [event["kind"] for event in read(tmp_path / "log")] == ["one", "three"]


def test_an_event_costs_microseconds(tmp_path: Path):
    with events.record([events.File(tmp_path / "log")]):
        began = time.perf_counter()
        for step in range(1000):
            events.emit("train", label="sft", step=step, loss=0.5, rewards=[0.1] * 10)
        spent = time.perf_counter() - began
    assert spent < 1.0, "1 ms each would still be nothing beside an optimizer step"
    assert len(read(tmp_path / "log")) == 1002


# What is told seldom


class Clock:
    """Time that stands still."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made)
    return made


def test_a_bar_tells_once_a_second_and_how_it_ends(clock: Clock):
    kept = Kept()
    with events.record([kept]), progress.track("sft", 100, "steps") as bar:
        for step in range(45):  # 4.5 seconds
            clock.now += 0.1
            bar.advance(1, f"loss {step}")
    told = kept.of("progress")
    assert [event["done"] for event in told] == [0, 10, 20, 30, 40, 45]
    assert told[-1] | {"time": 0} == {
        **{"time": 0, "kind": "progress", "label": "sft", "done": 45, "total": 100},
        **{"unit": "steps", "rate": 10.0, "extra": "loss 44"},
    }


def test_two_bars_tell_each_for_itself_and_an_error_leaves_the_last_count(clock: Clock):
    kept = Kept()
    with events.record([kept]):
        for label in ("sft: reference", "sft: training"):
            with pytest.raises(ValueError), progress.track(label, 9, "pairs") as bar:
                bar.advance(3)
                raise ValueError
    counts = [(event["label"], event["done"]) for event in kept.of("progress")]
    assert counts == [(label, done) for label in ("sft: reference", "sft: training") for done in (0, 3)]


def test_nothing_is_due_where_nobody_listens():
    assert not events.due("x", 0)


def test_a_sample_shows_the_first_answer_of_each_turn_of_a_refined_attempt(clock: Clock):
    kept = Kept()
    with events.record([kept]):
        events.sample("parallel", [attempt(1, 1)])
        events.sample("measure", [attempt(1, 1), attempt(1, 2, 2)])
        clock.now += 9.9
        events.sample("too early", [attempt(1, 2)])
        events.sample("judged", [attempt(1, 2, scores=(False, True))])
        clock.now += 0.1
        events.sample("again", [attempt(1, 2)])
    texts = [{"turn": 1, "text": "text 0", "right": None}, {"turn": 2, "text": "text 1", "right": None}]
    told = kept.of("draft")
    assert [event["label"] for event in told] == ["measure", "judged", "again"]
    assert (told[0]["prompt"], told[0]["drafts"]) == ("question", texts)
    assert [draft["right"] for draft in told[1]["drafts"]] == [False, True]


def test_a_scorer_that_calls_nothing_right_leaves_no_verdicts():
    kept = Kept()
    with events.record([kept]):
        events.sample("reward", [attempt(1, 2, scores=(False, False))])
    assert [draft["right"] for draft in kept.of("draft")[0]["drafts"]] == [None, None]


# The state of a run


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


# Trackers


def numbers(*told: Event) -> list[tuple[dict[str, float], int]]:
    from upturn.tracking.trackers._base import Metrics

    found: list[tuple[dict[str, float], int]] = []
    sink = Metrics("test", lambda values, step, when: found.append((values, step)), lambda finished: None)
    for event in told:
        sink.emit({"time": 1.0} | event)
    return found


TURNS = [{"turn": 1, "accuracy": 0.25, "low": 0.2, "high": 0.3}, {"turn": 2, "accuracy": 0.5, "low": 0.4, "high": 0.6}]
TOLD: list[Event] = [
    {"kind": "measure", "label": "base", "iteration": 0, "turns": TURNS[:1], "gain": None},
    stage("train sft", "cached", facts={"steps": 40}),
    stage("train iteration 1", "began"),
    {"kind": "train", "label": "iteration 1", "step": 1, "loss": 0.5, "direct/loss": 0.25},
    stage("train iteration 1", "done", facts={"steps": 10}),
    stage("score iteration 1", "done", facts={"drafts": 8}),
    {"kind": "train", "label": "iteration 2", "step": 2, "loss": 0.125},
    {"kind": "measure", "label": "iteration 2", "iteration": 2, "turns": TURNS, "gain": {"points": 25.0}},
    {"kind": "end", "status": "finished"},
]
SENT = [
    ({"measure/turn_1": 0.25}, 0),
    ({"train/loss": 0.5, "train/direct/loss": 0.25}, 41),
    ({"train/loss": 0.125}, 52),
    ({"measure/turn_1": 0.25, "measure/turn_2": 0.5, "measure/gain": 25.0}, 2),
]


def test_metrics_have_their_names_and_steps_count_over_all_trainings():
    assert numbers(*TOLD) == SENT


def about(folder: Path) -> trackers.Run:
    return trackers.Run("mine", folder, {"seed": 3})


def test_the_folder_is_the_registry():
    assert trackers.names() == ["tensorboard", "trackio", "wandb"]


def import_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import a tracker's file at its next use, and once more after this test."""
    module = f"upturn.tracking.trackers.{name}"
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    del sys.modules[module]


@pytest.mark.parametrize(
    ("name", "needed"), [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio"), ("wandb", "wandb")]
)
def test_an_absent_library_says_how_to_get_it(name: str, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, needed, None)
    import_anew(name, monkeypatch)
    with pytest.raises(ConfigError) as error:
        trackers.start([name], about(tmp_path))
    assert error.value.where == f"track: {name}"
    assert f'pip install "upturn[{name}]"' in error.value.mend


class FakeRun:
    """What `wandb.init` and `trackio.init` give, as far as it is used."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.asked, self.logged, self.axes, self.code = asked, [], {}, -1

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((values, step))

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def finish(self, exit_code: int | None = None) -> None:
        self.code = exit_code


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """A library of the parameter's name that records its runs, in place of the real one."""
    runs: list[FakeRun] = []
    library = types.ModuleType(request.param)
    library.init = lambda **asked: runs.append(FakeRun(asked)) or runs[-1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, request.param, library)
    import_anew(request.param, monkeypatch)
    for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    return runs


def told_to(name: str, folder: Path, told: list[Event] = TOLD) -> None:
    (sink,) = trackers.start([name], about(folder))
    for event in told:
        sink.emit({"time": 1.0} | event)
    sink.close()


@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
def test_wandb_gets_metrics_against_their_own_axes_and_the_same_run_again(fake: list[FakeRun], tmp_path: Path):
    told_to("wandb", tmp_path)
    told_to("wandb", tmp_path, TOLD[:2])  # was stopped
    first, second = fake
    assert first.axes == {"train/*": "train/step", "measure/*": "measure/iteration"}
    axes = ("measure/iteration", "train/step", "train/step", "measure/iteration")
    assert first.logged == [(values | {axis: step}, None) for (values, step), axis in zip(SENT, axes, strict=True)]
    assert (first.code, second.code) == (0, 1)
    assert first.asked["id"] == second.asked["id"] and first.asked["resume"] == "allow"
    assert (first.asked["project"], first.asked["name"], first.asked["config"]) == ("upturn", "mine", {"seed": 3})


@pytest.mark.parametrize("fake", ["trackio"], indirect=True)
def test_trackio_gets_metrics_by_step_and_the_same_run_again(fake: list[FakeRun], tmp_path: Path):
    told_to("trackio", tmp_path)
    told_to("trackio", tmp_path)
    assert fake[0].logged == SENT
    assert fake[0].asked == fake[1].asked
    assert fake[0].asked["name"].startswith("mine-")


@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
def test_a_tracker_that_does_not_start_is_a_message_and_closes_the_others(
    fake: list[FakeRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    library = types.ModuleType("trackio")
    library.init = lambda **asked: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", library)
    import_anew("trackio", monkeypatch)
    with pytest.raises(ConfigError, match="It does not start: ZeroDivisionError"):
        trackers.start(["wandb", "trackio"], about(tmp_path))
    assert fake[0].code == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_files_hold_the_metrics(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-not-found]

    told_to("tensorboard", tmp_path)
    files = EventAccumulator(str(tmp_path / "tensorboard"))
    files.Reload()
    assert [(p.step, p.value, p.wall_time) for p in files.Scalars("train/loss")] == [(41, 0.5, 1.0), (52, 0.125, 1.0)]
    assert [(point.step, point.value) for point in files.Scalars("measure/turn_2")] == [(2, 0.5)]


@pytest.mark.filterwarnings("ignore")
def test_trackio_itself_keeps_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage  # type: ignore[import-not-found]

    told_to("trackio", tmp_path)
    name = about(tmp_path).identity()
    rows = SQLiteStorage.get_logs("upturn", f"mine-{name}")
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [(41, 0.5), (52, 0.125)]


@pytest.mark.filterwarnings("ignore")
def test_wandb_itself_takes_the_metrics_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    pytest.importorskip("wandb", reason="wandb is not installed")
    told_to("wandb", tmp_path)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(about(tmp_path).identity())
    (log,) = folder.glob("run-*.wandb")
    until = time.monotonic() + 10  # its own process writes the last bytes
    while b"train/direct/loss" not in log.read_bytes() and time.monotonic() < until:
        time.sleep(0.05)
    assert b"train/direct/loss" in log.read_bytes() and b"measure/turn_2" in log.read_bytes()
