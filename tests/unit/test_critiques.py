"""Selection of critiques: what is shown, what is learnt, and that it is learnt in the contexts it will be asked in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny

from upturn.models import chat
from upturn.selection import critiques
from upturn.selection._base import Selection
from upturn.training import rows
from upturn.types import Attempt, Draft, Group, Prompt, Requests, Score

WORDS = tiny.tokenizer()


def attempt(texts: list[str], right: set[str], name: str = "p", cut: tuple[int, ...] = ()) -> Attempt:
    """Direct answers, with the verifier's word on each."""
    ids = [(*WORDS(text, add_special_tokens=False)["input_ids"], 2) for text in texts]
    drafts = tuple(
        Draft(i, 1, (), text, ids[i], (-1.0,) * len(ids[i]), "length" if i in cut else "stop", 5, 0)
        for i, text in enumerate(texts)
    )
    scores = tuple(
        Score(float(t in right), t in right, critique=f"{t} is {'fine' if t in right else 'bad'}") for t in texts
    )
    return Attempt(Prompt(name, "Which?"), drafts, scores)


def select(one: Attempt, drafts: int = 6) -> Selection:
    return critiques.select([one], critiques.Config(drafts=drafts))


def learnt(one: Attempt, drafts: int = 6) -> list[tuple[str, str, tuple[int, ...], float | None]]:
    """Kind, text, parents and value of each draft of the group."""
    [group] = select(one, drafts).examples
    assert isinstance(group, Group)
    return [(d.kind, d.text, d.parents, v) for d, v in zip(group.attempt.drafts, group.values, strict=True)]


def test_a_wrong_draft_is_shown_criticised_and_put_right():
    found = learnt(attempt(["a b", "a c"], right={"a c"}))
    wrong = [("answer", "a b", (), None), ("critique", "a b is bad", (2,), 1.0), ("answer", "a c", (2, 3), 1.0)]
    assert found == [("answer", "a c", (), 1.0), ("critique", "a c is fine", (0,), 1.0), *wrong]


def test_the_most_similar_right_draft_puts_it_right():
    found = learnt(attempt(["the dog ran off", "a cat sat", "the dog ran", "no"], right={"a cat sat", "the dog ran"}))
    mended = {found[i - 2][1]: text for i, (_, text, parents, _) in enumerate(found) if len(parents) == 2}
    assert mended["the dog ran off"] == "the dog ran"


def test_prompts_without_a_right_draft_teach_their_critiques():
    found = learnt(attempt(["a", "b"], right=set()))
    assert sorted(text for _, text, _, value in found if value) == ["a is bad", "b is bad"]


def test_half_of_the_drafts_are_right_ones_where_there_are_so_many():
    many = attempt(list("abcdefgh"), right=set("abcde"))
    kinds = [text.split()[-1] for kind, text, _, _ in learnt(many, 4) if kind == "critique"]
    assert kinds == ["fine", "fine", "bad", "bad"]
    few = attempt(list("abcd"), right=set("abc"))
    assert [text.split()[-1] for kind, text, _, _ in learnt(few, 4) if kind == "critique"] == ["fine"] * 3 + ["bad"]


def test_the_choice_follows_from_the_prompt_id_alone():
    texts = list("abcdefgh")
    assert learnt(attempt(texts, set()), 3) == learnt(attempt(texts, set()), 3)
    assert any(learnt(attempt(texts, set(), name=str(n)), 3) != learnt(attempt(texts, set()), 3) for n in range(5))


def test_refinements_and_cut_drafts_are_left_out():
    one = attempt(["a", "b", "c"], right={"b"}, cut=(0,))
    refined = replace(one, drafts=(*one.drafts[:2], replace(one.drafts[2], turn=2, parents=(1,))))
    assert [text for kind, text, _, _ in learnt(refined) if kind == "answer"] == ["b"]


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (attempt(["a"], set(), cut=(0,)), "cut"),
        (replace(attempt(["a"], set()), scores=(Score(0.0, False),)), "no critique"),
        (replace(attempt(["a"], set()), scores=(Score(float("nan"), False),)), "no score"),
    ],
)
def test_attempts_without_an_example_are_counted(one: Attempt, reason: str):
    assert (select(one).examples, select(one).dropped) == ([], {reason: 1})


def test_the_contexts_learnt_are_those_of_the_strategy():
    talk = chat.load(WORDS, (2,), Requests("again", "check"))
    [group] = select(attempt(["yes", "no"], right={"yes"})).examples
    texts = [WORDS.decode([*s.context, *s.target]) for s in rows.samples_of(group, (), talk)]
    assert texts == [
        "<s><u>Which?<a>yes</s>",
        "<s><u>Which?<a>yes</s><u>check<a>yes is fine</s>",
        "<s><u>Which?<a>no</s><u>check<a>no is bad</s>",
        "<s><u>Which?<a>no</s><u>check<a>no is bad</s><u>again<a>yes</s>",
    ]
