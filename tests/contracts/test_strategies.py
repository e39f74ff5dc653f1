"""Laws of every strategy: it asks as often as it says, shows its own drafts only, and does not mind who is fast."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from upturn import registry
from upturn.strategies import _base, aggregate, chains, critique_refine
from upturn.tasks import keywords
from upturn.types import Attempt, Draft, Kind, Prompt, Requests, answers

PROMPT = Prompt("p", "Which?")
NAMES = registry.names("strategies")
PARENTS: list[tuple[str, dict[str, Any], list[tuple[int, ...]]]] = [
    ("parallel", {}, [(), (), (), ()]),
    ("chain", {}, [(), (0,), (1,), (2,)]),
    ("star", {}, [(), (0,), (0,), (0,)]),
    ("few_shot", {}, [(), (0,), (0, 1), (0, 1, 2)]),
    ("aggregate", {"proposals": 3}, [(), (), (), (0, 1, 2)]),
    ("aggregate", {"proposals": 2, "layers": 1}, [(), (), (0, 1), (0, 1), (2, 3)]),
    ("chains", {"chains": 2, "turns": 3}, [(), (), (0,), (1,), (2,), (3,)]),
    ("critique_refine", {"turns": 3}, [(), (0,), (0, 1), (2,), (2, 3)]),
]
"""What drafts are shown, by hand; four drafts where the settings say nothing."""
BATCHES: list[tuple[str, dict[str, Any], list[int]]] = [
    ("parallel", {}, [4]),
    ("star", {}, [1, 3]),
    ("chain", {}, [1, 1, 1, 1]),
    ("few_shot", {}, [1, 1, 1, 1]),
    ("aggregate", {"layers": 1}, [4, 4, 1]),
    ("chains", {"turns": 3}, [4, 4, 4]),
    ("critique_refine", {"turns": 2}, [1, 1, 1]),
]


def numbers(name: str) -> list[str]:
    """The settings of a strategy that are whole numbers."""
    fields = registry.find("strategies", name).Config.model_fields
    return [field for field, about in fields.items() if about.annotation is int]


def configs() -> list[Any]:
    """Every strategy as it comes, and with each of its numbers at several values."""
    found = []
    for name in NAMES:
        many = [{}, *({field: value} for field in numbers(name) for value in (1, 2, 7))]
        found += [pytest.param(name, settings, id=f"{name}-{settings}") for settings in many]
    return found


every = pytest.mark.parametrize(("name", "settings"), configs())


class Scripted:
    """Answers each call with its number, some later than others, and notes how many calls wait at the same time."""

    def __init__(self, seed: int | None = None, cut: bool = False, says: str = "draft") -> None:
        self.calls = 0
        self.waiting = 0
        self.batches: list[int] = []
        self.cut, self.says = cut, says
        self.random = random.Random(seed) if seed is not None else None
        """How long each answer takes; all the same where None."""
        self.made: dict[int, Draft] = {}

    async def __call__(self, prompt: Prompt, shown: Sequence[Draft], request: str = "", kind: Kind = "answer") -> Draft:
        assert prompt == PROMPT
        assert all(self.made.get(draft.index) == draft for draft in shown), "it shows what the model never said"
        index, parents = self.calls, tuple(draft.index for draft in shown)
        last = max((draft.turn for draft in shown), default=0)
        self.calls += 1
        self.waiting += 1
        for _ in range(self.random.randrange(20) if self.random else 1):
            await asyncio.sleep(0)
        if self.waiting:
            self.batches.append(self.waiting)
        self.waiting = 0
        self.made[index] = Draft(
            index=index,
            turn=last if kind == "critique" else last + 1,
            parents=parents,
            text=f"{index} {self.says}",
            token_ids=(index,),
            sampler_logprobs=(-0.5,),
            finish_reason="length" if self.cut else "stop",
            prompt_tokens=5,
            cached_tokens=0,
            kind=kind,
            request=request,
        )
        return self.made[index]


def generate(name: str, settings: dict[str, Any], sampler: Scripted) -> list[Draft]:
    module = registry.find("strategies", name)
    return asyncio.run(module.generate(PROMPT, sampler, module.Config(**settings)))


def test_the_table_holds_every_strategy():
    assert {name for name, *_ in PARENTS} == {name for name, *_ in BATCHES} == set(NAMES)


@every
def test_a_strategy_asks_as_often_as_its_config_says(name: str, settings: dict[str, Any]):
    sampler = Scripted()
    drafts = generate(name, settings, sampler)
    assert sampler.calls == len(drafts) == _base.num_drafts(registry.find("strategies", name).Config(**settings))


@every
def test_a_drafts_place_is_its_index_whoever_answers_first(name: str, settings: dict[str, Any]):
    in_order = generate(name, settings, Scripted())
    for seed in range(5):
        drafts = generate(name, settings, Scripted(seed))
        assert [draft.index for draft in drafts] == list(range(len(drafts)))
        assert drafts == in_order


@every
def test_a_draft_is_shown_only_earlier_drafts(name: str, settings: dict[str, Any]):
    drafts = generate(name, settings, Scripted())
    assert all(parent < draft.index for draft in drafts for parent in draft.parents)


@every
def test_a_cut_draft_may_be_shown(name: str, settings: dict[str, Any]):
    cut, whole = generate(name, settings, Scripted(cut=True)), generate(name, settings, Scripted())
    assert [draft.parents for draft in cut] == [draft.parents for draft in whole]


@every
def test_the_first_draft_is_a_direct_answer(name: str, settings: dict[str, Any]):
    first = generate(name, settings, Scripted())[0]
    assert (first.turn, first.parents, first.kind, first.request) == (1, (), "answer", "")


@pytest.mark.parametrize(("name", "settings", "parents"), PARENTS)
def test_the_parents_are_as_drawn_by_hand(name: str, settings: dict[str, Any], parents: list[tuple[int, ...]]):
    assert [draft.parents for draft in generate(name, settings, Scripted())] == parents


@pytest.mark.parametrize(("name", "settings", "batches"), BATCHES)
def test_independent_drafts_are_asked_for_in_one_batch(name: str, settings: dict[str, Any], batches: list[int]):
    sampler = Scripted()
    generate(name, settings, sampler)
    assert sampler.batches == batches


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in NAMES for field in numbers(name)])
def test_less_than_nothing_is_refused(name: str, field: str):
    config = registry.find("strategies", name).Config
    if (name, field) == ("aggregate", "layers"):
        assert config(layers=0).num_drafts == 5
    else:
        with pytest.raises(ValidationError, match=field):
            config(**{field: 0})
    with pytest.raises(ValidationError, match=field):
        config(**{field: -1})


class TestCritiqueRefine:
    def test_answers_and_critiques_take_turns(self):
        cfg = critique_refine.Config(turns=2)
        drafts = asyncio.run(critique_refine.generate(PROMPT, Scripted(), cfg))
        assert [(draft.kind, draft.turn, draft.request) for draft in drafts] == [
            ("answer", 1, ""),
            ("critique", 1, ""),
            ("answer", 2, ""),
        ]

    @pytest.mark.parametrize(
        ("says", "stop"),
        [
            ("Fine. No Changes NEEDED!", "no changes needed"),
            ('All is well: "No changes needed."', "No changes needed."),
            ("**All good!**", "all good!"),
        ],
    )
    def test_where_nothing_is_wrong_the_answer_is_kept_for_all_turns_left(self, says: str, stop: str):
        drafts = generate("critique_refine", {"turns": 3, "stop": stop}, Scripted(says=says))
        assert [(draft.kind, draft.turn, draft.parents) for draft in drafts] == [
            ("answer", 1, ()),
            ("critique", 1, (0,)),
            ("answer", 2, (0, 1)),
            ("answer", 3, (2,)),
        ]
        answer, critique, kept, again = drafts
        assert kept.token_ids == again.token_ids == answer.token_ids
        assert [draft.kept for draft in drafts] == [False, False, True, True]
        folded = answers([Attempt(PROMPT, tuple(drafts))])[0].drafts
        assert [draft.num_tokens for draft in folded] == [answer.num_tokens, critique.num_tokens, 0]
        assert [draft.critique for draft in folded] == ["", critique.text, ""]
        assert [draft.parents for draft in folded] == [(), (0,), (1,)]
        assert [draft.prompt_tokens for draft in folded] == [answer.prompt_tokens, critique.prompt_tokens, 0]

    def test_the_words_must_end_the_critique(self):
        says = "There are no changes needed and it can be edited."
        assert len(generate("critique_refine", {"turns": 3}, Scripted(says=says))) == 5
        assert all(draft.num_tokens for draft in generate("critique_refine", {"turns": 3}, Scripted(says=says)))

    def test_only_a_critique_can_end_it(self):
        class Praises(Scripted):
            async def __call__(self, *args: Any, **how: Any) -> Draft:
                self.says = "fine" if how.get("kind") == "critique" else "no changes needed"
                return await super().__call__(*args, **how)

        assert len(generate("critique_refine", {"turns": 3}, Praises())) == 5

    def test_without_words_to_stop_it_goes_on(self):
        assert len(generate("critique_refine", {"turns": 3, "stop": ""}, Scripted(says="no changes needed"))) == 5

    @pytest.mark.parametrize("request_", [Requests("Again.").critique, keywords.Config().critique_request])
    def test_the_requests_ask_for_the_words_that_end_it(self, request_: str):
        assert critique_refine.Config().stop.lower() in request_.lower()


def test_num_drafts_falls_back_on_turns():
    assert _base.num_drafts(registry.find("strategies", "star").Config(turns=3)) == 3
    assert _base.num_drafts(chains.Config(chains=3, turns=2)) == 6
    assert _base.num_drafts(critique_refine.Config(turns=4)) == 7
    assert _base.num_drafts(aggregate.Config(proposals=4, layers=2)) == 13
    assert aggregate.Config(proposals=4, layers=2).turns == 4
