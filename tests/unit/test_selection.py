"""Selection rules on small attempts, worked by hand, and the law that every slot is accounted for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upturn import registry
from upturn.selection import best_vs_worst, consistency, flips, last_vs_first, right_vs_wrong
from upturn.selection._base import REASONS, Selection, label_precision, why_none
from upturn.types import Attempt, Draft, Group, Pair, Prompt, Score

NAN = math.nan


def attempt(
    values: list[float],
    texts: str = "abcdefgh",
    cut: tuple[int, ...] = (),
    name: str = "p",
    shown: Callable[[int], tuple[int, ...]] = lambda i: (i - 1,) if i else (),
) -> Attempt:
    """A chain, or what `shown` makes of it: a draft for each value, right where it is 1; one letter is its text."""
    drafts: list[Draft] = []
    for i in range(len(values)):
        turn = 1 + max((drafts[parent].turn for parent in shown(i)), default=0)
        finish = "length" if i in cut else "stop"
        drafts.append(Draft(i, turn, shown(i), texts[i], (i,), (-1.0,), finish, 5, 0))
    return Attempt(Prompt(name, "?"), tuple(drafts), tuple(Score(value, value == 1) for value in values))


def indices(selection: Selection) -> list[tuple[int, int]]:
    return [(pair.chosen.index, pair.rejected.index) for pair in selection.pairs]


def best(values: list[float], *, texts: str = "abcdefgh", cut: tuple[int, ...] = (), **config: Any) -> Selection:
    return best_vs_worst.select([attempt(values, texts, cut)], best_vs_worst.Config(**config))


class TestBestVsWorst:
    def test_the_best_against_the_worst(self):
        selection = best([0.5, 0.2, 1.0, 0.7])
        assert indices(selection) == [(2, 1)]
        assert selection.dropped == selection.set_aside == {}
        [pair] = selection.pairs
        assert (pair.p, pair.chosen_right, pair.rejected_right) == (1.0, True, False)

    def test_a_pair_keeps_what_was_said_of_its_drafts(self):
        judged = attempt([0.5, 1.0])
        said = replace(judged, scores=tuple(replace(s, critique=f"worth {s.value}") for s in judged.scores))
        [pair] = best_vs_worst.select([said], best_vs_worst.Config()).pairs
        assert (pair.chosen_critique, pair.rejected_critique) == ("worth 1.0", "worth 0.5")

    def test_of_equally_good_drafts_the_earliest_is_chosen(self):
        assert indices(best([0.0, 1.0, 1.0])) == [(1, 0)]

    @pytest.mark.parametrize(("rejected", "expected"), [("worst", [(2, 1), (2, 0)]), ("nearest", [(2, 3), (2, 0)])])
    def test_several_pairs_in_the_order_asked_for(self, rejected: str, expected: list[tuple[int, int]]):
        assert indices(best([0.5, 0.2, 1.0, 0.7], rejected=rejected, pairs_per_prompt=2)) == expected

    def test_slots_beyond_the_worse_drafts_are_counted(self):
        selection = best([0.5, 0.2, 1.0], pairs_per_prompt=5)
        assert indices(selection) == [(2, 1), (2, 0)]
        assert selection.dropped == {"no further draft": 3}

    def test_a_text_is_rejected_once(self):
        assert indices(best([0.1, 0.1, 1.0], texts="aab", pairs_per_prompt=2)) == [(2, 0)]

    def test_random_is_seeded_by_the_prompt(self):
        config = best_vs_worst.Config(rejected="random")
        many = [attempt([0.1, 0.2, 0.3, 1.0], name=f"p{i}") for i in range(30)]
        selection = best_vs_worst.select(many, config)
        again = best_vs_worst.select(many[::-1], config)
        assert indices(again)[::-1] == indices(selection)
        assert set(indices(selection)) == {(3, 0), (3, 1), (3, 2)}

    def test_soft_labels_are_the_sigmoid_of_the_difference(self):
        # 1 / (1 + exp(-(2.5 - 0.5))) = 1 / (1 + exp(-2)) = 0.8807970779778823
        [pair] = best([0.5, 2.5], labels="soft").pairs
        assert pair.p == pytest.approx(0.8807970779778823, abs=1e-15)

    @pytest.mark.parametrize(
        ("values", "config", "reason"),
        [
            ([0.3, 0.3], {}, "tied"),
            ([0.3, 0.4], {"margin": 0.2}, "margin"),
            ([NAN, NAN], {}, "no score"),
            ([1.0], {}, "one draft"),
            ([NAN, 1.0], {}, "one draft"),
            ([0.1, 1.0], {"texts": "aa"}, "same text"),
            ([0.1, 1.0], {"cut": (0, 1)}, "cut"),
            ([0.1, 1.0], {"cut": (0,)}, "one draft"),
        ],
    )
    def test_reasons(self, values: list[float], config: dict[str, Any], reason: str):
        selection = best(values, **config)
        assert (selection.pairs, selection.dropped) == ([], {reason: 1})

    def test_a_margin_that_is_just_met_makes_a_pair(self):
        assert indices(best([0.25, 0.5], margin=0.25)) == [(1, 0)]

    def test_nan_scores_are_set_aside_and_counted(self):
        selection = best([NAN, 0.2, 1.0, NAN])
        assert indices(selection) == [(2, 1)]
        assert selection.set_aside == {"no score": 2}

    def test_a_cut_draft_is_never_chosen_and_is_rejected_only_on_request(self):
        assert indices(best([0.1, 0.5, 1.0], cut=(0, 2))) == []
        selection = best([0.1, 0.5, 1.0], cut=(0, 2), reject_cut=True)
        assert indices(selection) == [(1, 0)]
        assert selection.set_aside == {"cut": 2}


class TestLastVsFirst:
    def select(self, one: Attempt, **config: Any) -> Selection:
        return last_vs_first.select([one], last_vs_first.Config(**config))

    def test_no_score_is_needed(self):
        one = attempt([0.0, 0.0, 0.0])
        [pair] = self.select(Attempt(one.prompt, one.drafts)).pairs
        assert (pair.chosen.index, pair.rejected.index) == (2, 0)
        assert (pair.chosen_right, pair.rejected_right) == (False, False)

    def test_scores_fill_in_what_is_right(self):
        [pair] = self.select(attempt([1.0, 0.0])).pairs
        assert (pair.chosen_right, pair.rejected_right) == (False, True)

    @pytest.mark.parametrize(
        ("one", "reason"),
        [
            (attempt([1.0]), "one draft"),
            (attempt([0.0, 1.0], "aa"), "same text"),
            (attempt([0.0, 1.0], cut=(1,)), "cut"),
            (attempt([0.0, 1.0], cut=(0,)), "cut"),
        ],
    )
    def test_reasons(self, one: Attempt, reason: str):
        assert self.select(one).dropped == {reason: 1}

    def test_a_cut_first_draft_is_rejected_on_request(self):
        assert indices(self.select(attempt([0.0, 1.0], cut=(0,)), reject_cut=True)) == [(1, 0)]


class TestRightVsWrong:
    def select(self, one: Attempt, **config: Any) -> Selection:
        return right_vs_wrong.select([one], right_vs_wrong.Config(**config))

    @pytest.mark.parametrize(
        ("values", "pair"),
        [
            ([0.0, 0.5, 1.0, 1.0], (2, 1)),
            ([1.0, 1.0, 0.0, 0.0], (0, 2)),
            ([0.0, 1.0, 0.0], (1, 0)),
            ([0.0, NAN, 1.0], (2, 0)),
        ],
    )
    def test_the_first_right_one_against_the_nearest_wrong_one(self, values: list[float], pair: tuple[int, int]):
        assert indices(self.select(attempt(values))) == [pair]

    @pytest.mark.parametrize(
        ("one", "reason"),
        [
            (attempt([1.0, 1.0]), "all right"),
            (attempt([0.0, 0.5]), "all wrong"),
            (attempt([NAN, NAN]), "no score"),
            (attempt([0.0, 1.0], cut=(1,)), "cut"),
            (attempt([0.0, 1.0], cut=(0,)), "cut"),
            (attempt([0.0, 1.0], "aa"), "same text"),
        ],
    )
    def test_reasons(self, one: Attempt, reason: str):
        assert self.select(one).dropped == {reason: 1}


class TestFlips:
    def select(self, one: Attempt, **config: Any) -> Selection:
        return flips.select([one], flips.Config.model_validate({"kinds": "repairs"} | config))

    def test_the_repair_against_the_draft_that_it_was_shown(self):
        [pair] = (selection := self.select(attempt([0.0, 0.5, 1.0, 1.0]))).pairs
        assert indices(selection) == [(2, 1)]
        assert (pair.p, pair.chosen_right, pair.rejected_right) == (1.0, True, False)

    def test_in_a_star_every_repair_starts_from_the_first_draft(self):
        star = attempt([0.0, 1.0, 0.0, 1.0], shown=lambda i: (0,) if i else ())
        selection = self.select(star, pairs_per_prompt=3)
        assert indices(selection) == [(1, 0), (3, 0)]
        assert selection.dropped == {"no further draft": 1}

    def test_of_several_drafts_shown_the_last_is_the_one_repaired(self):
        few_shot = attempt([1.0, 0.0, 1.0], shown=lambda i: tuple(range(i)))
        assert indices(self.select(few_shot)) == [(2, 1)]

    def test_a_chain_may_be_repaired_twice(self):
        assert indices(self.select(attempt([0.0, 1.0, 0.0, 1.0]), pairs_per_prompt=2)) == [(1, 0), (3, 2)]

    def test_a_damage_is_the_draft_shown_against_its_refinement(self):
        star = attempt([1.0, 0.0, 1.0, 0.5], shown=lambda i: (0,) if i else ())
        assert indices(self.select(star, kinds="damages", pairs_per_prompt=2)) == [(0, 1), (0, 3)]
        assert self.select(star).dropped == {"no flip": 1}

    def test_both_kinds_come_in_the_order_of_the_refinements(self):
        chain = attempt([0.0, 1.0, 0.0, 1.0])
        assert indices(self.select(chain, kinds="both", pairs_per_prompt=3)) == [(1, 0), (1, 2), (3, 2)]

    def test_a_repair_is_taken_once(self):
        again = attempt([0.0, 1.0, 0.0, 1.0], "abcb")
        assert indices(self.select(again, pairs_per_prompt=2)) == [(1, 0)]

    def test_a_draft_without_score_breaks_the_chain(self):
        assert indices(self.select(attempt([0.0, NAN, 1.0, 0.0, 1.0]))) == [(4, 3)]

    @pytest.mark.parametrize(
        ("one", "reason"),
        [
            (attempt([NAN, NAN]), "no score"),
            (attempt([0.0, 1.0], shown=lambda i: ()), "nothing refined"),
            (attempt([NAN, 1.0]), "nothing refined"),
            (attempt([1.0, 1.0, 0.0]), "no flip"),
            (attempt([0.0, 1.0], cut=(1,)), "cut"),
            (attempt([0.0, 1.0], cut=(0,)), "cut"),
            (attempt([0.0, 1.0], "aa"), "same text"),
        ],
    )
    def test_reasons(self, one: Attempt, reason: str):
        assert self.select(one).dropped == {reason: 1}

    def test_a_cut_draft_is_rejected_only_on_request(self):
        assert indices(self.select(attempt([0.0, 1.0], cut=(0,)), reject_cut=True)) == [(1, 0)]
        assert indices(self.select(attempt([0.0, 1.0], cut=(1,)), reject_cut=True)) == []


class TestConsistency:
    def select(self, one: Attempt, **config: Any) -> Selection:
        return consistency.select([one], consistency.Config(**config), lambda _, answer: answer.strip("_!").lower())

    def test_the_last_three_agree_by_key_and_the_first_does_not(self):
        assert indices(self.select(attempt([0.0] * 4, "abBb"))) == [(3, 0)]

    @pytest.mark.parametrize(
        ("texts", "cut", "reason"),
        [
            ("abcb", (), "disagree"),
            ("aaaa", (), "tied"),
            ("Aaaa", (), "tied"),
            ("a_!_", (), "no answer"),
            ("abb", (), "too few drafts"),
            ("abbb", (3,), "cut"),
            ("abbb", (0,), "cut"),
        ],
    )
    def test_reasons(self, texts: str, cut: tuple[int, ...], reason: str):
        assert self.select(attempt([0.0] * len(texts), texts, cut)).dropped == {reason: 1}

    def test_fewer_may_have_to_agree(self):
        assert indices(self.select(attempt([0.0] * 3, "abb"), agree=2)) == [(2, 0)]


class TestLabelPrecision:
    def test_by_hand(self):
        one = attempt([0.0, 1.0, 0.5])
        first, second, third = one.drafts
        pairs = [
            Pair(one.prompt, second, first, 1.0, True, False),  # true, chosen came later
            Pair(one.prompt, second, third, 1.0, True, False),  # true, chosen came earlier
            Pair(one.prompt, third, first, 1.0, False, False),  # not true
            Pair(one.prompt, first, second, 1.0, False, True),  # the wrong way round, chosen came earlier
        ]
        quality = label_precision(pairs)
        assert (quality.label_precision, quality.chosen_earlier) == (0.5, 0.5)

    def test_without_pairs_there_is_no_number(self):
        assert math.isnan(label_precision([]).label_precision)


VALUES = st.lists(st.sampled_from([0.0, 0.25, 1.0, NAN, math.inf, -math.inf]), max_size=6)
SHOWN: list[Callable[[int], tuple[int, ...]]] = [
    lambda i: (i - 1,) if i else (),  # chain
    lambda i: (0,) if i else (),  # star
    lambda i: (),  # parallel
    lambda i: tuple(range(i)),  # few-shot
    lambda i: ((i - 1) // 2,) if i else (),  # tree
    lambda i: (i - 2,) if i > 1 else (),  # two chains
]
ATTEMPTS = st.lists(
    st.builds(
        attempt,
        VALUES,
        st.text("ab ", min_size=6, max_size=6),
        st.sets(st.integers(0, 5)).map(tuple),
        st.sampled_from("pqr"),
        st.sampled_from(SHOWN),
    ),
    max_size=6,
)
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "pairs_per_prompt": st.integers(1, 3),
    "reject_cut": st.booleans(),
    "labels": st.sampled_from(["hard", "soft"]),
    "cap": st.integers(1, 3),
    "unique": st.booleans(),
    "both": st.booleans(),
    "keep": st.sampled_from(["extremes", "all"]),
    "proposals": st.integers(1, 3),
    "direct": st.booleans(),
    "reward": st.sampled_from(["own", "last", "sum", "improvement", "shaped"]),
    "estimator": st.sampled_from(["rloo", "grpo", "reinforce"]),
    "turns": st.sampled_from([None, (1,), (2,), (1, 3)]),
}
"""Settings that rules have in common, and what they may be."""
LEARNS_CUT = {"advantages"}
"""Rules in which a cut draft learns like any other."""


@pytest.mark.parametrize("name", registry.names("selection"))
@given(attempts=ATTEMPTS, data=st.data())
def test_every_slot_is_an_example_or_counted_and_no_example_teaches_nonsense(
    name: str, attempts: list[Attempt], data: st.DataObject
):
    module: ModuleType = registry.find("selection", name)
    known = module.Config.model_fields
    config = module.Config(**{field: data.draw(values) for field, values in SETTINGS.items() if field in known})
    selection: Selection = module.select(attempts, config)
    slots = len(attempts) * getattr(config, "pairs_per_prompt", 1)
    assert len(selection.examples) + sum(selection.dropped.values()) == slots
    assert all(selection.dropped.values()) and all(selection.set_aside.values())
    for example in selection.examples:
        if isinstance(example, Pair):
            check_pair(example, getattr(config, "reject_cut", False))
        else:
            check_group(example, getattr(config, "reject_cut", False), name in LEARNS_CUT)
    assert repr(module.select(attempts, config)) == repr(selection)  # NaN is not equal to itself


ASKS = {name for name in registry.names("selection") if hasattr(registry.find("selection", name), "uses_right")}


@pytest.mark.parametrize("name", sorted({*registry.names("selection")} - ASKS))
@given(attempts=ATTEMPTS)
def test_a_rule_that_does_not_say_so_never_asks_what_is_right(name: str, attempts: list[Attempt]):
    """So a run without labels can use it."""
    module: ModuleType = registry.find("selection", name)
    turned = [
        replace(one, scores=tuple(replace(score, right=not score.right) for score in one.scores)) for one in attempts
    ]
    here, there = (module.select(those, module.Config()) for those in (attempts, turned))
    assert [learnt(example) for example in here.examples] == [learnt(example) for example in there.examples]


def learnt(example: Pair | Group) -> Any:
    if isinstance(example, Pair):
        return example.chosen, example.rejected, example.p
    return example.attempt.drafts, example.values


def test_these_rules_ask_what_is_right():
    assert sorted(ASKS) == ["aggregation", "correct", "critiques", "desirable", "flips", "right_vs_wrong"]


def check_pair(pair: Pair, reject_cut: bool) -> None:
    assert pair.chosen.complete
    assert pair.rejected.complete or reject_cut
    assert pair.chosen.text.strip() != pair.rejected.text.strip()
    assert 0.5 <= pair.p <= 1


def check_group(group: Group, reject_cut: bool, learns_cut: bool) -> None:
    drafts, scores = group.attempt.drafts, group.attempt.scores
    assert [draft.index for draft in drafts] == list(range(len(drafts)))
    assert all(parent < draft.index for draft in drafts for parent in draft.parents)
    learnt = [each for each in zip(drafts, scores, group.values, strict=True) if each[2] is not None]
    assert learnt
    for draft, score, value in learnt:
        assert value is not None and math.isfinite(value)
        assert math.isfinite(score.value) or value == 0  # 0: an answer to another prompt
        assert draft.complete or learns_cut or (value < 0 and reject_cut)


@pytest.mark.parametrize("name", registry.names("selection"))
def test_every_reason_has_words(name: str):
    dropped = (registry.find("selection", name).select.__doc__ or "").partition("Dropped:")[2]
    reasons = {" ".join(reason.split()) for reason in re.findall(r"'([^']+)'", dropped)}
    assert reasons and reasons <= set(REASONS)


def test_where_no_prompt_gave_an_example_prompts_are_counted_and_not_slots():
    none = best_vs_worst.select([attempt([0.0, 1.0])] * 3, best_vs_worst.Config(min_chosen=2, pairs_per_prompt=4))
    assert none.dropped == {"low": 12}
    assert why_none(none.dropped, 3) == "3 whose best draft scores below min_chosen"
    assert why_none({"own words": 2, "tied": 1}, 3) == "2 own words, 1 whose drafts are tied"
