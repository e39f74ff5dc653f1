"""A run and who looks at it: every event of a real run, and its picture at any width, alive, dead or long over."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from upturn.cli import watch
from upturn.cli.main import app
from upturn.evaluation.summary import Summary
from upturn.lab import session
from upturn.tracking import events, replay

Event = dict[str, Any]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    model = tiny.save(folder / "model", characters=tiny.SUMS)
    return small_run.write(folder / "first.yaml", model, iterations=1, measure={"prompts": 6, "turns": 3})


@pytest.fixture(scope="module")
def run(config: Path) -> tuple[Path, Summary]:
    return session.run(str(config), [])


@pytest.fixture(scope="module")
def told(run: tuple[Path, Summary]) -> list[Event]:
    """The events of the first session."""
    return list(replay.parsed((run[0] / events.FILE).read_bytes()))


def of(told: list[Event], kind: str) -> list[Event]:
    return [event for event in told if event["kind"] == kind]


# What a run tells


def test_a_run_begins_ends_and_never_goes_back_in_time(config: Path, run: tuple[Path, Summary], told: list[Event]):
    assert [event["kind"] for event in (told[0], told[-1])] == ["start", "end"]
    summary, start = run[1], told[0]
    names = ("name", "recipe", "model", "task")
    assert [start[name] for name in names] == [getattr(summary, name) for name in names]
    assert Path(start["config"]).is_file() and start["pid"] == os.getpid()
    assert start["steps"] == [step["name"] for step in session.plan(str(config), [])["steps"]]
    assert told[-1]["status"] == "finished"
    times = [event["time"] for event in told]
    assert times == sorted(times)


def test_every_step_is_told_when_it_begins_and_when_it_is_done(run: tuple[Path, Summary], told: list[Event]):
    stages = [(event["name"], event["state"]) for event in of(told, "stage")]
    wanted: list[tuple[str, str]] = []
    for stage in run[1].stages:
        wanted += [(stage.name, "cached")] if stage.cached else [(stage.name, "began"), (stage.name, "done")]
    assert stages == wanted
    done = {event["name"]: event for event in of(told, "stage") if event["state"] == "done"}
    assert done["train sft"]["facts"]["steps"] == run[1].training[0].steps


def test_every_optimizer_step_is_told_with_all_its_metrics(run: tuple[Path, Summary], told: list[Event]):
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == sum(row.steps for row in run[1].training) > 2
    assert [{k: v for k, v in event.items() if k not in ("time", "kind")} for event in of(told, "train")] == lines


def test_every_measurement_is_told(run: tuple[Path, Summary], told: list[Event]):
    for event, measured in zip(of(told, "measure"), run[1].measurements, strict=True):
        assert (event["label"], event["iteration"], event["n"]) == (measured.label, measured.iteration, 6)
        assert [(row["turn"], row["accuracy"], row["low"], row["high"]) for row in event["turns"]] == [
            (row.turn, row.accuracy, row.low, row.high) for row in measured.turns
        ]
        assert measured.gain and event["gain"] == {
            name: getattr(measured.gain, name) for name in ("points", "low", "high")
        }


def test_progress_ends_at_the_last_unit_and_a_sample_has_three_turns(told: list[Event]):
    last = {event["label"]: event for event in of(told, "progress")}
    assert {"measure base", "sft", "sft: training", "iteration 1: reference", "iteration 1: training"} <= last.keys()
    assert all(event["done"] == event["total"] for event in last.values())
    assert [draft["turn"] for draft in of(told, "draft")[0]["drafts"]] == [1, 2, 3]


def test_running_again_appends_what_was_read_back_and_every_measurement(
    config: Path, run: tuple[Path, Summary], told: list[Event]
):
    before = small_run.lasting(run[0])
    session.run(str(config), [])
    assert small_run.lasting(run[0]) == before, "events are no result"
    again = list(replay.parsed((run[0] / events.FILE).read_bytes()))[len(told) :]
    assert {event["state"] for event in of(again, "stage")} == {"cached"}
    assert [event["label"] for event in of(again, "measure")] == [event["label"] for event in of(told, "measure")]
    assert not of(again, "train")


def test_ctrl_c_and_errors_are_the_last_word(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for error, status in ((KeyboardInterrupt(), "stopped"), (RuntimeError("out of luck"), "failed")):

        def fails(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("upturn.lab.work.generate", fails)
        with pytest.raises(type(error)):
            session.run(str(config), [f"output_dir={tmp_path / status}"])
        assert replay.Source(tmp_path / status).read().status() == status
    assert "RuntimeError: out of luck" in shown(tmp_path / "failed")


def test_trackers_stand_in_the_config_and_in_no_key(config: Path, run: tuple[Path, Summary]):
    plain, tracked = (session.plan(str(config), settings) for settings in ([], ["track=[tensorboard, wandb]"]))
    assert tracked["config"]["track"] == ["tensorboard", "wandb"]
    assert session.plan(str(config), ["track=trackio"])["config"]["track"] == ["trackio"]
    assert tracked["steps"] == plain["steps"]
    refused = CliRunner().invoke(app, ["run", str(config), "track=[wandbb]"])
    assert refused.exit_code == 2
    assert "track.0 = 'wandbb'" in refused.stderr and "choose from tensorboard, trackio, wandb" in refused.stderr


# What a stranger sees


def shown(folder: Path, width: int = 80, height: int | None = None, after: float = 5) -> str:
    """The picture of a run some seconds after its last event, without the spaces at the ends of lines."""
    state = replay.Source(folder).read()
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(watch.frame(state, state.last_time + after, width, coloured=False, height=height))
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


def copied(run: Path, folder: Path, told: list[Event]) -> Path:
    """A run folder with another log."""
    folder.mkdir()
    shutil.copy(run / "summary.json", folder)
    (folder / events.FILE).write_text("".join(json.dumps(event) + "\n" for event in told))
    return folder


@pytest.fixture
def gone() -> int:
    """The id of a process that is no more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_finished_run_shows_its_turns_its_loss_and_a_sample(run: tuple[Path, Summary]):
    done = CliRunner().invoke(app, ["watch", str(run[0])])
    assert done.exit_code == 0, done.output
    assert "first · evolve" in done.output and "finished after 0:" in done.output
    assert re.search(r"right in % +turn 1 +turn 2 +turn 3 +curve", done.output)
    for measured in run[1].measurements:
        row = next(line for line in done.output.splitlines() if line.startswith(measured.label))
        assert re.findall(r"\d+\.\d", row)[:3] == [f"{100 * turn.accuracy:.1f}" for turn in measured.turns]
    assert "loss of iteration 1" in done.output
    assert "a sample of " in done.output


def test_a_killed_run_says_where_it_broke_off(run: tuple[Path, Summary], told: list[Event], gone: int, tmp_path: Path):
    cut = next(place for place, event in enumerate(told) if event.get("name") == "train iteration 1") + 1
    begun = [told[0] | {"pid": gone}, *told[1:cut], {"kind": "progress", "label": "iteration 1: training"}]
    begun[-1] |= {"time": begun[-2]["time"] + 1, "done": 3, "total": 9, "unit": "steps", "rate": 1.0, "extra": "loss 1"}
    seen = shown(copied(run[0], tmp_path / "killed", begun))
    assert "killed after 0:0" in seen and "The same command again goes on where it stopped." in seen
    assert re.search(r"✗ train iteration 1 +broken off", seen)
    assert re.search(r"iteration 1: training +3/9 steps", seen)
    assert "left" not in seen, "nothing goes on"
    assert re.search(r"· generate measure iteration 1\n", seen)


def test_a_running_run_says_how_fast_and_how_long(run: tuple[Path, Summary], told: list[Event], tmp_path: Path):
    cut = next(place for place, event in enumerate(told) if event.get("name") == "train sft") + 1
    mark = {"kind": "progress", "label": "sft: training", "total": 300, "unit": "steps", "rate": 9.0, "extra": "loss 2"}
    begun = told[:cut] + [mark | {"time": told[cut]["time"] + at, "done": 2 * at} for at in range(1, 60)]
    seen = shown(copied(run[0], tmp_path / "running", begun))
    assert "running for 1:0" in seen and f"pid {os.getpid()}" in seen
    assert re.search(r"sft: training +118/300 steps", seen)
    assert "2.0 steps/s · 1:31 left · loss 2" in seen  # (300 - 118) / 2 seconds
    assert re.search(r"▶ train sft +1:0", seen)


def test_a_silent_run_on_another_machine_says_so(run: tuple[Path, Summary], told: list[Event], tmp_path: Path):
    folder = copied(run[0], tmp_path / "far", [told[0] | {"host": "far-away"}])
    seen = shown(folder, after=200)
    assert "running for 3:20, silent for 3:20" in seen and "on far-away" in seen


def test_a_run_without_events_shows_its_summary(run: tuple[Path, Summary], tmp_path: Path):
    old = tmp_path / "old"
    old.mkdir()
    for name in ("summary.json", "metrics.jsonl"):
        shutil.copy(run[0] / name, old)
    seen, new = shown(old), shown(run[0])
    assert "finished" in seen.splitlines()[0]
    table = re.compile(r"right in %.*?\n\n", re.DOTALL)
    assert table.findall(seen) and table.findall(seen) == table.findall(new)
    assert "loss of iteration 1" in seen
    (old / "summary.json").write_text((old / "summary.json").read_text().replace('"finished"', '"running"'))
    assert "not finished; it keeps no events" in shown(old)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_no_line_is_wider_than_the_terminal_and_the_table_is_whole(run: tuple[Path, Summary], width: int):
    lines = shown(run[0], width).splitlines()
    assert max(cell_len(line) for line in lines) <= width
    if width >= 80:
        assert not [line for line in lines if "turn 1" in line and "…" in line]
        assert any("turn 3" in line and "gain in points" in line for line in lines)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 30)])
def test_a_small_terminal_holds_all_but_long_samples(run: tuple[Path, Summary], width: int, height: int):
    assert len(shown(run[0], width, height).splitlines()) <= height


@pytest.mark.parametrize(
    ("values", "width", "blocks"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([1, 3, 5], 2, "▁█"),
        ([5.0, 5.0], 9, "▁▁"),
        ([], 9, ""),
    ],
)
def test_a_sparkline_is_made_of_means(values: list[float], width: int, blocks: str):
    assert watch.sparkline(values, width) == blocks


def test_a_sparkline_may_share_its_scale():
    assert watch.sparkline([0.0, 0.5], 2, 0.0, 1.0) == "▁▅"


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0:00"), (7.4, "0:07"), (133, "2:13"), (3599.6, "1:00:00"), (3733, "1:02:13")]
)
def test_clock(seconds: float, text: str):
    assert watch.clock(seconds) == text


def test_no_run_is_one_clear_message(tmp_path: Path):
    for folder, what in ((tmp_path / "later", "There is no such folder."), (tmp_path, "It holds no run")):
        done = CliRunner().invoke(app, ["watch", str(folder)])
        assert done.exit_code == 2
        assert f"run folder {folder}" in done.stderr and what in done.stderr and "Traceback" not in done.output


def test_a_run_in_runs_is_found_by_its_name(run: tuple[Path, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    copied(run[0], tmp_path / "runs" / "mine", [])
    assert CliRunner().invoke(app, ["watch", "mine"]).exit_code == 0


def test_looking_does_not_bring_torch(run: tuple[Path, Summary]):
    code = f"from upturn.cli import watch; watch.show({str(run[0])!r}, once=True, interval=1, follow=False)\n"
    code += "import sys; sys.exit(any(name in sys.modules for name in ('torch', 'scipy', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


# In a terminal


class Terminal:
    """`upturn watch` in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.end, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        command = [sys.executable, "-m", "upturn.cli.main", "watch", "--interval", "0.1", *arguments]
        environment = os.environ | {"TERM": "xterm-256color"}

        def lead() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in what a shell started behind an &

        streams = {"stdin": other, "stdout": other, "stderr": other}
        self.child = subprocess.Popen(command, **streams, env=environment, preexec_fn=lead)  # type: ignore[call-overload]
        os.close(other)
        self.seen = ""

    def until(self, text: str, seconds: float = 30) -> bool:
        """Read until a text was shown."""
        stop = time.monotonic() + seconds
        while text not in self.seen and time.monotonic() < stop:
            if select.select([self.end], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.end, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
        return text in self.seen

    def press(self, key: bytes) -> None:
        os.write(self.end, key)

    def left(self) -> int:
        """Exit code."""
        self.until("\0never\0", 10)
        return self.child.wait(10)


@pytest.fixture
def going_on(run: tuple[Path, Summary], told: list[Event], tmp_path: Path) -> Iterator[Path]:
    """A run folder whose process, this one, is alive."""
    yield copied(run[0], tmp_path / "mine", told[:-1])


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "Ctrl-C"])
def test_a_running_run_is_shown_until_a_key(going_on: Path, key: bytes):
    terminal = Terminal(str(going_on))
    assert terminal.until("running for")
    terminal.press(key)
    assert terminal.left() == 0
    assert terminal.seen.count("\x1b[?1049h") == terminal.seen.count("\x1b[?1049l") == 1, "the old screen is back"
    assert "Stopped" not in terminal.seen and "Traceback" not in terminal.seen


def test_the_end_of_the_run_is_the_end_of_watching(going_on: Path, told: list[Event]):
    terminal = Terminal(str(going_on))
    assert terminal.until("running for")
    with (going_on / events.FILE).open("a") as log:
        log.write(json.dumps(told[-1]) + "\n")
    assert terminal.left() == 0
    assert "finished after" in terminal.seen.rpartition("\x1b[?1049l")[2]


def test_a_finished_run_is_followed_only_on_request(run: tuple[Path, Summary]):
    terminal = Terminal(str(run[0]))
    assert terminal.left() == 0
    assert "\x1b[?1049h" not in terminal.seen and "finished after" in terminal.seen
    terminal = Terminal(str(run[0]), "--follow")
    assert terminal.until("finished after")
    time.sleep(0.3)
    assert terminal.child.poll() is None
    terminal.child.send_signal(signal.SIGINT)
    assert terminal.left() == 0
