"""Laws of every strategy: it asks `turns` times, shows only its own drafts, and does the same twice."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from upturn import registry
from upturn.types import Draft, Prompt

PROMPT = Prompt("p", "Which?")
NAMES = registry.names("strategies")
PARENTS = {
    "parallel": [(), (), (), ()],
    "chain": [(), (0,), (1,), (2,)],
    "star": [(), (0,), (0,), (0,)],
    "few_shot": [(), (0,), (0, 1), (0, 1, 2)],
}
"""What four drafts are shown, by hand."""


class Scripted:
    """Answers from a list, and notes how many calls wait at the same time."""

    def __init__(self, cut: bool = False) -> None:
        self.calls = 0
        self.waiting = 0
        self.batches: list[int] = []
        self.cut = cut

    async def __call__(self, prompt: Prompt, shown: Sequence[Draft]) -> Draft:
        assert prompt == PROMPT
        index, parents = self.calls, tuple(draft.index for draft in shown)
        turn = 1 + max((draft.turn for draft in shown), default=0)
        self.calls += 1
        self.waiting += 1
        await asyncio.sleep(0)
        if self.waiting:
            self.batches.append(self.waiting)
        self.waiting = 0
        finish = "length" if self.cut else "stop"
        return Draft(index, turn, parents, f"draft {index}", (index,), (-0.5,), finish, 5, 0)


def generate(name: str, turns: int, sampler: Scripted) -> list[Draft]:
    module = registry.find("strategies", name)
    return asyncio.run(module.generate(PROMPT, sampler, module.Config(turns=turns)))


def test_the_four_strategies_are_found():
    assert set(PARENTS) <= set(NAMES)


@pytest.mark.parametrize("turns", [1, 2, 4, 7])
@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_asks_as_often_as_its_config_says(name: str, turns: int):
    sampler = Scripted()
    drafts = generate(name, turns, sampler)
    assert sampler.calls == turns
    assert [draft.index for draft in drafts] == list(range(turns))


@pytest.mark.parametrize("name", NAMES)
def test_a_scripted_sampler_gives_the_same_twice(name: str):
    assert generate(name, 4, Scripted()) == generate(name, 4, Scripted())


@pytest.mark.parametrize("name", NAMES)
def test_a_draft_is_shown_only_earlier_drafts(name: str):
    assert all(parent < draft.index for draft in generate(name, 6, Scripted()) for parent in draft.parents)


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_draft_may_be_shown(name: str):
    cut, whole = generate(name, 4, Scripted(cut=True)), generate(name, 4, Scripted())
    assert [draft.parents for draft in cut] == [draft.parents for draft in whole]


@pytest.mark.parametrize("name", PARENTS)
def test_the_parents_are_as_drawn_by_hand(name: str):
    assert [draft.parents for draft in generate(name, 4, Scripted())] == PARENTS[name]


@pytest.mark.parametrize(
    ("name", "batches"),
    [("parallel", [4]), ("star", [1, 3]), ("chain", [1, 1, 1, 1]), ("few_shot", [1, 1, 1, 1])],
)
def test_independent_drafts_are_asked_for_in_one_batch(name: str, batches: list[int]):
    sampler = Scripted()
    generate(name, 4, sampler)
    assert sampler.batches == batches


@pytest.mark.parametrize("name", NAMES)
def test_no_turn_at_all_is_refused(name: str):
    with pytest.raises(ValueError, match="turns"):
        registry.find("strategies", name).Config(turns=0)
