"""A warm process that forks runs and kills them: `python forks.py FOLDER` makes all that test_kill.py needs.

It must never train itself, since a forked child could not train then. What happened goes to `outcome.json`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import small_run
import tiny
import torch

from upturn import config
from upturn.cli import main
from upturn.lab import work
from upturn.models import load, policy
from upturn.report import page

assert work and page  # imported here, so that no child has to
DEEP = 2
"""Forward passes since the last file: so far inside a chunk or between two checkpoints a kill happens."""
UNREMARKABLE = (
    "steps/",
    "manifest.json",
    "to train/arithmetic",
    "config.yaml",
    "examples.jsonl",
    "to score/",
    "to drafts/",
)
"""Renames that stand between two others with no work around them."""
SMALLER: dict[str, Any] = {
    "iterations": 1,
    "prefer": {
        "objective": "evolve",
        "train": {
            "learning_rate": 1e-3,
            "train_batch_size": 2,
            "max_tree_tokens": 1,
            "save_seconds": 0,
            "num_train_epochs": 2,
        },
    },
    "measure": {"prompts": 6, "turns": 2},
}


def fork(recipe: Path, prepare: Callable[[], None] = lambda: None, *options: str) -> int:
    """`upturn run` in a child; its output goes to files beside the recipe."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 70
    try:
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare()
        sys.argv = ["upturn", "run", str(recipe), "--quiet", *options]
        output = recipe.with_suffix(".out").open("a")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(output):
            main.main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Killer:
    """Ends this process with SIGKILL at the first event at which no process before it was killed."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.seen = set(log.read_text().splitlines()) if log.exists() else set()
        self.place, self.forwards = "start", 0

    def arm(self) -> None:
        """Watch renames, just before they happen, and forward passes."""
        rename, forward = os.replace, policy.hidden_states

        def replace(source: Any, target: Any) -> None:
            name = _name(Path(target))
            between = name.endswith("/checkpoint") and Path(target).with_name("checkpoint.old").exists()
            self.event(f"rename to {name}{' between two renames' if between else ''}")
            rename(source, target)
            if name.startswith(("store/", "train/", "generate/")):
                self.place, self.forwards = name, 0

        def hidden_states(*args: Any) -> torch.Tensor:
            self.forwards += 1
            if self.forwards == DEEP:
                self.event(f"{DEEP} forward passes after {self.place}")
            return forward(*args)

        os.replace, policy.hidden_states = replace, hidden_states

    def event(self, name: str) -> None:
        """One moment at which the machine may fail."""
        if name in self.seen or any(word in name for word in UNREMARKABLE):
            return
        with self.log.open("a") as file:
            file.write(name + "\n")
        os.kill(os.getpid(), signal.SIGKILL)


def _name(path: Path) -> str:
    """Steps by their keys, files inside a step by the kind of step: once each is enough."""
    folder = path.parent.name
    return f"{folder.split('-')[0] if folder.endswith('.part') else folder}/{path.name}"


def killed_everywhere(recipe: Path) -> dict[str, Any]:
    """Run until no new event is left, killed once at each."""
    log, kills, code = recipe.with_suffix(".kills"), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        code = wait(fork(recipe, lambda: Killer(log).arm()))
        kills += code == -signal.SIGKILL
    return {"code": code, "kills": kills, "events": log.read_text().splitlines()}


def two_at_once(recipe: Path) -> dict[str, Any]:
    """Two processes on one store, and a third one on the run folder of the first."""
    shared = f"store={recipe.with_suffix('') / 'store'}"
    children = [fork(recipe), fork(recipe, lambda: None, f"output_dir={recipe.with_name('twin')}", shared)]
    while not recipe.with_suffix("").joinpath(".run.pid").exists():
        time.sleep(0.01)
    third = wait(fork(recipe))
    return {"first": children[0], "codes": [wait(child) for child in children], "third": third}


def interrupted(recipe: Path) -> dict[str, Any]:
    """Ctrl-C once the first chunk of drafts is there."""
    child = fork(recipe)
    while not list(recipe.with_suffix("").glob("store/generate-*.part/chunk-*.jsonl")):
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    began = time.monotonic()
    return {
        "code": wait(child),
        "seconds": time.monotonic() - began,
        "said": recipe.with_suffix(".out").read_text(),
    }


def full_disk(recipe: Path) -> list[dict[str, Any]]:
    """Files may not grow beyond a limit: the first run fails on drafts, the next on weights, the last not."""
    found = []
    for limit in (2_500, 64_000, -1):
        recipe.with_suffix(".out").unlink(missing_ok=True)
        child = fork(recipe, lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        found.append({"code": wait(child), "said": recipe.with_suffix(".out").read_text()})
    return found


def scenarios(folder: Path) -> dict[str, Any]:
    """All of them, each in a folder of its own."""
    model = tiny.save(folder / "model", characters=tiny.SUMS)
    recipes = {n: small_run.write(folder / f"{n}.yaml", model, **SMALLER) for n in ("whole", "killed", "two", "full")}
    long = small_run.write(folder / "long.yaml", model, measure={"prompts": 20_000, "turns": 2})
    load.load(str(model))  # what is imported late is imported now
    config.load(str(long))
    outcome: dict[str, Any] = {"whole": wait(fork(recipes["whole"]))}
    outcome["interrupted"] = interrupted(long)
    outcome["full"] = full_disk(recipes["full"])
    outcome["two"] = two_at_once(recipes["two"])
    outcome["killed"] = killed_everywhere(recipes["killed"])
    return outcome


if __name__ == "__main__":
    here = Path(sys.argv[1])
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    (here / "outcome.json").write_text(json.dumps(scenarios(here)))
