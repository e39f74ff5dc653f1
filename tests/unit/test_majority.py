"""The majority vote by hand: hard and soft, thresholds, ties, and voters from elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upturn.errors import DataError
from upturn.scorers import majority
from upturn.types import Attempt, Draft, Prompt, Score


class LastWord:
    """A task whose final answer is the last word in small letters, '?' for none; '4' is right."""

    refine_request = "Again."
    max_new_tokens = 5

    def prompts(self, split: Any, start: int, count: int) -> list[Prompt]:
        return []

    def grade(self, prompt: Prompt, answer: str) -> Score:
        right = self.vote_key(prompt, answer) == "4"
        return Score(float(right), right, "graded", critique="It is 4.")

    def vote_key(self, prompt: Prompt, answer: str) -> str:
        return answer.lower().split()[-1].strip("?")


def attempt(*texts: str, name: str = "p") -> Attempt:
    drafts = (Draft(i, 1, (), text, (i,), (-1.0,), "stop", 5, 0) for i, text in enumerate(texts))
    return Attempt(Prompt(name, f"{name}?"), tuple(drafts))


def score(one: Attempt, voters: list[Attempt] | None = None, **config: Any) -> tuple[Score, ...]:
    [scored] = majority.load(majority.Config(**config)).score(LastWord(), [one], voters)
    assert (scored.prompt, scored.drafts) == (one.prompt, one.drafts)
    return scored.scores


def values(*texts: str, **config: Any) -> list[float]:
    return [one.value for one in score(attempt(*texts), **config)]


def test_the_winner_is_worth_one_and_all_others_nothing():
    assert values("it is 3", "no: 4", "3", "?") == [1, 0, 1, 0]


def test_answers_are_compared_by_their_key():
    assert values("Yes", "oh yes", "No") == [1, 1, 0]


def test_soft_values_are_shares_of_the_answers_that_can_be_read():
    assert values("3", "4", "3", "?", soft=True) == [2 / 3, 1 / 3, 2 / 3, 0]


def test_a_tie_goes_to_the_answer_seen_first():
    assert values("4", "3", "3", "4") == [1, 0, 0, 1]
    assert values("3", "4", "4", "3") == [1, 0, 0, 1]


@pytest.mark.parametrize(("tau", "labelled"), [(0.0, True), (0.5, True), (0.51, False), (1.0, False)])
def test_below_tau_the_whole_prompt_is_unlabelled(tau: float, labelled: bool):
    # 2 of the 4 that can be read
    found = score(attempt("3", "3", "4", "5", "?"), tau=tau)
    assert [math.isnan(one.value) for one in found] == [not labelled] * 5
    assert ("unlabelled" in found[0].note) != labelled


def test_unanimous_is_enough_for_any_tau():
    assert values("3", "3", "?", tau=1) == [1, 1, 0]


@pytest.mark.parametrize("soft", [False, True])
def test_where_nothing_can_be_read_there_is_no_label(soft: bool):
    assert all(math.isnan(value) for value in values("?", "?", soft=soft))


def test_right_is_the_tasks_own_word_and_the_note_tells_the_vote():
    found = score(attempt("3", "4", "3"))
    assert [one.right for one in found] == [False, True, False]
    assert [one.answer for one in found] == ["3", "4", "3"]
    assert {one.note for one in found} == {"2 of 3 votes for '3'"}
    assert {one.critique for one in found} == {""}, "a critique would tell the label"


def test_voters_from_elsewhere_vote_alone():
    voters = [attempt("9", name="q"), attempt("4", "4", "5")]
    assert [one.value for one in score(attempt("3", "3", "4", "5"), voters)] == [0, 0, 1, 0]
    assert [one.value for one in score(attempt("3", "3", "4", "5"), voters, soft=True)] == [0, 0, 2 / 3, 1 / 3]


def test_a_prompt_without_voters_is_an_error_that_names_it():
    with pytest.raises(DataError, match="prompt p\n    The voters have no answers to it"):
        score(attempt("3"), [attempt("3", name="q")])
    with pytest.raises(DataError, match="prompt p"):
        score(attempt("3"), [])


def test_a_verifier_that_raises_names_the_prompt_of_the_voters():
    with pytest.raises(DataError, match="prompt p\n    It raised IndexError"):
        score(attempt("3"), [attempt("")])  # no last word


def test_critiques_have_no_vote():
    one = attempt("3", "4", "4")
    criticised = replace(one, drafts=(one.drafts[0], *(replace(draft, kind="critique") for draft in one.drafts[1:])))
    assert [each.value for each in score(one, [criticised])] == [1, 0, 0]


def test_each_prompt_votes_for_itself_and_an_empty_attempt_has_no_scores():
    scorer = majority.load(majority.Config())
    found = scorer.score(LastWord(), [attempt("3", "3", "4"), attempt(name="q"), attempt("4", name="r")])
    assert [[one.value for one in scored.scores] for scored in found] == [[1, 1, 0], [], [1]]


@given(texts=st.lists(st.sampled_from(["3", "4", "5", "?"]), min_size=1, max_size=9), tau=st.floats(0, 1))
def test_hard_and_soft_agree(texts: list[str], tau: float):
    hard, soft = values(*texts, tau=tau), values(*texts, tau=tau, soft=True)
    share = max(soft)
    if math.isnan(hard[0]):
        assert all(map(math.isnan, hard + soft))
    else:
        assert share >= tau and len({text for text, value in zip(texts, hard, strict=True) if value}) == 1
        assert all(s == share for h, s in zip(hard, soft, strict=True) if h)
        assert sum(hard) == pytest.approx(share * sum(text != "?" for text in texts))
