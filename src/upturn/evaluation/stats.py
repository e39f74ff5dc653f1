"""Intervals and tests: the only place of this room with a distribution or a random generator.

Wilson      the interval of a share of right answers (Wilson 1927)
McNemar     exact: the smaller of two kinds of flips ~ Binomial(both, 1/2), two-sided (McNemar 1947)
Holm        p-values corrected for a family of looks (Holm 1979)
Bootstrap   the percentile interval of a mean over prompts; a prompt is resampled with everything that belongs to it,
            so differences on the same prompts are paired (Efron 1979). Runs and prompts are resampled as two crossed
            factors, since the runs of one experiment share their held-out prompts (Owen 2007, "The pigeonhole
            bootstrap", arXiv:0712.1111)

Axes: R runs, P prompts, U distinct prompts, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upturn._model import Strict

NUM_RESAMPLES = 10_000
Z = 1.959963984540054
"""Standard errors to either side of a 95 % interval: `scipy.special.ndtri(0.975)`, which takes 0.1 s to import."""

How = Literal["Wilson", "bootstrap over prompts", "bootstrap over seeds and prompts"]
"""How a 95 % interval was made."""

Floats = NDArray[np.float64]

_LARGEST = 4_000_000
"""Numbers in one block of resamples."""


class Estimate(Strict):
    """A number with its 95 % interval. Shares are 0 to 1, and a difference of shares of 0.05 is 5 points."""

    value: float
    low: float
    high: float
    n: int
    """Prompts that it rests on."""
    how: How


def wilson(right: int, n: int) -> tuple[float, float, float]:
    """Share and its interval; of nothing (n = 0) the share is 0 and the interval 0 to 1."""
    if not n:
        return 0.0, 0.0, 1.0
    centre, half = right + Z**2 / 2, Z * sqrt(right * (n - right) / n + Z**2 / 4)
    low, high = (centre - half) / (n + Z**2), (centre + half) / (n + Z**2)
    return right / n, low if right else 0.0, high if right < n else 1.0


def share(right: Sequence[bool]) -> Estimate:
    """The share of right answers, one per prompt."""
    value, low, high = wilson(sum(right), len(right))
    return Estimate(value=value, low=low, high=high, n=len(right), how="Wilson")


def mcnemar(better: int, worse: int) -> float:
    """Two-sided p of the exact test that both flips are equally likely; 1 where nothing flipped."""
    from scipy.stats import binomtest  # a third of a second to import, and whoever refines waits for it

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjusted p-values, in the order given: the i-th smallest of m times (m - i + 1), never falling, at most 1."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, floor = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = floor
    return tuple(adjusted)


def mean(values: ArrayLike, seed: int = 0) -> Estimate:
    """The mean of one value per prompt (P,), or of several runs (R, P) that weigh the same; NaN where there is none.

    Differences per prompt make it a paired comparison. Raises ValueError where a run has no value.
    """
    return mean_and_p(values, seed)[0]


def mean_and_p(values: ArrayLike, seed: int = 0) -> tuple[Estimate, float]:
    """The mean as `mean` gives it, and the two-sided p that it is 0."""
    values_RP = _table(values)
    rng = np.random.default_rng(seed)
    resampled_B = over_runs(over_prompts(*_sums_and_counts(values_RP), rng), rng)
    value = float(np.nanmean(values_RP, axis=1).mean())
    return _estimate(value, resampled_B, values_RP, len(values_RP)), bootstrap_p(resampled_B)


def difference(first: ArrayLike, last: ArrayLike, seed: int = 0) -> tuple[Estimate, float]:
    """Mean of `last` minus mean of `first`, two arms of unrelated runs on the same prompts, and its two-sided p.

    Takes (P,) or (R, P) each, the same prompts in the same columns; both arms see the same resampled prompts, and each
    resamples its own runs. Runs that belong together in pairs are compared by `mean_and_p` of their differences.
    """
    num_first = len(np.atleast_2d(np.asarray(first)))
    both_RP = _table(np.vstack([np.atleast_2d(first), np.atleast_2d(last)]))
    rng = np.random.default_rng(seed)
    means_BR = over_prompts(*_sums_and_counts(both_RP), rng)
    resampled_B = over_runs(means_BR[:, num_first:], rng) - over_runs(means_BR[:, :num_first], rng)
    means_R = np.nanmean(both_RP, axis=1)
    value = float(means_R[num_first:].mean() - means_R[:num_first].mean())
    num_runs = max(num_first, len(both_RP) - num_first)
    return _estimate(value, resampled_B, both_RP, num_runs), bootstrap_p(resampled_B)


def bootstrap_p(resampled_B: Floats) -> float:
    """Two-sided bootstrap p that the mean is 0: the interval of level 1 - p just reaches 0."""
    far = min(np.sum(resampled_B <= 0), np.sum(resampled_B >= 0))
    return min(1.0, 2 * float(far + 1) / (len(resampled_B) + 1))


def over_prompts(sums_RP: Floats, counts_RP: Floats, rng: np.random.Generator) -> Floats:
    """Mean of each run in every resample of the prompts, (B, R), from the sum and number of values at each prompt.

    Prompts with the same values in every run are exchangeable, so resampling how often each distinct column occurs is
    the prompt bootstrap itself: ((B, U) @ (U, R)) with a handful of columns instead of thousands.
    """
    num_prompts = sums_RP.shape[1]
    columns, times_U = np.unique(np.vstack([sums_RP, counts_RP]), axis=1, return_counts=True)
    sums_RU, counts_RU = np.split(columns, 2)
    block = max(1, _LARGEST // times_U.size)
    means: list[Floats] = []
    for done in range(0, NUM_RESAMPLES, block):
        size = min(block, NUM_RESAMPLES - done)
        prompts_BU = rng.multinomial(num_prompts, times_U / num_prompts, size=size)
        means.append((prompts_BU @ sums_RU.T) / np.maximum(prompts_BU @ counts_RU.T, 1))
    return np.concatenate(means)


def over_runs(means_BR: Floats, rng: np.random.Generator) -> Floats:
    """Mean over resampled runs, (B,); one run stays itself."""
    num_resamples, num_runs = means_BR.shape
    runs_BR = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num_resamples)
    return (runs_BR * means_BR).sum(axis=1) / num_runs


def _table(values: ArrayLike) -> Floats:
    """As (R, P), without the prompts that no run has a value for."""
    table = np.atleast_2d(np.asarray(values, dtype=float))
    table = table[:, ~np.isnan(table).all(axis=0)]
    if not table.size or np.isnan(table).all(axis=1).any():
        raise ValueError("a mean over prompts needs a value in every run")
    return table


def _sums_and_counts(values_RP: Floats) -> tuple[Floats, Floats]:
    return np.nan_to_num(values_RP), (~np.isnan(values_RP)).astype(float)


def _estimate(value: float, resampled_B: Floats, values_RP: Floats, num_runs: int) -> Estimate:
    low, high = np.percentile(resampled_B, [2.5, 97.5])
    how: How = "bootstrap over seeds and prompts" if num_runs > 1 else "bootstrap over prompts"
    return Estimate(value=value, low=float(low), high=float(high), n=values_RP.shape[1], how=how)
