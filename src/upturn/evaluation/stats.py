"""Intervals and tests: the only place of this room with a distribution or a random generator.

Wilson      the interval of a share of right answers (Wilson 1927)
McNemar     exact: the smaller of two kinds of flips ~ Binomial(both, 1/2), two-sided (McNemar 1947)
Holm        p-values corrected for a family of looks (Holm 1979)
Bootstrap   the percentile interval of a mean over prompts; a prompt is resampled with everything that belongs to it,
            so differences on the same prompts are paired (Efron 1979). Runs that share their held-out prompts are
            resampled with them as two crossed factors (Owen 2007, "The pigeonhole bootstrap", arXiv:0712.1111). Runs
            with prompts of their own are clusters: runs are drawn, then prompts anew within each drawn run (Davison
            and Hinkley 1997, "Bootstrap Methods and their Application", section 3.8)

Axes: R runs, P prompts, U distinct prompts, B resamples, D draws of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import isnan, sqrt
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upturn._model import Strict

NUM_RESAMPLES = 10_000
"""The fewest that an interval is made of."""
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


def share(right: Sequence[float]) -> Estimate:
    """The share of right answers (1, wrong ones 0), one per prompt; NaN where none could be judged is left out."""
    known = [one for one in right if not isnan(one)]
    value, low, high = wilson(sum(one == 1 for one in known), len(known))
    return Estimate(value=value, low=low, high=high, n=len(known), how="Wilson")


def mcnemar(better: int, worse: int) -> float:
    """Two-sided p of the exact test that both flips are equally likely; 1 where nothing flipped."""
    from scipy.stats import binomtest  # a third of a second to import, and whoever refines waits for it

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def least_flips(level: float) -> int:
    """The fewest flips with which `mcnemar` can fall below a level: all in one direction, p = 2 * 2^-flips."""
    return next(flips for flips in count(1) if 2 * 0.5**flips < level)


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


def mean_and_p(values: ArrayLike, seed: int = 0, num_resamples: int | None = None) -> tuple[Estimate, float]:
    """The mean as `mean` gives it, and the two-sided p that it is 0."""
    values_RP = _table(values)
    rng = np.random.default_rng(seed)
    resampled_B = over_runs(over_prompts(*_sums_and_counts(values_RP), rng, num_resamples), rng)
    value = float(np.nanmean(values_RP, axis=1).mean())
    return _estimate(value, resampled_B, values_RP, len(values_RP)), bootstrap_p(resampled_B)


def difference(
    first: ArrayLike, last: ArrayLike, seed: int = 0, num_resamples: int | None = None
) -> tuple[Estimate, float]:
    """Mean of `last` minus mean of `first`, two arms of unrelated runs on the same prompts, and its two-sided p.

    Takes (P,) or (R, P) each, the same prompts in the same columns; both arms see the same resampled prompts, and each
    resamples its own runs. Runs that belong together in pairs are compared by `mean_and_p` of their differences.
    """
    num_first = len(np.atleast_2d(np.asarray(first)))
    both_RP = _table(np.vstack([np.atleast_2d(first), np.atleast_2d(last)]))
    rng = np.random.default_rng(seed)
    means_BDR = over_prompts(*_sums_and_counts(both_RP), rng, num_resamples)
    resampled_B = over_runs(means_BDR[..., num_first:], rng) - over_runs(means_BDR[..., :num_first], rng)
    means_R = np.nanmean(both_RP, axis=1)
    value = float(means_R[num_first:].mean() - means_R[:num_first].mean())
    num_runs = max(num_first, len(both_RP) - num_first)
    return _estimate(value, resampled_B, both_RP, num_runs), bootstrap_p(resampled_B)


def bootstrap_p(resampled_B: Floats) -> float:
    """Two-sided bootstrap p that the mean is 0: the interval of level 1 - p just reaches 0."""
    far = min(np.sum(resampled_B <= 0), np.sum(resampled_B >= 0))
    return min(1.0, 2 * float(far + 1) / (len(resampled_B) + 1))


def least_p(num_resamples: int) -> float:
    """The bootstrap p where no resample lies on the far side of 0: the true one is at most so large."""
    return 2 / (num_resamples + 1)


def resamples_for(family: int) -> int:
    """So many that `least_p` is below 0.02 after Holm's correction over the family: the plainest difference can be told
    however many are looked at."""
    return max(NUM_RESAMPLES, 100 * family)


def over_prompts(
    sums_RP: Floats, counts_RP: Floats, rng: np.random.Generator, num_resamples: int | None = None
) -> Floats:
    """Mean of each run in every resample of the prompts, (B, D, R), from the sum and number of values at each prompt.

    Where runs share prompts D is 1: a run that is drawn twice has the same prompts both times, and so have all runs.
    Where each run has prompts of its own D is R: each draw of a run has prompts of its own. Otherwise their sampling
    error would count up to three times.
    """
    num_resamples, num_runs = num_resamples or NUM_RESAMPLES, len(sums_RP)
    if (np.count_nonzero(counts_RP, axis=0) > 1).any():
        return _drawn(sums_RP, counts_RP, rng, num_resamples)[:, None]
    own = [(sums_RP[[run]][:, has], counts_RP[[run]][:, has]) for run, has in enumerate(counts_RP > 0)]
    means = [_drawn(*run, rng, num_resamples * num_runs) for run in own]
    return np.concatenate(means, axis=1).reshape(num_resamples, num_runs, num_runs)


def _drawn(sums_RP: Floats, counts_RP: Floats, rng: np.random.Generator, num_resamples: int) -> Floats:
    """Mean of each run in every resample of the same prompts, (B, R). A run without a drawn prompt keeps its own mean.

    Prompts with the same values in every run are exchangeable, so resampling how often each distinct column occurs is
    the prompt bootstrap itself: ((B, U) @ (U, R)) with a handful of columns instead of thousands.
    """
    num_prompts = sums_RP.shape[1]
    columns, times_U = np.unique(np.vstack([sums_RP, counts_RP]), axis=1, return_counts=True)
    sums_RU, counts_RU = np.split(columns, 2)
    block = max(1, _LARGEST // times_U.size)
    means: list[Floats] = []
    means_R = sums_RP.sum(axis=1) / counts_RP.sum(axis=1)
    for done in range(0, num_resamples, block):
        size = min(block, num_resamples - done)
        prompts_BU = rng.multinomial(num_prompts, times_U / num_prompts, size=size)
        drawn_BR = prompts_BU @ counts_RU.T
        means.append(np.where(drawn_BR, (prompts_BU @ sums_RU.T) / np.maximum(drawn_BR, 1), means_R))
    return np.concatenate(means)


def over_runs(means_BDR: Floats, rng: np.random.Generator) -> Floats:
    """Mean over as many drawn runs as there are, (B,); one run stays itself."""
    num_resamples, _, num_runs = means_BDR.shape
    drawn_BR = rng.integers(num_runs, size=(num_resamples, num_runs))
    means_BRR = np.broadcast_to(means_BDR[:, :num_runs], (num_resamples, num_runs, num_runs))
    return np.take_along_axis(means_BRR, drawn_BR[..., None], axis=2).mean(axis=(1, 2))


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
