"""The exact scorer, and the reward model with a tiny random one."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from upturn.errors import DataError, ModelError, UpturnError
from upturn.scorers import exact, reward_model
from upturn.scorers.reward_model import Config, RewardModel
from upturn.types import Attempt, Draft, Prompt, Score


class YesIsRight:
    """A task in which 'yes' is right."""

    refine_request = "Again."
    max_new_tokens = 5

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault

    def prompts(self, split: Any, start: int, count: int) -> list[Prompt]:
        return []

    def grade(self, prompt: Prompt, answer: str) -> Score:
        if self.fault:
            raise self.fault
        return Score(float(answer == "yes"), answer == "yes", "graded", critique="Say yes.")

    def vote_key(self, prompt: Prompt, answer: str) -> str:
        return answer


def attempt(name: str, *texts: str) -> Attempt:
    drafts = (Draft(i, 1, (), text, (i,), (-1.0,), "stop", 5, 0) for i, text in enumerate(texts))
    return Attempt(Prompt(name, f"{name}?"), tuple(drafts))


ATTEMPTS = [attempt("p", "yes", "no, not at all", ""), attempt("q"), attempt("r", "a", "yes")]


class TestExact:
    scorer = exact.load(exact.Config())

    def test_each_draft_has_the_tasks_grade(self):
        scored = self.scorer.score(YesIsRight(), ATTEMPTS)
        assert [[score.value for score in one.scores] for one in scored] == [[1, 0, 0], [], [0, 1]]
        assert [(one.prompt, one.drafts) for one in scored] == [(one.prompt, one.drafts) for one in ATTEMPTS]

    def test_each_score_holds_the_final_answer_by_which_drafts_vote(self):
        scored = self.scorer.score(YesIsRight(), ATTEMPTS)
        assert [[score.answer for score in one.scores] for one in scored] == [
            [draft.text for draft in one.drafts] for one in ATTEMPTS
        ]

    def test_a_verifier_that_raises_names_the_prompt(self):
        with pytest.raises(DataError, match=r"prompt p\n    It raised ZeroDivisionError: oh\n    Mend"):
            self.scorer.score(YesIsRight(ZeroDivisionError("oh")), ATTEMPTS)

    def test_an_error_for_the_user_passes_as_it_is(self):
        fault = UpturnError("here", "what", "mend")
        with pytest.raises(UpturnError) as caught:
            self.scorer.score(YesIsRight(fault), ATTEMPTS)
        assert caught.value is fault


def config(**values: Any) -> LlamaConfig:
    defaults: dict[str, Any] = {
        "vocab_size": len(tiny.tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(defaults | values))


def save(folder: Path, **values: Any) -> Path:
    """A random judge whose rewards differ clearly."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config(**({"num_labels": 1} | values)))
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(5)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("judge"))


def load(folder: Path, **values: Any) -> RewardModel:
    return RewardModel(reward_model.Config(model_name_or_path=str(folder), device="cpu", **values))


def values(scored: list[Attempt]) -> list[float]:
    return [score.value for one in scored for score in one.scores]


class TestRewardModel:
    def test_it_is_the_models_own_output_for_the_pair_rendered_once(self, folder: Path):
        judge = load(folder)
        # <s><u>p?<a>yes</s>: the template's BOS is the only one
        ids = judge.ids("p?", "yes")
        assert judge.tokenizer.decode(ids) == "<s><u>p?<a>yes</s>"
        with torch.no_grad():
            expected = judge.model(input_ids=torch.tensor([ids])).logits[0, 0].item()
        value = judge.score(YesIsRight(), [attempt("p", "yes")])[0].scores[0].value
        assert value == pytest.approx(expected, rel=1e-5)

    def test_a_row_does_not_depend_on_its_neighbours(self, folder: Path):
        alone = values(load(folder, batch_size=1).score(YesIsRight(), ATTEMPTS))
        together = values(load(folder, batch_size=16).score(YesIsRight(), ATTEMPTS))
        assert together == pytest.approx(alone, rel=1e-4)
        assert len(set(alone)) == 5

    def test_permuting_drafts_permutes_scores(self, folder: Path):
        judge = load(folder)
        forth = values(judge.score(YesIsRight(), [attempt("p", "yes", "no", "perhaps so")]))
        back = values(judge.score(YesIsRight(), [attempt("p", "perhaps so", "no", "yes")]))
        assert back == pytest.approx(forth[::-1], rel=1e-4)

    def test_the_same_twice(self, folder: Path):
        judge = load(folder, batch_size=2)
        assert judge.score(YesIsRight(), ATTEMPTS) == judge.score(YesIsRight(), ATTEMPTS)

    def test_right_is_the_verifiers_word_and_its_critique_is_left_out(self, folder: Path):
        scored = load(folder).score(YesIsRight(), ATTEMPTS)
        assert {score.critique for one in scored for score in one.scores} == {""}
        assert [[score.right for score in one.scores] for one in scored] == [
            [True, False, False],
            [],
            [False, True],
        ]

    def test_a_pair_that_is_too_long_is_not_cut_but_has_no_score(self, folder: Path):
        scored = load(folder, max_length=12).score(YesIsRight(), ATTEMPTS)
        assert [math.isnan(value) for value in values(scored)] == [False, True, False, False, False]
        assert "longer than max_length" in scored[0].scores[1].note

    def test_rewards_are_float32_whatever_the_weights(self, folder: Path):
        judge = load(folder, dtype="bfloat16")
        assert judge.model.dtype == torch.bfloat16
        assert judge._forward([judge.ids("p?", "yes")]).dtype == torch.float32

    def test_without_a_padding_id_rows_are_judged_one_by_one(self, folder: Path, tmp_path: Path):
        judge = load(save(tmp_path, pad_token_id=None))
        assert values(judge.score(YesIsRight(), ATTEMPTS)) == pytest.approx(
            values(load(folder).score(YesIsRight(), ATTEMPTS)), rel=1e-4
        )

    def test_nothing_to_judge(self, folder: Path):
        assert load(folder).score(YesIsRight(), []) == []

    def test_a_path_may_begin_in_the_home_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HOME", str(folder.parent))
        assert load(Path("~") / folder.name).score(YesIsRight(), ATTEMPTS) == load(folder).score(YesIsRight(), ATTEMPTS)


def key(folder: Path | str, **values: Any) -> dict[str, Any]:
    return reward_model.key(Config(model_name_or_path=str(folder), **values))


class TestKey:
    def test_it_holds_what_shapes_scores(self, folder: Path):
        assert key(folder, device="cpu", batch_size=3) == key(folder)
        assert key(folder, max_length=3) != key(folder)
        assert key(folder, dtype="float16") != key(folder)

    def test_a_hub_id_stays_a_name(self):
        assert key("owner/name")["model_name_or_path"] == "owner/name"

    def test_a_folder_counts_by_what_it_holds(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        (copy / "README.md").write_text("Another place.")
        assert key(copy) == key(folder)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert key("~/copy") == key(folder)

    @pytest.mark.parametrize(
        "name",
        [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "tokenizer.model",
            "modeling_own.py",
        ],
    )
    def test_a_change_under_the_same_path_is_seen(self, folder: Path, tmp_path: Path, name: str):
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        before = key(copy)
        with (copy / name).open("ab") as file:
            file.write(b" ")
        assert key(copy) != before

    def test_weights_are_read_once(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        first = key(copy)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", None)
            assert key(copy) == first
        weights = copy / "model.safetensors"
        before = weights.stat()
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns - 1))
        assert key(copy) != first

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path: Path):
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
        with pytest.raises(ModelError, match=r"model.safetensors cannot be read: No such file"):
            key(tmp_path)


class TestBadModel:
    def error(self, folder: Path) -> ModelError:
        with pytest.raises(ModelError) as caught:
            load(folder)
        return caught.value

    def test_a_missing_folder(self, tmp_path: Path):
        assert "Give a folder" in self.error(tmp_path / "nowhere").mend

    def test_an_empty_folder_says_what_is_lacking(self, tmp_path: Path):
        assert self.error(tmp_path).mend.startswith("The folder lacks config.json")

    def test_broken_weights(self, tmp_path: Path):
        (save(tmp_path) / "model.safetensors").write_bytes(b"nonsense")
        assert "cannot be loaded" in self.error(tmp_path).what

    def test_pickled_weights_are_not_read(self, tmp_path: Path):
        save(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save({}, tmp_path / "pytorch_model.bin")
        assert self.error(tmp_path).mend == "The folder lacks *.safetensors."

    def test_a_broken_config(self, tmp_path: Path):
        (save(tmp_path) / "config.json").write_text("{")
        assert "cannot be loaded" in self.error(tmp_path).what

    def test_no_chat_template(self, tmp_path: Path):
        save(tmp_path)
        (tmp_path / "chat_template.jinja").unlink()
        assert "no chat template" in self.error(tmp_path).what

    def test_two_outputs(self, tmp_path: Path):
        assert "2 outputs" in self.error(save(tmp_path, num_labels=2)).what

    def test_a_language_model_has_no_reward_head(self, tmp_path: Path):
        LlamaForCausalLM(config()).save_pretrained(tmp_path)
        tiny.tokenizer().save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_labels": 1}))
        assert "score.weight" in self.error(tmp_path).what
