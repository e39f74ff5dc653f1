"""Kahneman-Tversky Optimization (Ethayarajh et al., 2024, arXiv:2402.01306): single drafts, desirable or not.

What it does   Raises desirable drafts above a zero point and lowers undesirable ones below it; no pairs are needed.
Equation       desirable    w_D (1 - sigma(beta (l(y|x) - z0)))        l(y|x) = log policy(y|x) - log reference(y|x)
               undesirable  w_U (1 - sigma(beta (z0 - l(y|x))))        summed over tokens
               z0 = max(0, mean l(y'|x)) over mismatched drafts y', detached: an estimate of KL(policy | reference)
Needs          groups of drafts with values 1 (desirable), -1 (undesirable) or 0 (mismatched: a draft of another
               prompt in this prompt's context, which serves z0 only); reference log-probs.
Differs        z0 is that of a micro-batch, as in TRL, so the sizes of micro-batches matter: the fewer drafts it is the
               mean of, the oftener noise lifts it above 0. It is 0 where there is no mismatched draft. The weight
               counts desirable and undesirable drafts. `rewards/margins` is how far a draft stands on its own side of
               z0; TRL takes the difference of two means.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from upturn._model import Strict
from upturn.objectives._base import Batch, Loss, gains, values


class Config(Strict):
    """Settings with the names TRL uses."""

    beta: float = Field(default=0.1, gt=0)
    """Inverse strength of the pull away from the reference, per nat."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """The paper holds (this x their number) / (undesirable_weight x theirs) between 1 and 4/3."""
    undesirable_weight: float = Field(default=1.0, ge=0)


def needs(cfg: Config) -> None:
    """No rows: it learns from groups."""
    return None


def uses_reference(cfg: Config) -> bool:
    """Always."""
    return True


def loss(logprobs_N: Tensor, batch: Batch, cfg: Config) -> Loss:
    """KTO loss summed over the drafts that are desirable or not."""
    value_S = values(batch)
    if bool(((value_S != 1) & (value_S != -1) & (value_S != 0)).any()):
        raise ValueError("kto takes values 1 (desirable), -1 (undesirable) and 0 (mismatched), and a draft has another")
    gain_S = gains(logprobs_N, batch)
    judged_S = value_S != 0
    zero = _zero_point(gain_S.detach()[~judged_S])
    side, gain = value_S[judged_S], gain_S[judged_S]
    weight = torch.where(side > 0, cfg.desirable_weight * side, -cfg.undesirable_weight * side)
    above = side * (gain - zero)
    losses = weight * (1 - torch.sigmoid(cfg.beta * above))
    metrics = {
        "kl": zero * len(side),
        "rewards/margins": cfg.beta * above.detach().sum(),
        "rewards/accuracies": (above.detach() > 0).float().sum(),
    }
    return Loss(losses.sum(), float(len(side)), metrics)


def _zero_point(gains: Tensor) -> Tensor:
    """Mean gain of the mismatched drafts, at least 0."""
    return gains.mean().clamp(min=0) if len(gains) else gains.sum()
