"""Events: written as they come, readable whatever happened to the file, and told no oftener than needed."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from upturn.errors import RunError
from upturn.tracking import events, progress, replay
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


def test_what_was_finished_before_says_nothing_of_the_rate(clock: Clock):
    kept = Kept()
    with events.record([kept]), progress.track("sft", 1000, "steps") as bar:
        bar.find(900)
        clock.now += 10
        bar.advance(1)
    assert [(event["done"], event["rate"]) for event in kept.of("progress")] == [(0, 0.0), (901, 0.1)]


def test_a_line_of_progress_needs_nothing_finished(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    monkeypatch.setattr(progress, "_mode", "plain")
    with progress.track("measure", 300, "drafts") as bar:
        for done in (0, 40):
            clock.now += 40
            bar.advance(done)
    assert said == [
        "measure: 0/300, 0.0 drafts/s, nothing finished yet",
        "measure: 40/300, 0.5 drafts/s, 520 s left",
    ]


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
