"""Arms on the same prompts: paired differences, tests, equal tokens, and clear errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import scripted

from upturn.errors import RunError
from upturn.evaluation import stats
from upturn.evaluation.compare import Comparison, Contrast, Run, compare
from upturn.types import Attempt, Prompt


def chains(patterns: Sequence[str], tokens: Sequence[int] = (2, 3, 4, 5)) -> list[Attempt]:
    return [scripted.chain(str(place), pattern, tokens=tokens) for place, pattern in enumerate(patterns)]


def contrast(found: Comparison, what: str, place: int = 0) -> Contrast:
    return [row for row in found.contrasts if row.what == what][place]


OLD = ["ww"] * 12 + ["wr"] * 2 + ["rr"] * 10 + ["rw"] * 6
"""First turn right in 16 of 30, last in 12."""
NEW = ["wr"] * 12 + ["wr"] * 2 + ["rr"] * 10 + ["rr"] * 5 + ["ww"]
"""First turn right in 15, last in 29."""


def test_two_single_runs_worked_by_hand():
    found = compare({"old": [Run(0, "iteration 1", chains(OLD))], "new": [Run(0, "iteration 2", chains(NEW))]})
    assert found.n == 30
    old, new = found.arms
    assert (old.name, old.seeds, old.labels) == ("old", (0,), ("iteration 1",))
    assert (old.turns, old.tokens, old.vote) == (2, 5, None)
    assert (old.first, old.last) == (stats.share([True] * 16 + [False] * 14), stats.share([True] * 12 + [False] * 18))
    assert (old.gain.value, new.gain.value) == (pytest.approx(-4 / 30), pytest.approx(14 / 30))

    first, last, gain = (contrast(found, what) for what in ("first turn", "last turn", "gain"))
    assert (first.before, first.after) == ("old", "new")
    assert [row.difference.value for row in (first, last, gain)] == pytest.approx([-1 / 30, 17 / 30, 18 / 30])
    assert (first.test, last.test, gain.test) == ("McNemar", "McNemar", "bootstrap")
    # last turns: 12 + 5 went from wrong to right, none back; 2 * 2^-17
    assert (first.p_value, last.p_value) == (1.0, pytest.approx(2**-16))
    assert gain.difference.low > 0 and gain.p_value < 0.001
    # both spend five tokens: the same comparison at equal tokens
    equal = contrast(found, "last turn at equal tokens")
    assert (equal.tokens, equal.difference.value) == (5, pytest.approx(17 / 30))


def test_holm_covers_all_contrasts():
    arms = {name: [Run(0, "m", chains(rows))] for name, rows in {"a": OLD, "b": NEW, "c": OLD[::-1]}.items()}
    found = compare(arms)
    assert [(row.before, row.after) for row in found.contrasts[::4]] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert len(found.contrasts) == 12
    assert tuple(row.p_holm for row in found.contrasts) == stats.holm([row.p_value for row in found.contrasts])


def test_equal_tokens_are_those_of_the_cheaper_arm():
    # dear: 4 tokens a turn, right 0, 1/2, 1 of the time; cheap: 6 tokens in all, so halfway from turn 1 to turn 2
    dear = chains(["wwr", "wrr"] * 10, tokens=(4, 4, 4))
    cheap = chains(["wr"] * 15 + ["ww"] * 5, tokens=(3, 3))
    found = compare({"dear": [Run(0, "m", dear)], "cheap": [Run(0, "m", cheap)]})
    equal = contrast(found, "last turn at equal tokens")
    assert (equal.tokens, equal.difference.value) == (6, pytest.approx(0.75 - 0.25))
    assert contrast(found, "last turn").difference.value == pytest.approx(0.75 - 1)


def test_without_a_common_budget_there_is_no_comparison_at_equal_tokens():
    dear, cheap = chains(["wr"] * 4, tokens=(9, 9)), chains(["wr"] * 4, tokens=(3, 3))
    found = compare({"dear": [Run(0, "m", dear)], "cheap": [Run(0, "m", cheap)]})
    assert [row.what for row in found.contrasts] == ["first turn", "last turn", "gain"]


def test_votes_need_as_many_answers_as_turns():
    run = Run(0, "m", chains(["wr", "rr"]), [scripted.parallel(str(k), "wrr", answers="122") for k in range(2)])
    few = run._replace(parallel=[scripted.parallel(str(k), "r", answers="1") for k in range(2)])
    enough, none = compare({"a": [run], "b": [few]}).arms
    assert enough.vote and enough.vote.value == 0  # a tie of two goes to the first answer
    assert none.vote is None


def test_a_vote_is_of_as_many_answers_as_a_chain_has():
    # two proposals and an answer behind them: three answers in two turns
    wide = scripted.parallel("0", "wwr")
    chain = replace(wide, drafts=(*wide.drafts[:2], replace(wide.drafts[2], turn=2, parents=(0, 1))))
    run = Run(0, "m", [chain], [scripted.parallel("0", "wrr", answers="122")])
    row = compare({"a": [run], "b": [run]}).arms[0]
    assert row.turns == 2 and row.vote and row.vote.value == 1  # of two, the first answer would win


def test_answers_that_could_not_be_judged_are_left_out_in_pairs():
    def lost(attempt: Attempt) -> Attempt:
        return replace(attempt, scores=(attempt.scores[0], replace(attempt.scores[1], value=math.nan, right=False)))

    old, new = chains(["rr"] * 10), [*chains(["rr"] * 2), *map(lost, chains(["rr"] * 10)[2:])]
    found = compare({"old": [Run(0, "m", old)], "new": [Run(0, "m", new)]})
    last = contrast(found, "last turn")
    assert (last.difference.value, last.difference.n, last.p_value) == (0, 2, 1)
    assert (found.arms[1].last.value, found.arms[1].last.n, found.arms[1].first.n) == (1, 2, 10)
    # no prompt is judged in both: nothing is said of its last turns
    other = [*map(lost, chains(["rr"] * 10)[:2]), *chains(["rr"] * 10)[2:]]
    apart = compare({"old": [Run(0, "m", new)], "new": [Run(0, "m", other)]})
    assert [row.what for row in apart.contrasts] == ["first turn"]


def flipped(patterns: Sequence[str], share: float, seed: int) -> list[str]:
    """Another training of the same arm: some last turns differ."""
    other = np.random.default_rng(seed).random(len(patterns)) < share
    swap = {"r": "w", "w": "r"}
    return [row[:-1] + (swap[row[-1]] if flip else row[-1]) for row, flip in zip(patterns, other, strict=True)]


def test_several_seeds_are_resampled_over_seeds_and_prompts():
    old = [Run(seed, "m", chains(flipped(OLD, 0.1, seed))) for seed in range(3)]
    new = [Run(seed, "m", chains(flipped(NEW, 0.1, seed + 9))) for seed in range(3)]
    found = compare({"old": old, "new": new[::-1]})
    last = contrast(found, "last turn")
    assert last.difference.how == "bootstrap over seeds and prompts" and last.test == "bootstrap"
    assert found.arms[1].seeds == (0, 1, 2)
    assert last.difference.value == pytest.approx(found.arms[1].last.value - found.arms[0].last.value)
    single = contrast(compare({"old": old[:1], "new": new[:1]}), "last turn")
    assert last.difference.low > 0
    assert single.difference.how == "bootstrap over prompts"


def test_the_smallest_p_of_the_bootstrap_is_told_as_an_upper_end():
    old, new = ([Run(seed, "m", chains([way] * 6)) for seed in (0, 1)] for way in ("ww", "wr"))
    first, last, gain, _ = compare({"old": old, "new": new}).contrasts
    assert (first.p_value, first.at_most) == (1, False)
    # no resample of 10,000 is on the far side: p is at most 2 / 10,001, and four times that after Holm's correction
    assert (last.p_value, last.at_most) == (pytest.approx(2 / 10_001), True)
    assert (last.p_holm, gain.p_holm) == (pytest.approx(8 / 10_001), pytest.approx(8 / 10_001))


def test_a_family_of_many_arms_still_tells_the_plainest_difference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "NUM_RESAMPLES", 100)  # 12 contrasts: 12 * 2 / 101 would be 0.24
    ways = {"old": "ww", "a": "wr", "b": "wr", "c": "wr"}
    arms = {name: [Run(seed, "m", chains([way] * 6)) for seed in (0, 1)] for name, way in ways.items()}
    found = compare(arms, against="old")
    assert contrast(found, "last turn").p_holm < 0.02
    assert contrast(found, "last turn").p_value == stats.least_p(1_200)


def test_arms_with_other_numbers_of_seeds_are_compared_too():
    old = [Run(seed, "m", chains(flipped(OLD, 0.1, seed))) for seed in range(3)]
    found = compare({"old": old, "new": [Run(0, "m", chains(NEW))]})
    last = contrast(found, "last turn")
    assert last.difference.value == pytest.approx(29 / 30 - found.arms[0].last.value)
    assert (last.difference.n, last.test) == (30, "bootstrap")


def test_runs_may_have_prompts_of_their_own_where_both_arms_have_them():
    def run(seed: int, patterns: Sequence[str]) -> Run:
        moved = [replace(a, prompt=Prompt(f"{seed}-{a.prompt.id}", "question")) for a in chains(patterns)]
        return Run(seed, "m", moved)

    found = compare({"old": [run(0, OLD), run(1, OLD)], "new": [run(0, NEW), run(1, NEW)]})
    assert found.n == 60
    last = contrast(found, "last turn").difference
    assert (last.value, last.n) == (pytest.approx(17 / 30), 60)
    # two equal runs of 30 prompts each tell as much as one of 60: a run that is drawn twice has new prompts each time
    alone = stats.mean([1.0] * 34 + [0.0] * 26)
    assert last.high - last.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_equal_seeds_with_other_prompts_are_no_pairs():
    halves = chains(NEW)[:15], chains(NEW)[15:]
    old = [Run(seed, "m", half) for seed, half in enumerate(halves)]
    new = [Run(seed, "m", half) for seed, half in enumerate(halves[::-1])]
    assert contrast(compare({"old": old, "new": new}), "last turn").difference.value == pytest.approx(0)


def test_tuples_will_do():
    assert compare({"a": [Run(0, "m", chains(OLD), None)], "b": [Run(1, "m", chains(NEW))]}).arms[1].seeds == (1,)


def test_other_prompts_are_refused_with_their_numbers():
    with pytest.raises(RunError, match="25 prompts are the same, of 30 of a and 25 of b"):
        compare({"a": [Run(0, "m", chains(OLD))], "b": [Run(0, "m", chains(NEW[:25]))]})
    reworded = [replace(attempt, prompt=replace(attempt.prompt, text="another")) for attempt in chains(NEW)]
    with pytest.raises(RunError, match="0 prompts are the same, of 30 of a and 30 of b"):
        compare({"a": [Run(0, "m", chains(OLD))], "b": [Run(0, "m", reworded)]})


def test_nothing_to_compare_is_refused():
    with pytest.raises(RunError, match="There is only one arm, a"):
        compare({"a": [Run(0, "m", chains(OLD))]})
    with pytest.raises(RunError, match="arm b"):
        compare({"a": [Run(0, "m", chains(OLD))], "b": []})


def test_arms_that_no_verifier_judged_are_refused():
    silent = [scripted.rewarded(attempt, math.nan, math.nan) for attempt in chains(OLD)]
    with pytest.raises(RunError, match="arm new\n    No verifier judged"):
        compare({"old": [Run(0, "base", chains(OLD))], "new": [Run(0, "base", silent)]})


def test_unknown_tokens_are_not_equal_tokens():
    free = [chains(rows, tokens=(0, 0)) for rows in (OLD, NEW)]
    found = compare({name: [Run(0, "base", made)] for name, made in zip(("old", "new"), free, strict=True)})
    assert [row.what for row in found.contrasts] == ["first turn", "last turn", "gain"]
