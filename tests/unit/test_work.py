"""Heavy steps, piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from upturn.config import plugin
from upturn.engines import _slots, sampling
from upturn.errors import RunError
from upturn.lab import work
from upturn.lab.lab import Attempts, Examples
from upturn.models import chat, load
from upturn.types import Attempt, Group, Prompt, Requests, to_json

PROMPTS = [Prompt("p", "1+1")]


def sizes(model: Path, folder: Path, **options: int | None) -> tuple[int, int]:
    loaded = load.load(str(model), "float32", device="cpu")
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))
    chosen: Any = SimpleNamespace(**{"slots": None, "chunk_prompts": None} | options)
    settings = work.Settings("step", folder, Requests("again"), chosen, seed=0)
    return work._sizes(loaded, talk, PROMPTS, sampling.Config(max_new_tokens=8), settings)


def test_a_step_that_goes_on_keeps_its_chunks(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    slots = _slots.USUAL["cpu"]
    assert sizes(tiny_model, tmp_path) == (slots, work.WAVES * slots)
    monkeypatch.setitem(_slots.USUAL, "cpu", 7)
    assert sizes(tiny_model, tmp_path) == (slots, work.WAVES * slots)
    assert json.loads((tmp_path / work.SIZES).read_text()) == {"slots": slots, "chunk_prompts": work.WAVES * slots}


def test_what_is_asked_for_counts(tiny_model: Path, tmp_path: Path):
    assert sizes(tiny_model, tmp_path, slots=5) == (5, work.WAVES * 5)


def test_a_training_whose_model_is_saved_is_not_repeated(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded = load.load(str(tiny_model), "float32", device="cpu")
    outcome, runs = SimpleNamespace(num_steps=1, tree_tokens=2, row_tokens=3, final_loss=0.5, metrics={}), []

    def run(*_: Any) -> Any:
        (tmp_path / work.training.CHECKPOINT).mkdir()
        runs.append(1)
        return outcome

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work.training, "run", run)
    how = SimpleNamespace(objective=plugin("objectives", "nll"), train=None)
    options: Any = SimpleNamespace(layout="auto")
    settings = work.Settings("step", tmp_path, Requests("again"), options, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(work.training, "forget", killed)
        with pytest.raises(KeyboardInterrupt):
            work.train(loaded, None, [], how, settings)
    assert work.train(loaded, None, [], how, settings)["row_tokens"] == 3
    assert runs == [1] and not (tmp_path / work.training.CHECKPOINT).exists()


@pytest.mark.parametrize("left", ["", '{"steps"'])
def test_a_training_whose_outcome_is_damaged_is_repeated(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
):
    monkeypatch.setattr(work, "_trained", lambda *_: {"steps": 1})
    (tmp_path / "model").mkdir()
    (tmp_path / work.OUTCOME).write_text(left)
    loaded: Any = None
    settings = work.Settings("step", tmp_path, Requests("again"), None, seed=0)
    assert work.train(loaded, None, [], None, settings) == {"steps": 1}


ATTEMPT = Attempt(PROMPTS[0], ())


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ('{"prompt": {"id"\n', "line 2 of records.jsonl cannot be read"),
        ("[]\n", "line 2 of records.jsonl cannot be read"),
        ("", "records.jsonl has 1 lines and should have 2"),
        (None, "its records.jsonl is gone"),
    ],
)
def test_a_damaged_result_is_told_with_its_folder(tmp_path: Path, second: str | None, told: str):
    path = tmp_path / "records.jsonl"
    examples = Examples("key", path, 2, {}, None, None)
    for result, record in ((Attempts("key", path, 2), ATTEMPT), (examples, Group(ATTEMPT, ()))):
        if second is not None:
            path.write_text(json.dumps(to_json(record)) + "\n" + second)
        with pytest.raises(RunError) as raised:
            result.read()
        whole = f"folder {tmp_path}\n    The result of this step is damaged: {told}.\n    "
        assert str(raised.value) == whole + "Delete it and run the same command again."


def test_a_slot_holds_question_draft_request_and_draft(tiny_model: Path):
    loaded = load.load(str(tiny_model), "float32", device="cpu")
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))
    asked = len(talk.context("1+1", ()))
    assert work._longest(talk, PROMPTS, sampling.Config(max_new_tokens=8)) == asked + 24
