"""Publishing: a run's own model is replaced, and nothing else; one of the two is whole at any time."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from upturn.errors import RunError
from upturn.evaluation.summary import Summary
from upturn.lab import publishing
from upturn.models import card

SUMMARY = Summary(upturn="0", recipe="evolve", name="n", model="m", task="carry", seed=0, status="running", turns=2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A trained model, as safetensors writes it: closed to others."""
    folder = tmp_path / "trained"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
        (folder / name).chmod(0o600)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "model"


def publish(source: Path, target: Path) -> None:
    publishing.publish(source, target, SUMMARY, "about", card.Refining())


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_our_own_model_is_replaced(source: Path, target: Path):
    publish(source, target)
    (source / "model.safetensors").write_text("better")
    publishing.check(target)
    publish(source, target)
    assert contents(target)["model.safetensors"] == "better"
    assert {path.name for path in target.parent.iterdir()} <= {"model", ".model.lock"}


def test_a_model_of_an_earlier_version_is_replaced(source: Path, target: Path):
    publish(source, target)
    (target / publishing.SUMS).unlink()
    publish(source, target)
    assert (target / publishing.SUMS).exists()


def _a_model_of_the_user(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def _notes_beside_ours(source: Path, target: Path) -> None:
    publish(source, target)
    (target / "notes.txt").write_text("mine")


def _notes_beside_an_old_one(source: Path, target: Path) -> None:
    _notes_beside_ours(source, target)
    (target / publishing.SUMS).unlink()


def _ours_trained_further(source: Path, target: Path) -> None:
    publish(source, target)
    (target / "model.safetensors").write_text("mine")


def _a_link(source: Path, target: Path) -> None:
    publish(source, target.with_name("other"))
    target.symlink_to("other")


def _a_broken_link(source: Path, target: Path) -> None:
    target.symlink_to("nowhere")


def _a_file(source: Path, target: Path) -> None:
    target.write_text("mine")


@pytest.mark.parametrize(
    "make",
    [
        *(_a_model_of_the_user, _notes_beside_ours, _notes_beside_an_old_one, _ours_trained_further),
        *(_a_link, _a_broken_link, _a_file),
    ],
)
def test_what_no_run_published_is_left_alone(source: Path, target: Path, make: Callable[[Path, Path], None]):
    make(source, target)
    before = contents(target) if target.is_dir() else None
    for ask in (lambda: publishing.check(target), lambda: publish(source, target)):
        with pytest.raises(RunError, match=f"folder {target}\n"):
            ask()
    assert before is None or contents(target) == before


@pytest.mark.parametrize("below", ["", "store"])
def test_a_run_does_not_publish_over_what_it_reads(target: Path, below: str):
    with pytest.raises(RunError, match="This run reads from it"):
        publishing.check(target, [target / below])


def test_a_kill_at_any_rename_leaves_one_of_them_whole(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch):
    publish(source, target)
    old = contents(target)
    (source / "model.safetensors").write_text("better")
    rename, left = os.replace, [2]

    def killed(*places: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        rename(*places)

    for nth in (1, 2):
        left[0] = nth
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(source, target)
        assert old in [contents(place) for place in (target, target.with_name(".model.old")) if place.is_dir()]
    monkeypatch.setattr(os, "replace", rename)
    publish(source, target)
    assert contents(target)["model.safetensors"] == "better"
    assert {path.name for path in target.parent.iterdir()} <= {"model", ".model.lock"}


def test_files_can_be_read_as_the_umask_says(source: Path, target: Path):
    before = os.umask(0o027)
    try:
        publish(source, target)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {0o640}
