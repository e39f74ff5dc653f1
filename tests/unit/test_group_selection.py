"""Rules that give groups: right drafts, advantages, win rates, aggregation, worked by hand and against numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upturn.selection import advantages, aggregation, correct, desirable, win_rates
from upturn.selection._base import Selection
from upturn.types import Attempt, Draft, Group, Prompt, Score

NAN = math.nan
Parents = Sequence[tuple[int, ...]]
CHAIN: Parents = [(), (0,), (1,)]
STAR: Parents = [(), (0,), (0,)]
FEW_SHOT: Parents = [(), (0,), (0, 1)]
TREE: Parents = [(), (0,), (0,), (1,), (1,)]
"""0 has the children 1 and 2; 1 has the children 3 and 4."""
TWO_CHAINS: Parents = [(), (), (0,), (1,)]


def attempt(
    values: Sequence[float],
    parents: Parents = (),
    *,
    texts: str = "abcdefgh",
    cut: tuple[int, ...] = (),
    name: str = "p",
) -> Attempt:
    """A draft for each value, right where it is 1; direct answers where no parents are told; one letter is a text."""
    drafts: list[Draft] = []
    for i, shown in enumerate(parents or [()] * len(values)):
        turn = 1 + max((drafts[parent].turn for parent in shown), default=0)
        drafts.append(Draft(i, turn, shown, texts[i], (i,), (-1.0,), "length" if i in cut else "stop", 5, 0))
    return Attempt(Prompt(name, "?"), tuple(drafts), tuple(Score(value, value == 1) for value in values))


def only(selection: Selection) -> Group:
    [group] = selection.examples
    assert isinstance(group, Group)
    return group


class TestCorrect:
    def select(self, one: Attempt, **config: Any) -> Selection:
        return correct.select([one], correct.Config(**config))

    def test_the_first_right_draft(self):
        group = only(self.select(one := attempt([0, 1, 1, 0.5])))
        assert group == Group(one, (None, 1.0, None, None))

    def test_up_to_the_cap(self):
        assert only(self.select(attempt([1, 0, 1, 1, 1]), cap=3)).values == (1.0, None, 1.0, 1.0, None)

    @pytest.mark.parametrize(("unique", "values"), [(True, (1.0, None, 1.0)), (False, (1.0, 1.0, 1.0))])
    def test_a_text_counts_once_where_texts_are_unique(self, unique: bool, values: tuple[float | None, ...]):
        assert only(self.select(attempt([1, 1, 1], texts="aab"), cap=3, unique=unique)).values == values

    def test_a_cut_draft_is_never_learnt(self):
        selection = self.select(attempt([1, 1], cut=(0,)), cap=2)
        assert only(selection).values == (None, 1.0)
        assert selection.set_aside == {"cut": 1}

    @pytest.mark.parametrize(
        ("one", "reason"),
        [
            (attempt([]), "no score"),
            (attempt([NAN, NAN]), "no score"),
            (attempt([0, NAN, 0.5]), "none right"),
            (attempt([1, 0], cut=(0,)), "cut"),
        ],
    )
    def test_reasons(self, one: Attempt, reason: str):
        selection = self.select(one)
        assert (selection.examples, selection.dropped) == ([], {reason: 1})


def advantage(one: Attempt, **config: Any) -> tuple[float | None, ...]:
    return only(advantages.select([one], advantages.Config(**config))).values


def rewards(one: Attempt, reward: str, **config: Any) -> tuple[float | None, ...]:
    return advantage(one, reward=reward, estimator="reinforce", **config)


class TestRewards:
    @pytest.mark.parametrize(
        ("reward", "parents", "expected"),
        [
            ("own", CHAIN, (1, 2, 4)),
            ("last", CHAIN, (4, 4, 4)),
            ("sum", CHAIN, (7, 7, 7)),
            ("improvement", CHAIN, (1, 1, 2)),
            ("shaped", CHAIN, (1, 2 + 10, 4 + 20)),
            ("last", (), (1, 2, 4)),  # chains of length 1
            ("sum", (), (1, 2, 4)),
            ("improvement", (), (1, 2, 4)),
            ("shaped", (), (1, 2, 4)),
            ("last", STAR, ((2 + 4) / 2, 2, 4)),
            ("sum", STAR, ((3 + 5) / 2, 3, 5)),
            ("improvement", STAR, (1, 1, 3)),
            ("last", FEW_SHOT, (4, 4, 4)),
            ("sum", FEW_SHOT, (7, 7, 7)),
            ("improvement", FEW_SHOT, (1, 1, 2)),  # the draft refined is the last one shown
        ],
    )
    def test_of_three_drafts(self, reward: str, parents: Parents, expected: tuple[float, ...]):
        assert rewards(attempt([1, 2, 4], parents), reward) == expected

    def test_a_draft_of_a_tree_takes_the_mean_over_its_leaves(self):
        one = attempt([1, 2, 4, 8, 16], TREE)
        assert rewards(one, "last") == (pytest.approx((4 + 8 + 16) / 3), 12, 4, 8, 16)
        # paths: 0 2 = 5, 0 1 3 = 11, 0 1 4 = 19
        assert rewards(one, "sum") == (pytest.approx(35 / 3), 15, 5, 11, 19)

    def test_what_an_aggregate_earns_all_proposals_earn(self):
        one = attempt([1, 2, 4], [(), (), (0, 1)])
        assert rewards(one, "last") == (4, 4, 4)
        assert rewards(one, "sum") == (7, 7, 7)

    def test_the_weight_of_shaping_can_be_set(self):
        assert rewards(attempt([0.25, 1.0], [(), (0,)]), "shaped", shaping=2) == (0.25, 1 + 2 * 0.75)

    @pytest.mark.parametrize(
        ("reward", "expected"),
        [
            ("own", (1, None, 4)),
            ("last", (4, None, 4)),
            ("sum", None),
            ("improvement", (1, None, None)),
            ("shaped", (1, None, None)),
        ],
    )
    def test_where_a_score_is_missing_what_rests_on_it_is_only_shown(self, reward: str, expected: Any):
        one = attempt([1, NAN, 4], CHAIN)
        if expected is None:
            config = advantages.Config(reward="sum", estimator="reinforce")
            assert advantages.select([one], config).dropped == {"no score": 1}
        else:
            assert rewards(one, reward) == expected

    def test_a_leaf_without_score_does_not_count(self):
        assert rewards(attempt([1, NAN, 4], STAR), "last") == (4, None, 4)
        assert rewards(attempt([1, NAN, 4], STAR), "sum") == (5, None, 5)

    def test_an_infinite_score_is_none(self):
        assert rewards(attempt([1, math.inf, 4]), "own") == (1, None, 4)


class TestEstimators:
    def test_leave_one_out_by_hand(self):
        # 1 - (0 + 0.5)/2, 0 - (1 + 0.5)/2, 0.5 - (1 + 0)/2
        assert advantage(attempt([1, 0, 0.5])) == (0.75, -0.75, 0.0)

    def test_grpo_by_hand(self):
        # mean 2, deviations -1 0 1, variance 2 / (3 - 1) = 1
        expected = (pytest.approx(-1 / 1.0001), 0, pytest.approx(1 / 1.0001))
        assert advantage(attempt([1, 2, 3]), estimator="grpo") == expected
        assert advantage(attempt([1, 2, 3]), estimator="grpo", scale=False) == (-1, 0, 1)

    def test_drafts_are_compared_with_those_of_their_turn(self):
        one = attempt([1, 0, 0.5, 1], TWO_CHAINS)
        assert advantage(one) == (1, -1, -0.5, 0.5)
        # every draft of a chain earns the last score: 0.5 and 1 at both turns
        assert advantage(one, reward="last") == (-0.5, 0.5, -0.5, 0.5)
        # shaped at turn 2: 0.5 + 10 (0.5 - 1) = -4.5, 1 + 10 (1 - 0) = 11
        assert advantage(one, reward="shaped") == (1, -1, -15.5, 15.5)

    def test_stage_one_of_score_holds_the_first_turn_still(self):
        assert advantage(attempt([1, 0, 0.5, 1], TWO_CHAINS), turns=(2,)) == (0, 0, -0.5, 0.5)

    def test_a_draft_without_score_is_not_compared(self):
        assert advantage(attempt([1, NAN, 0, 0.5])) == (0.75, None, -0.75, 0.0)

    def test_a_draft_without_room_to_begin_is_only_shown(self):
        one = attempt([1, 0, 0.5, 0], [(), (), (0,), (1,)], cut=(3,))
        full = replace(one.drafts[3], token_ids=(), sampler_logprobs=(), text="", finish_reason="context")
        one = replace(one, drafts=(*one.drafts[:3], full))
        assert advantage(one) == (1, -1, 0, None)

    def test_a_cut_draft_learns_and_is_not_set_aside(self):
        selection = advantages.select([attempt([1, 0], cut=(0, 1))], advantages.Config())
        assert only(selection).values == (1, -1)
        assert selection.set_aside == {}

    @pytest.mark.parametrize(
        ("one", "config", "reason"),
        [
            (attempt([]), {}, "no score"),
            (attempt([NAN, NAN]), {}, "no score"),
            (attempt([1, 1, 1]), {}, "tied"),
            (attempt([0.1, 0.1, 0.1]), {}, "tied"),  # 0.1 - (0.1 + 0.1 + 0.1 - 0.1) / 2 is not 0 in floats
            (attempt([0.1, 0.1, 0.1]), {"estimator": "grpo"}, "tied"),
            (attempt([0, 0]), {"estimator": "reinforce"}, "tied"),
            (attempt([1, 0, 1, 1], TWO_CHAINS), {"turns": (2,)}, "tied"),
            (attempt([1, 0, 1], CHAIN), {}, "one draft"),
            (attempt([1, NAN]), {"estimator": "grpo"}, "one draft"),
            (attempt([1, 0]), {"turns": (2,)}, "one draft"),
        ],
    )
    def test_reasons(self, one: Attempt, config: dict[str, Any], reason: str):
        selection = advantages.select([one], advantages.Config(**config))
        assert (selection.examples, selection.dropped) == ([], {reason: 1})

    def test_turns_count_from_one(self):
        with pytest.raises(ValueError, match="turns"):
            advantages.Config(turns=(0,))

    @given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=8).filter(lambda v: np.std(v) > 1e-3))
    def test_against_numpy(self, values: list[float]):
        one, r = attempt(values), np.array(values)
        rloo = [r[i] - np.delete(r, i).mean() for i in range(len(r))]
        assert advantage(one) == pytest.approx(rloo, abs=1e-9)
        assert advantage(one) == pytest.approx(len(r) / (len(r) - 1) * (r - r.mean()), abs=1e-9)
        assert sum(advantage(one)) == pytest.approx(0, abs=1e-9)  # type: ignore[arg-type]
        assert advantage(one, estimator="grpo") == pytest.approx((r - r.mean()) / (r.std(ddof=1) + 1e-4), abs=1e-9)


class TestDesirable:
    def select(self, *attempts: Attempt, **config: Any) -> Selection:
        return desirable.select(list(attempts), desirable.Config(**config))

    def test_a_right_a_wrong_and_a_stranger(self):
        one, other = attempt([0, 1, 0, 1]), attempt([1, 0], texts="xy", cut=(0,), name="q")
        first, second = self.select(one, other).examples[0], self.select(other, one).examples
        assert isinstance(first, Group)
        assert first.values == (-1.0, 1.0, None, None, 0.0)
        stranger, score = first.attempt.drafts[-1], first.attempt.scores[-1]
        assert stranger == replace(other.drafts[1], index=4)  # the first one of q is cut
        assert math.isnan(score.value) and not score.right and score.note
        assert first.attempt.drafts[:4] == one.drafts and first.attempt.prompt == one.prompt
        assert len(second) == 1  # q has no complete right draft

    def test_the_list_is_a_ring(self):
        three = [attempt([0, 1], texts=texts, name=name) for name, texts in zip("pqr", ("ab", "cd", "ef"), strict=True)]
        found = self.select(*three).examples
        assert [e.attempt.drafts[-1].text for e in found if isinstance(e, Group)] == ["c", "e", "a"]

    def test_a_stranger_answers_another_prompt_and_is_shown_nothing(self):
        one, again = attempt([0, 1]), attempt([1, 0], texts="cd")
        refined = attempt([NAN, 1, 0], CHAIN, texts="xyz", cut=(0,), name="q")
        group = self.select(one, again, refined).examples[0]
        assert isinstance(group, Group)
        assert (group.attempt.drafts[-1].text, group.attempt.drafts[-1].parents) == ("y", ())
        assert (group.attempt.drafts[-1].turn, group.attempt.drafts[-1].index) == (1, 2)

    def test_alone_there_is_no_stranger(self):
        assert only(self.select(one := attempt([0, 1]))) == Group(one, (-1.0, 1.0))

    def test_the_cap_counts_distinct_texts_of_each_kind(self):
        one = attempt([0, 0, 0, 1, 1, 1], texts="aabccd")
        assert only(self.select(one, cap=2)).values == (-1.0, None, -1.0, 1.0, None, 1.0)

    @pytest.mark.parametrize(
        ("one", "config", "values"),
        [
            (attempt([1, 1]), {"both": False}, (1.0, None)),
            (attempt([0, 0]), {"both": False}, (-1.0, None)),
            (attempt([1, 0], cut=(1,)), {"both": False}, (1.0, None)),
            (attempt([1, 0], cut=(1,)), {"reject_cut": True}, (1.0, -1.0)),
            (attempt([1, 0], cut=(0,)), {"both": False, "reject_cut": True}, (None, -1.0)),
        ],
    )
    def test_one_kind_or_a_cut_draft_on_request(self, one: Attempt, config: dict[str, Any], values: Any):
        assert only(self.select(one, **config)).values == values

    @pytest.mark.parametrize(
        ("one", "config", "reason"),
        [
            (attempt([NAN]), {}, "no score"),
            (attempt([1, 1]), {}, "all right"),
            (attempt([0, NAN]), {}, "all wrong"),
            (attempt([1, 0], cut=(0,)), {}, "cut"),
            (attempt([1, 0], cut=(1,)), {}, "cut"),
            (attempt([1], cut=(0,)), {"both": False}, "cut"),
        ],
    )
    def test_reasons(self, one: Attempt, config: dict[str, Any], reason: str):
        selection = self.select(one, **config)
        assert (selection.examples, selection.dropped) == ([], {reason: 1})


class TestWinRates:
    def select(self, one: Attempt, **config: Any) -> Selection:
        return win_rates.select([one], win_rates.Config(**config))

    def test_by_hand(self):
        # sigma(1) = 0.731058578630005, sigma(2) = 0.880797077977882, sigma(-x) = 1 - sigma(x)
        best = (0.5 + 0.731058578630005 + 0.880797077977882) / 3
        worst = (0.5 + 0.268941421369995 + 0.119202922022118) / 3
        assert only(self.select(attempt([1, 0, 2]))).values == pytest.approx((None, worst, best))
        assert only(self.select(attempt([1, 0, 2]), keep="all")).values == pytest.approx((0.5, worst, best))

    def test_the_scale_multiplies_scores(self):
        small, large = only(self.select(attempt([0.1, 0.3]), scale=10)), only(self.select(attempt([1, 3])))
        assert small.values == pytest.approx(large.values)

    def test_wide_apart_scores_do_not_overflow(self):
        assert only(self.select(attempt([-1e6, 1e6]))).values == (0.25, 0.75)

    def test_of_equally_good_drafts_the_earliest_learns(self):
        values = only(self.select(attempt([0, 1, 1, 0]))).values
        assert [value is not None for value in values] == [True, True, False, False]

    def test_drafts_are_compared_in_one_context_the_first_in_which_they_differ(self):
        one = attempt([1, 1, 0, 5, 2], [(), (), (1,), (1,), (0,)])
        values = only(self.select(one)).values
        assert values[:2] == (None, None) and values[4] is None
        # sigma(5) = 0.993307149075715
        assert values[2:4] == pytest.approx(((0.5 + 1 - 0.993307149075715) / 2, (0.5 + 0.993307149075715) / 2))

    def test_a_cut_draft_is_compared_and_does_not_learn(self):
        whole, cut = only(self.select(attempt([1, 0, 2]), keep="all")), self.select(attempt([1, 0, 2], cut=(2,)))
        assert only(cut).values == (*whole.values[:2], None)
        assert cut.set_aside == {"cut": 1}

    @pytest.mark.parametrize(
        ("one", "reason"),
        [
            (attempt([NAN, NAN]), "no score"),
            (attempt([1, NAN]), "one draft"),
            (attempt([1, 0], [(), (0,)]), "one draft"),
            (attempt([1, 1]), "tied"),
            (attempt([0, 1], cut=(0,)), "cut"),
            (attempt([0, 1], texts="aa"), "same text"),
        ],
    )
    def test_reasons(self, one: Attempt, reason: str):
        selection = self.select(one)
        assert (selection.examples, selection.dropped) == ([], {reason: 1})

    @given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=8).filter(lambda v: np.ptp(v) > 1e-3))
    def test_against_numpy(self, values: list[float]):
        s = np.array(values)
        expected = (1 / (1 + np.exp(s[None, :] - s[:, None]))).mean(axis=1)
        found = only(self.select(attempt(values), keep="all")).values
        assert found == pytest.approx(expected)
        assert np.mean(expected) == pytest.approx(0.5)  # P_ij + P_ji = 1
        kept = [value for value in only(self.select(attempt(values))).values if value is not None]
        assert sorted(kept) == pytest.approx([expected.min(), expected.max()])


class TestAggregation:
    def select(self, one: Attempt, **config: Any) -> Selection:
        return aggregation.select([one], aggregation.Config(**config))

    def test_the_first_right_answer_behind_the_proposals_is_the_target(self):
        one = attempt([0, 1, 0, 1, 1])
        group = only(self.select(one, proposals=2))
        assert group.values == (None, None, 1.0)
        assert group.attempt.drafts[:2] == one.drafts[:2]
        assert group.attempt.drafts[2] == replace(one.drafts[3], index=2, turn=2, parents=(0, 1))
        assert group.attempt.scores == (*one.scores[:2], one.scores[3])

    def test_the_target_may_be_learnt_as_a_direct_answer_too(self):
        one = attempt([0, 1, 0, 1, 1])
        group = only(self.select(one, proposals=2, direct=True))
        assert group.values == (None, None, 1.0, 1.0)
        assert group.attempt.drafts[3] == one.drafts[3]  # its index is 3 here and there
        assert len(group.attempt.scores) == 4

    def test_proposals_may_be_cut_or_without_score_and_refinements_take_no_part(self):
        one = attempt([NAN, 0, 1, 1], [(), (), (1,), ()], cut=(1,))
        group = only(self.select(one, proposals=2))
        assert [draft.text for draft in group.attempt.drafts] == ["a", "b", "d"]
        assert group.attempt.drafts[1].finish_reason == "length"

    @pytest.mark.parametrize(
        ("one", "reason"),
        [
            (attempt([]), "too few drafts"),
            (attempt([1, 1]), "too few drafts"),
            (attempt([1, 1, 1], CHAIN), "too few drafts"),
            (attempt([1, 1, NAN]), "no score"),
            (attempt([1, 1, 0, NAN]), "no right draft"),
            (attempt([1, 1, 1], cut=(2,)), "cut"),
        ],
    )
    def test_reasons(self, one: Attempt, reason: str):
        selection = self.select(one, proposals=2)
        assert (selection.examples, selection.dropped) == ([], {reason: 1})
