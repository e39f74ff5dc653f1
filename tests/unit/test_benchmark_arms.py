"""The arms of a benchmark: how they are asked, which are up at a time, and what counts as their memory."""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from benchmark_room import BENCHMARKS, module

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


ARM = """
import sys; sys.path.insert(0, {path!r})
import _child
def handle(question):
    print("a library talks")
    return {{"seconds": 1.0, "cpu_seconds": 0.5, "twice": 2 * question["x"]}}
_child.serve(handle)
"""


def test_an_arm_answers_and_what_it_prints_does_not_matter(tmp_path: Path):
    child = module("_child")
    (tmp_path / "arm.py").write_text(ARM.format(path=str(BENCHMARKS)))
    with child.Child(str(tmp_path / "arm.py"), []) as arm:
        first, second = arm.ask(x=3), arm.ask(x=4)
    assert (first["twice"], second["twice"]) == (6, 8)
    assert first["peak_mib"] > 1


def test_an_arm_that_fails_says_why(tmp_path: Path):
    child = module("_child")
    (tmp_path / "arm.py").write_text("raise SystemExit('no such thing as vllm here')")
    with child.Child(str(tmp_path / "arm.py"), []) as arm, pytest.raises(child.ChildError, match="no such thing"):
        arm.ask()


def test_an_arm_that_takes_too_long_is_ended(tmp_path: Path):
    child = module("_child")
    (tmp_path / "arm.py").write_text("import time; time.sleep(60)")
    with (
        child.Child(str(tmp_path / "arm.py"), [], limit=0.2) as arm,
        pytest.raises(child.ChildError, match="no answer"),
    ):
        arm.ask()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_arms_start_at_once_on_a_gpu_and_in_turn_elsewhere(device: str):
    done: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name
            done.append(f"start {name}")

        def close(self) -> None:
            done.append(f"close {self.name}")

    with module("_child").Arms({"a": lambda: Fake("a"), "b": lambda: Fake("b")}, device) as arms:
        with arms.of("a"):
            done.append("ask a")
        arms.drop("a")
        with arms.of("b"):
            done.append("ask b")
    in_turn = ["start a", "ask a", "close a", "start b", "ask b", "close b"]
    at_once = ["start a", "start b", "ask a", "close a", "ask b", "close b"]
    assert done == (at_once if device == "cuda" else in_turn)


def test_candidates_that_lose_are_closed_and_those_that_fail_say_why():
    tree_step, child = module("tree_step"), module("_child")
    dropped: list[str] = []
    took = {"slow": 2.0, "fast": 1.0, "fails": None, "late": 3.0}

    class Arm:
        def __init__(self, seconds: float | None) -> None:
            self.seconds = seconds

        def ask(self) -> dict[str, float]:
            if self.seconds is None:
                raise child.ChildError("out of memory")
            return {"seconds": self.seconds}

    class Arms:
        def of(self, name: str) -> Any:
            return nullcontext(Arm(took[name]))

        def drop(self, name: str) -> None:
            dropped.append(name)

    args = argparse.Namespace(tuned=[*took], tries=2, clock="seconds", peer_dtype="bfloat16")
    found = tree_step._tuned(args, Arms())
    assert found["arm"] == "fast" and found["options"].endswith(
        "bfloat16, no checkpointing, precomputed reference, rows sorted by length, fast"
    )
    assert found["tries"] == took | {"fails": "out of memory"}
    assert [name for name in dropped if name] == ["slow", "fails", "late"]


def test_arms_alternate_and_the_first_round_is_dropped(capsys: pytest.CaptureFixture[str]):
    order: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, round: int) -> dict[str, Any]:
            order.append(self.name)
            return {"seconds": round, "cpu_seconds": round}

    answers = module("_child").alternate({"a": Fake("a"), "b": Fake("b")}, 2, {})
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert [run["seconds"] for run in answers["a"]] == [1, 2]


def test_the_peak_is_that_of_the_work():
    """In a process of its own: here, memory that earlier tests freed may be there to be used again."""
    work = """
import _child
_child.forget_peak()
before = _child.resident("VmHWM")
block = b"x" * (64 * 2**20)
print(_child.resident("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", work], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert 50 < float(done.stdout) < 100
