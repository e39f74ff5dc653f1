"""Intervals and tests against references, and intervals that hold the truth as often as they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from upturn.evaluation import stats


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 30), (30, 30), (3, 10), (515, 1319)])
def test_wilson_agrees_with_statsmodels(right: int, n: int):
    found = stats.share([True] * right + [False] * (n - right))
    assert (found.low, found.high) == pytest.approx(proportion_confint(right, n, method="wilson"), abs=1e-12)
    assert (found.value, found.n, found.how) == (right / n, n, "Wilson")


def test_a_share_of_nothing_knows_nothing():
    assert stats.wilson(0, 0) == (0.0, 0.0, 1.0)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_agrees_with_statsmodels(better: int, worse: int):
    expected: Any = mcnemar([[4, worse], [better, 6]], exact=True)
    assert stats.mcnemar(better, worse) == pytest.approx(expected.pvalue, rel=1e-9)


@pytest.mark.parametrize("size", [1, 2, 6, 12])
def test_holm_agrees_with_statsmodels(size: int):
    p_values = [round(p, 2) for p in np.random.default_rng(size).beta(0.3, 1, size)]  # small ones, and ties
    expected: Any = multipletests(p_values, method="holm")[1]
    assert stats.holm(p_values) == pytest.approx(tuple(expected))


def test_holm_worked_by_hand():
    # sorted .01 .03 .04, times 3, 2, 1: .03, .06, and .04 raised to .06; in the order given
    assert stats.holm([0.04, 0.01, 0.03]) == pytest.approx((0.06, 0.03, 0.06))


def test_the_interval_of_paired_differences_holds_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "NUM_RESAMPLES", 2_000)
    rng, truth, held = np.random.default_rng(0), 0.15, 0
    for seed in range(1_000):  # 25 % better, 10 % worse
        better, worse, same = rng.multinomial(200, [0.25, 0.10, 0.65])
        found = stats.mean([1.0] * better + [-1.0] * worse + [0.0] * same, seed)
        held += found.low <= truth <= found.high
    assert 0.93 <= held / 1_000 <= 0.97


def test_the_interval_of_unlike_values_holds_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "NUM_RESAMPLES", 2_000)
    rng, held = np.random.default_rng(1), 0
    for seed in range(1_000):  # a last turn against the mean of four fresh answers: prompts differ, the truth is 0
        chance_P = rng.beta(0.8, 1.2, 150)
        last_P, fresh_P = rng.random(150) < chance_P, rng.binomial(4, chance_P) / 4
        found = stats.mean(last_P - fresh_P, seed)
        held += found.low <= 0 <= found.high
    assert 0.93 <= held / 1_000 <= 0.97


def test_a_mean_is_seeded_and_near_the_normal_interval():
    values = [0.0] * 60 + [1.0] * 40  # standard error sqrt(0.24 / 100) = 0.049
    found = stats.mean(values)
    assert found == stats.mean(values)
    assert found != stats.mean(values, seed=1)
    assert (found.low, found.high) == pytest.approx((0.4 - 0.096, 0.4 + 0.096), abs=0.012)
    assert (found.n, found.how) == (100, "bootstrap over prompts")


def test_blocks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).random((2, 40))
    whole = stats.mean(values)
    monkeypatch.setattr(stats, "_LARGEST", 4_000)
    assert stats.mean(values) == whole


def test_prompts_without_a_value_are_left_out():
    assert stats.mean([0.0, np.nan, 1.0, np.nan]) == stats.mean([0.0, 1.0])
    with pytest.raises(ValueError, match="needs a value in every run"):
        stats.mean([[0.0, 1.0], [np.nan, np.nan]])


def test_runs_with_prompts_of_their_own_weigh_the_same():
    values = [[1.0] * 8 + [np.nan] * 2, [np.nan] * 8 + [0.0] * 2]
    found = stats.mean(values)
    assert (found.value, found.n, found.how) == (0.5, 10, "bootstrap over seeds and prompts")


def own_prompts(values: np.ndarray) -> np.ndarray:
    """(R, P) as a table in which no prompt has a value in two runs."""
    num_runs, num_prompts = values.shape
    table = np.full((num_runs, num_runs, num_prompts), np.nan)
    table[np.arange(num_runs), np.arange(num_runs)] = values
    return table.reshape(num_runs, -1)


def test_the_interval_over_runs_with_prompts_of_their_own_holds_the_truth(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "NUM_RESAMPLES", 1_000)
    rng, held = np.random.default_rng(2), 0
    for seed in range(500):  # three trainings that differ by 2.5 points; the error of a share is 3.5
        chances = np.clip(0.6 + 0.025 * rng.standard_normal((3, 1)), 0, 1)
        found = stats.mean(own_prompts((rng.random((3, 200)) < chances).astype(float)), seed)
        held += found.low <= 0.6 <= found.high
    assert 0.93 <= held / 500 <= 0.97


def test_runs_with_prompts_of_their_own_and_no_difference_between_them():
    # three equal runs, 40 of 100 right in each: the error is that of 120 of 300, sqrt(0.24 / 300) = 0.0283
    found = stats.mean(own_prompts(np.tile(np.arange(100) < 40, (3, 1)).astype(float)))
    assert (found.low, found.high) == pytest.approx((0.4 - 0.0554, 0.4 + 0.0554), abs=0.006)


@pytest.mark.parametrize("own", [True, False])
def test_a_run_without_a_drawn_prompt_is_not_wrong(own: bool):
    values = own_prompts(np.ones((3, 2)))
    if not own:  # the first prompt is shared, so that runs and prompts are crossed
        values[:, 0] = 1
    found = stats.mean(values)
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_unpaired_arms_may_have_prompts_of_their_own():
    first, last = own_prompts(np.zeros((2, 5))), own_prompts(np.ones((2, 5)))
    found, p = stats.difference(first, last)
    assert (found.value, found.low, found.high, p) == (1, 1, 1, stats.least_p(10_000))


def test_more_resamples_for_a_large_family():
    assert (stats.resamples_for(68), stats.resamples_for(760)) == (10_000, 76_000)
    assert 760 * stats.mean_and_p([1.0] * 10, num_resamples=76_000)[1] < 0.05


def test_runs_that_differ_widen_the_interval():
    same = np.tile(np.arange(100) % 2, (3, 1)).astype(float)
    apart = same.copy()
    apart[0, :40], apart[2, :40] = 0, 1
    narrow, wide = stats.mean(same), stats.mean(apart)
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


def test_a_difference_of_single_runs_is_the_mean_of_differences():
    rng = np.random.default_rng(3)
    first, last = rng.random(80), rng.random(80) + 0.1
    unpaired, p = stats.difference(first, last)
    paired, p_paired = stats.mean_and_p(last - first)
    assert unpaired.value == pytest.approx(paired.value)
    assert (unpaired.low, unpaired.high) == pytest.approx((paired.low, paired.high), abs=0.005)
    assert p == pytest.approx(p_paired, abs=0.01)


def test_p_and_interval_agree():
    for shift in (-0.3, -0.1, -0.05, 0.0, 0.05, 0.1, 0.3):
        found, p = stats.mean_and_p(np.random.default_rng(5).normal(shift, 1, 300))
        assert (p < 0.05) == (found.low > 0 or found.high < 0)
    assert stats.mean_and_p([0.0] * 10)[1] == 1.0
