"""Laws of every task that generates its prompts, that is whose config needs no value."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from upturn import registry
from upturn.tasks._base import Task

ODD_TEXT = st.text(max_size=80) | st.sampled_from(["", " ", "\n", "\x00", "\ud800", ".", "?!", "“”", "9" * 500])


def generated() -> list[str]:
    """Plug-ins whose `Config()` is valid as it stands; helper modules without a `Config` are no tasks."""
    found = []
    for name in registry.names("tasks"):
        module = registry.find("tasks", name)
        try:
            module.Config()
        except (ValidationError, AttributeError):
            continue
        found.append(name)
    return found


NAMES = generated()


def load(name: str, **values: object) -> Task:
    module = registry.find("tasks", name)
    return module.load(module.Config(**values))


def test_keywords_is_among_them():
    assert "keywords" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_train_and_test_share_no_prompt_text_under_any_seed(name: str):
    texts = {
        split: {p.text for seed in (0, 1) for p in load(name, seed=seed).prompts(split, 0, 1500)}
        for split in ("train", "test")
    }
    assert not texts["train"] & texts["test"]


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_unique_over_both_splits(name: str):
    task = load(name)
    ids = [prompt.id for split in ("train", "test") for prompt in task.prompts(split, 0, 500)]
    assert len(set(ids)) == 1000


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_depends_only_on_seed_split_and_place(name: str):
    whole = load(name).prompts("train", 0, 20)
    random.seed(7)
    task = load(name)
    assert task.prompts("train", 12, 8) + task.prompts("train", 0, 12) == whole[12:] + whole[:12]
    assert [p.text for p in load(name, seed=1).prompts("train", 0, 20)] != [p.text for p in whole]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_never_run_out(name: str):
    assert len(load(name).prompts("test", 10**9, 3)) == 3


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=100)
@given(place=st.integers(0, 50), answer=ODD_TEXT)
def test_no_text_makes_a_grade_raise(name: str, place: int, answer: str):
    task = load(name)
    [prompt] = task.prompts("train", place, 1)
    score = task.grade(prompt, answer)
    assert 0 <= score.value <= 1
    assert score.right == (score.value == 1)
    assert isinstance(task.vote_key(prompt, answer), str)


@pytest.mark.parametrize("name", NAMES)
def test_the_task_says_how_to_refine_and_how_long_an_answer_is(name: str):
    task = load(name)
    assert task.refine_request.strip()
    assert task.max_new_tokens > 0
