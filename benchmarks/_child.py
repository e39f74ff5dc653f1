"""Arms of a comparison as child processes: one JSON object per line each way, so that each arm has its own peak memory.

The standard library only: peers may live in an environment of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CLOCKS = ("seconds", "cpu_seconds")
"""Wall time, and the processor time of the arm: the fairer one where neighbours share the cores."""
DEVICES = {"cpu": "cpu", "cuda": "gpu"}
"""Where arms run, and what rows call it."""
PATIENCE = 180.0
"""Seconds that an arm on a GPU may take for one answer, its start included: one that hangs must not stop the others."""
Answer = dict[str, Any]


def parser(description: str, quick: str) -> argparse.ArgumentParser:
    """What every comparison is told; `quick` says what is small in a quick one."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", default="smollm2-135m")
    add_device(made)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--clock", choices=CLOCKS, default="seconds", help="cpu_seconds says nothing about a GPU")
    made.add_argument("--quick", action="store_true", help=f"{quick}: a check, not a measurement")
    made.add_argument("--out", type=Path)
    return made


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where the work is done: what was asked for, never what is found."""
    parser.add_argument("--device", choices=[*DEVICES], default="cpu")


class ChildError(RuntimeError):
    """An arm ended early, or took too long; the message is the last line that it wrote, or the limit."""


class Child:
    """A running arm: `python script *arguments`, asked by `ask` until it is closed."""

    def __init__(
        self, script: str, arguments: Sequence[str], python: str = sys.executable, limit: float | None = None
    ) -> None:
        self._limit, self._sent, self._fault = limit, 0.0, ""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [python, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Threads of an arm that waits must not take the cores from the one that works.
            env=os.environ | {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "300000")},
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def ask(self, **question: Any) -> Answer:
        """Send a question and wait for its answer. Raises ChildError when the arm ends instead, or takes too long."""
        self.send(**question)
        return self.answer()

    def send(self, **question: Any) -> None:
        """Send a question; `answer` has to follow."""
        assert self._process.stdin
        self._sent = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()

    def answer(self) -> Answer:
        """Wait for the answer to what was sent."""
        assert self._process.stdout
        if self._limit and not self._fault:
            left = max(0.0, self._sent + self._limit - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                self._process.kill()
                self._fault = f"no answer within {self._limit:g} s"
        line = "" if self._fault else self._process.stdout.readline()
        if not line:
            raise ChildError(self._fault or self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors if line.strip()]
        return said[-1] if said else f"exit code {self._process.returncode}"

    def close(self) -> None:
        """End the arm."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


class Arms:
    """The arms of some comparisons by name: on a GPU all start at once and stay, else each starts when it is needed."""

    def __init__(self, starts: Mapping[str, Callable[[], Child]], device: str) -> None:
        self._starts = starts
        self._running = {name: start() for name, start in starts.items()} if device == "cuda" else {}

    def __enter__(self) -> Arms:
        return self

    def __exit__(self, *raised: object) -> None:
        for name in [*self._running]:
            self.drop(name)

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[Child]:
        """An arm to be asked; closed afterwards unless all were started at once."""
        child = self._running.get(name) or self._starts[name]()
        try:
            yield child
        finally:
            if name not in self._running:
                child.close()

    def warm(self, names: Iterable[str], **question: Any) -> None:
        """Ask those that run at the same time, for what only a first answer takes, such as compiling.

        Who fails says so again when asked alone.
        """
        asked = [self._running[name] for name in names if name in self._running]
        for child in asked:
            child.send(**question)
        for child in asked:
            with contextlib.suppress(ChildError):
                child.answer()

    def drop(self, name: str) -> None:
        """Close an arm that is not needed any more."""
        if child := self._running.pop(name, None):
            child.close()


class Wire:
    """The arm's end. What libraries print goes to stderr, so the answers stay alone on stdout."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._asked = False

    def receive(self) -> Answer | None:
        """The next question; None when the parent has closed. Memory before the first question does not count."""
        line = sys.stdin.readline()
        if line and not self._asked:
            self._asked = True
            forget_peak()
        return json.loads(line) if line else None

    def send(self, answer: Mapping[str, Any]) -> None:
        """Answer a question, with the arm's peak memory so far: of its GPU, where it uses one."""
        device = gpu()
        peak = device.max_memory_allocated() / 2**20 if device else resident("VmHWM")
        self._out.write(json.dumps({**answer, "peak_mib": round(peak, 1)}) + "\n")
        self._out.flush()


def serve(handle: Callable[[Answer], Answer]) -> None:
    """Answer questions until the parent closes."""
    wire = Wire()
    while (question := wire.receive()) is not None:
        wire.send(handle(question))


def gpu() -> Any:
    """torch.cuda where this process works on it; the arms of other environments need no torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None


def wall() -> float:
    """The time when all that was begun is done, on a GPU as well."""
    if device := gpu():
        device.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = wall(), time.process_time()

    def read(self) -> Answer:
        """Both times in seconds, as an answer names them."""
        took, cpu = wall() - self._wall, time.process_time() - self._cpu
        return {"seconds": round(took, 6), "cpu_seconds": round(cpu, 6)}


def resident(what: str) -> float:
    """`VmRSS` (now) or `VmHWM` (highest since `forget_peak`) in MiB; outside Linux the highest ever."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 2**10


def forget_peak() -> None:
    """Set the high-water mark to what is resident now, so that loading a model does not hide the work."""
    if device := gpu():
        device.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def alternate(
    arms: Mapping[str, Child], repeats: int, question: Mapping[str, Any], warmups: int = 1
) -> dict[str, list[Answer]]:
    """Ask the arms in turn, A B, B A, A B ...; the first rounds are warm-ups and are dropped."""
    answers: dict[str, list[Answer]] = {name: [] for name in arms}
    for round_ in range(repeats + warmups):
        is_warm = round_ >= warmups
        for name in arms if round_ % 2 else reversed(list(arms)):
            answer = arms[name].ask(**question, round=round_)
            if is_warm:
                answers[name].append(answer)
            took = f"{answer['seconds']:.4g} s ({answer['cpu_seconds']:.4g} s of processor time)"
            print(f"  {name}: {took}{'' if is_warm else ', warm-up'}", flush=True)
    return answers
