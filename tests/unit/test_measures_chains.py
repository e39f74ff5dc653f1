"""Every measure of one model, worked by hand on four prompts, and the laws that hold for any attempts."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import scripted
from hypothesis import given
from hypothesis import strategies as st
from scripted import CHAIN, chains, patterns

from upturn.errors import RunError
from upturn.evaluation import assemble, values
from upturn.evaluation.assemble import Measured, model_study
from upturn.evaluation.ceilings import ceilings
from upturn.evaluation.controls import at_equal_tokens, cost_points
from upturn.evaluation.drift import drift, identical
from upturn.evaluation.stopping import stops
from upturn.evaluation.study import Ceilings, CostPoint, Drift, ModelStudy, StopRule
from upturn.evaluation.turns import pass_at_k
from upturn.types import Attempt, Draft, Prompt, Score, answers

PARALLEL = [
    scripted.parallel("a", "wwr", ["u v", "u v", "w"], "132"),
    scripted.parallel("b", "rrw", ["x", "x", "x"], "556"),
    scripted.parallel("c", "www", ["k", "l", "m"], "988"),
    scripted.parallel("d", "rwr", ["o", "p", "q"], "747"),
]
"""Two generated tokens each, five context tokens."""
REWARDS = [
    scripted.rewarded(PARALLEL[0], 0.1, 0.9, 0.5),
    scripted.rewarded(PARALLEL[1], 0.2, 0.3, 0.9),
    scripted.rewarded(PARALLEL[2], math.nan, math.nan, math.nan),
    scripted.rewarded(PARALLEL[3], 0.9, 0.1, math.nan),
]


def siblings(rows: list[str]) -> list[Attempt]:
    return [scripted.parallel(str(place), row, answers=row) for place, row in enumerate(rows)]


def points(method: str) -> list[CostPoint]:
    found = cost_points(CHAIN, PARALLEL, REWARDS, rewarded_alone=True)
    return [point for point in found if point.method == method]


def rule(name: str, turns: int = 3) -> StopRule:
    return next(found for found in stops(CHAIN) if (found.name, found.turns) == (name, turns))


# controls


def test_costs_of_the_chain_worked_by_hand():
    found = [(p.k, p.accuracy.value, p.tokens, p.prompt_tokens) for p in points("refine")]
    assert found == [(1, 0.5, 2, 5), (2, 0.75, 5, 13), (3, 0.5, 9, 24)]


def test_costs_of_direct_answers_worked_by_hand():
    # votes: a splits, so its first answer stands; b says 5; c says 9, 9, 8; d says 7
    assert [point.accuracy.value for point in points("majority")] == [0.5, 0.5, 0.5]
    # by reward: a's second is wrong; b's first two are right; c has no judgement; d's first is right
    assert [point.accuracy.value for point in points("best of n")] == [0.5, 0.5, 0.25]
    assert [point.accuracy.value for point in points("resample")] == [0.5, 0.25, 0.5]
    assert [(point.k, point.tokens, point.prompt_tokens) for point in points("majority")] == [
        (1, 2, 5),
        (2, 4, 10),
        (3, 6, 15),
    ]


def test_rewards_that_look_at_the_others_choose_among_all_of_them_only():
    found = [point for point in cost_points(CHAIN, PARALLEL, REWARDS) if point.method == "best of n"]
    assert found == points("best of n")[2:]
    model = Measured("m", 0, CHAIN, PARALLEL, parallel_rewards=REWARDS)
    told = [model_study(replace(model, rewarded_alone=alone)).costs for alone in (False, True)]
    assert [[point.k for point in costs if point.method == "best of n"] for costs in told] == [[3], [1, 2, 3]]


def test_controls_rest_on_the_prompts_that_both_sides_have():
    # the endpoint answered a, b, c in chains and b, c, d side by side: b is rrw and rrw, c always wrong
    found = model_study(Measured("m", 0, CHAIN[:3], PARALLEL[1:]))
    assert found.n == 3 and found.turns[0].n == 3 and found.ceilings and found.control and found.excess
    assert {point.accuracy.n for point in found.costs} == {2}
    assert [point.accuracy.value for point in found.costs if point.method == "refine"] == [0.5, 0.5, 0]
    assert [row.share.n for row in found.ceilings.pass_at] == [2, 2, 2]
    assert (found.control.n, found.excess.n) == (2, 2)
    apart = model_study(Measured("m", 0, CHAIN[:2], PARALLEL[2:]))
    assert (apart.ceilings, apart.control) == (None, None)
    assert {(point.method, point.accuracy.n) for point in apart.costs} == {("refine", 2)}


def test_the_three_of_an_early_end_add_up():
    # z answers once, rightly, and stops; a goes from wrong to right: gain 1/2
    found = model_study(Measured("m", 0, [scripted.chain("z", "r"), scripted.chain("a", "wr")], [
        scripted.parallel("z", "rw"), scripted.parallel("a", "ww")]))  # fmt: skip
    assert found.gain and found.control and found.excess
    assert (found.gain.points, found.gain.n, found.control.points, found.excess.value) == (50, 2, -25, 0.75)


def test_an_answer_that_could_not_be_judged_is_in_no_share():
    lost = replace(CHAIN[3], scores=(CHAIN[3].scores[0], *(replace(s, value=math.nan) for s in CHAIN[3].scores[1:])))
    half = replace(PARALLEL[3], scores=(replace(PARALLEL[3].scores[0], value=math.nan), *PARALLEL[3].scores[1:]))
    found = model_study(Measured("m", 0, [*CHAIN[:3], lost], [*PARALLEL[:3], half]))
    assert found.gain and found.excess and found.control and found.ceilings
    assert [(p.accuracy.value, p.accuracy.n) for p in found.costs if p.method == "refine"] == [
        (0.5, 4), (pytest.approx(2 / 3), 3), (pytest.approx(1 / 3), 3)]  # fmt: skip
    assert next((p.accuracy.value, p.accuracy.n) for p in found.costs if p.method == "resample") == (1 / 3, 3)
    # turn 3 minus the mean direct answer of a, b, c: 2/3, -2/3, 0; the mean of d is 1/2
    assert (found.excess.n, found.excess.value) == (3, pytest.approx(0))
    assert found.control.points == pytest.approx(100 * (1 / 3 - 1 / 3 + 0 - 1 / 2) / 4)
    assert [row.share.n for row in found.ceilings.pass_at] == [4, 4, 3]
    assert sum(path.count for path in found.paths) == 3
    assert [(r.fixed.n, r.broken.n) for r in found.revisions if r.fixed and r.broken] == [(2, 1), (1, 2), (2, 1)]
    assert [(s.accuracy.n, s.turns) for s in found.stops if s.name == "fixed"] == [(4, 1), (3, 2), (3, 3)]


def test_a_verifier_is_no_chooser_and_silence_is_no_vote():
    silent = [scripted.parallel("a", "wr")]
    assert {point.method for point in cost_points(CHAIN[:1], silent)} == {"refine", "resample"}


def test_a_chain_that_ended_early_keeps_its_answer():
    found = [p for p in cost_points([*chains(["wr"]), scripted.chain("z", "r")]) if p.method == "refine"]
    assert [(point.accuracy.value, point.accuracy.n, point.tokens) for point in found] == [(0.5, 2, 2), (1.0, 2, 3.5)]


def test_equal_tokens_are_linear_between_points():
    fresh = points("resample")  # 2, 4, 6 tokens: 0.5, 0.25, 0.5
    middle = at_equal_tokens(fresh, 4.5)
    assert middle and (middle.value, middle.n) == (pytest.approx(0.75 * 0.25 + 0.25 * 0.5), 4)
    assert at_equal_tokens(fresh, 4) == fresh[1].accuracy
    assert at_equal_tokens(fresh, 6) == fresh[2].accuracy
    assert at_equal_tokens([fresh[0].model_copy(update={"tokens": 0})], 0) is None  # unknown, and not as cheap
    assert (at_equal_tokens(fresh, 1.9), at_equal_tokens(fresh, 6.1), at_equal_tokens([], 5)) == (None, None, None)


@given(patterns, patterns)
def test_more_drafts_cost_more(rows: list[str], others: list[str]):
    found = cost_points(chains(rows), siblings(others))
    for method in {point.method for point in found}:
        line = [point for point in found if point.method == method]
        assert [point.k for point in line] == [1, 2, 3]
        assert all(a.tokens < b.tokens and a.prompt_tokens < b.prompt_tokens for a, b in pairwise(line))


def test_gain_is_what_fresh_answers_give_and_what_refining_adds():
    # mean direct minus turn 1: (1/3, -1/3, 0, -1/3); turn 3 minus mean direct: (2/3, -2/3, 0, 1/3)
    found = model_study(Measured("m", 0, CHAIN, PARALLEL))
    assert found.control and found.excess and found.gain
    assert found.control.points == pytest.approx(-100 / 12)
    assert found.excess.value == pytest.approx(1 / 12)
    assert found.gain.points == pytest.approx(found.control.points + 100 * found.excess.value)


# stopping


@pytest.mark.parametrize(
    ("name", "turns", "accuracy", "tokens", "mean_turns"),
    [
        ("fixed", 1, 0.5, 2, 1),
        ("fixed", 2, 0.75, 5, 2),
        ("fixed", 3, 0.5, 9, 3),
        ("unchanged", 3, 0.5, (9 + 9 + 5 + 5) / 4, 2.5),
        ("agreement", 3, 0.75, (9 + 5 + 5 + 5) / 4, 2.25),
        ("oracle", 3, 0.75, (5 + 2 + 9 + 2) / 4, 1.75),
    ],
)
def test_stop_rules_worked_by_hand(name: str, turns: int, accuracy: float, tokens: float, mean_turns: float):
    found = rule(name, turns)
    assert (found.accuracy.value, found.tokens, found.mean_turns) == (accuracy, tokens, mean_turns)


def test_without_final_answers_nothing_agrees():
    names = [found.name for found in stops([scripted.chain("a", "wr"), scripted.chain("b", "rr")])]
    assert names == ["fixed", "fixed", "unchanged", "oracle"]
    assert [found.name for found in stops([scripted.chain("a", "w")])] == ["fixed"]


@given(patterns)
def test_no_rule_beats_the_oracle(rows: list[str]):
    found = stops(chains(rows))
    oracle = next(one for one in found if one.name == "oracle")
    assert all(one.accuracy.value <= oracle.accuracy.value for one in found)
    assert all(one.mean_turns <= one.turns and one.tokens <= found[2].tokens for one in found)


# ceilings


def test_ceilings_worked_by_hand():
    found = ceilings(CHAIN, PARALLEL, REWARDS)
    assert found and found.verification_gap and found.refinement_gap
    # right answers of three: 1, 2, 0, 2
    assert [(row.k, row.share.value) for row in found.pass_at] == [
        (1, pytest.approx(5 / 12)),
        (2, pytest.approx((2 / 3 + 1 + 0 + 1) / 4)),
        (3, 0.75),
    ]
    assert found.verification_gap.value == pytest.approx(1 / 4 - 5 / 12)
    assert found.relative_gap == pytest.approx((1 / 4 - 5 / 12) / (7 / 12))
    assert found.refinement_gap.value == 0  # turn 3: a, d; the vote: b, d
    assert found.refinement_gap.n == 4


def test_the_gap_of_the_verifier_is_pass_at_n_minus_pass_at_1():
    found = ceilings(CHAIN, PARALLEL)
    assert found and found.verification_gap
    assert found.verification_gap.value == pytest.approx(found.pass_at[-1].share.value - found.pass_at[0].share.value)


def test_too_few_answers_give_no_refinement_gap():
    two = [replace(attempt, drafts=attempt.drafts[:2], scores=attempt.scores[:2]) for attempt in PARALLEL]
    found = ceilings(CHAIN, two)
    assert found and found.refinement_gap is None
    assert ceilings(CHAIN, []) is None


def test_a_vote_has_as_many_answers_as_the_chain():
    # three proposals, then one answer behind them: four answers in two turns. d was kept, which asks for none
    tree = [replace(scripted.parallel(id, pattern, answers=pattern), scores=()) for id, pattern in (("a", "wwwr"),)]
    drafts = tuple(replace(d, turn=2, parents=(0, 1, 2)) if d.index == 3 else d for d in tree[0].drafts)
    chain = [replace(scripted.parallel("a", "wwwr"), drafts=drafts)]
    assert values.num_answers(chain) == 4
    kept = replace(chain[0], drafts=(*drafts[:3], replace(drafts[3], kept=True)))
    assert values.num_answers([kept]) == 3 and values.num_answers([*chain, kept]) == 4
    # votes of two are wrong, of four right
    votes = [scripted.parallel("a", "wrrr", answers="1222")]
    found = ceilings(chain, votes)
    assert found and found.refinement_gap and found.refinement_gap.value == 0
    few = ceilings(chain, [scripted.parallel("a", "wrr", answers="122")])
    assert few and few.refinement_gap is None


@given(st.lists(st.text("rw", min_size=5, max_size=5), min_size=1, max_size=4), st.integers(1, 5))
def test_pass_at_k_agrees_with_brute_force(rows: list[str], k: int):
    shares = [[("r" in subset) for subset in combinations(row, k)] for row in rows]
    expected = sum(sum(share) / len(share) for share in shares) / len(rows)
    assert pass_at_k(siblings(rows), k) == pytest.approx(expected)


# drift and the whole


def test_drift_worked_by_hand():
    rated = zip(CHAIN, (1, 2, 3, math.nan), strict=True)
    judged = [scripted.rewarded(attempt, value, 0, 2 * value) for attempt, value in rated]
    found = model_study(Measured("m", 0, CHAIN, PARALLEL, chain_rewards=judged, kl_start=0.5, kl_previous=0.2)).drift
    assert (found.kl_start, found.kl_previous) == (0.5, 0.2)
    assert (found.length, found.length_last, found.entropy) == (2, 4, pytest.approx(0.5))
    assert (found.reward_first, found.reward) == (2, 4)
    assert found.pass_large and (found.pass_large.k, found.pass_large.share.value) == (3, 0.75)
    assert found.identical == pytest.approx((1 / 3 + 1 + 0 + 0) / 4)
    # a b c, x, same, p q; u v u v w, x x x, k l m, o p q: 14 different words of 21; bigrams ab bc pq uv uv
    assert found.distinct == (pytest.approx(14 / 21), pytest.approx(4 / 5), 1)


def test_the_length_of_an_answer_is_its_own():
    # at an endpoint: an answer of 12 tokens, a critique of 200, then an answer of 9 that follows it, or the kept one
    def told(index: int, turn: int, parents: tuple[int, ...], tokens: int, **how: Any) -> Draft:
        return Draft(index, turn, parents, "text", (), (), "stop", 5, 0, num_tokens_told=tokens, **how)

    asked = (told(0, 1, (), 12), told(1, 1, (0,), 200, kind="critique"))
    refined = Attempt(Prompt("a", "?"), (*asked, told(2, 2, (0, 1), 9)))
    kept = Attempt(Prompt("b", "?"), (*asked, told(2, 2, (0, 1), 0, kept=True), told(3, 3, (2,), 0, kept=True)))
    chain = [replace(a, scores=(Score(1.0, True),) * len(a.drafts)) for a in answers([refined, kept])]
    assert [[draft.num_tokens for draft in attempt.drafts] for attempt in chain] == [[12, 209], [12, 200, 0]]
    assert [drift([attempt]).length_last for attempt in chain] == [9, 12]


def test_an_endpoint_without_logprobs_has_no_entropy():
    bare = [replace(a, drafts=tuple(replace(d, sampler_logprobs=()) for d in a.drafts)) for a in CHAIN]
    found = model_study(Measured("m", 0, bare))
    assert found.drift.entropy is None
    assert (found.control, found.excess, found.ceilings, found.drift.identical) == (None, None, None, None)
    assert identical([scripted.parallel("a", "r")]) is None


def test_progress_and_direct_gain_worked_by_hand():
    # base: first turns w w r r, last turns all w; the model: first w r w r, last r w w r
    base = Measured("base", 0, [scripted.chain(id, p) for id, p in zip("abcd", ("ww", "ww", "rw", "rw"), strict=True)])
    found = model_study(Measured("m", 1, CHAIN, PARALLEL), base, base)
    assert found.direct_gain and found.progress
    assert (found.direct_gain.points, found.direct_gain.n) == (0, 4)
    assert found.progress.before == "base"
    assert (found.progress.direct.value, found.progress.last.value, found.progress.gain.value) == (0, 0.5, 0.5)
    assert (found.progress.pass_large, found.progress.reward) == (None, None)


def test_without_a_verifier_only_texts_tokens_and_rewards_are_left():
    def silent(attempts: list[Attempt]) -> list[Attempt]:
        return [scripted.rewarded(attempt, *[math.nan] * len(attempt.drafts)) for attempt in attempts]

    rewards = [scripted.rewarded(attempt, 1, 2, 4) for attempt in CHAIN]
    judged = Measured("m", 1, CHAIN, PARALLEL, rewards, REWARDS)
    unjudged = replace(judged, chain=silent(CHAIN), parallel=silent(PARALLEL))
    known, found = (model_study(one, one, one) for one in (judged, unjudged))
    assert known.judged and not found.judged
    nulls = ("gain", "direct_gain", "direct_p", "ceilings", "control", "excess", "progress")
    assert all(getattr(known, name) is not None and getattr(found, name) is None for name in nulls)
    assert all(getattr(known, name) and getattr(found, name) == () for name in ("tests", "paths", "costs", "stops"))
    assert found.drift == known.drift.model_copy(update={"pass_large": None})
    assert (found.drift.reward_first, found.drift.reward) == (1, 4)
    # a repeats turn 2, c repeats both times, d repeats once
    told = [(row.copied, row.fixed, row.broken, row.copied_right, row.copied_wrong) for row in found.revisions]
    assert told == [(0.5, None, None, None, None), (0.5, None, None, None, None), (0.25, None, None, None, None)]


def test_models_are_compared_on_the_prompts_that_both_have():
    other = Measured("base", 0, CHAIN[:3], PARALLEL[:2])
    found = assemble.progress(Measured("m", 1, CHAIN, PARALLEL), other)
    assert found and found.pass_large
    assert (found.last.n, found.pass_large.share.n, found.pass_large.k) == (3, 2, 3)
    assert assemble.progress(other, Measured("m", 1, CHAIN[3:])) is None


def test_a_model_without_attempts_is_refused():
    with pytest.raises(RunError, match="measurement of m"):
        model_study(Measured("m", 0, []))


def test_a_study_of_single_answers_has_no_gain():
    found = model_study(Measured("m", 0, [scripted.chain("a", "r")]))
    assert (found.gain, found.tests, found.revisions) == (None, (), ())


def test_every_measure_is_documented():
    named = set(re.findall(r"`(\w+)`", (Path(__file__).parents[2] / "docs" / "measures.md").read_text()))
    fields = {name for record in (ModelStudy, Ceilings, Drift) for name in record.model_fields}
    assert fields - {"label", "iteration", "n"} <= named
