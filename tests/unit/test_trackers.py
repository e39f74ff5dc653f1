"""Trackers: metrics under the promised names, on the promised axes, in the same run again."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from upturn.errors import ConfigError
from upturn.tracking import trackers

Event = dict[str, Any]


def stage(name: str, kind: str, **facts: Any) -> Event:
    return {"kind": "stage", "name": name, "state": kind} | facts


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
