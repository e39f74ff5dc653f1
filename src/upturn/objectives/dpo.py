"""Direct Preference Optimization (Rafailov et al., 2023, arXiv:2305.18290) and IPO (arXiv:2310.12036).

What it does   Raises the policy's preference for the chosen answer over the rejected one in the direct context,
               counted from the reference's own preference.
Equation       margin  = l(y_w|x) - l(y_l|x),  l(y|x) = log policy(y|x) - log reference(y|x), summed over tokens
               sigmoid = -(1-e) log sigma(beta margin) - e log sigma(-beta margin)         e = label_smoothing
               ipo     = (margin - 1/(2 beta))^2, summed log-ratios as in the paper's equation 17
               plus rpo_alpha times the NLL of the chosen answer per token (Iterative RPO, arXiv:2404.19733)
Needs          direct pairs, reference log-probs.
Differs        Soft labels, where a pair has them, replace 1 in `sigmoid`: p (1-e) + (1-p) e.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from upturn._model import Strict
from upturn.numerics import sum_by_sample
from upturn.objectives._base import SIDES, Batch, Loss, Row, gains, margin


class Config(Strict):
    """Settings with the names TRL uses."""

    beta: float = Field(default=0.1, gt=0)
    """Inverse strength of the pull away from the reference, per nat."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels (sigmoid only)."""
    rpo_alpha: float = Field(default=0.0, ge=0)
    """Weight of the length-normalised NLL of the chosen answer."""


def needs(cfg: Config) -> frozenset[Row]:
    """Both direct answers."""
    return frozenset(("direct", side) for side in SIDES)


def uses_reference(cfg: Config) -> bool:
    """Always."""
    return True


def loss(logprobs_N: Tensor, batch: Batch, cfg: Config) -> Loss:
    """Preference loss summed over pairs."""
    gain_S = gains(logprobs_N, batch)
    margin_P = margin(gain_S, batch, "direct")
    if cfg.loss_type == "ipo":
        loss_P = (margin_P - 1 / (2 * cfg.beta)) ** 2
    else:
        label_P = batch.p_P * (1 - cfg.label_smoothing) + (1 - batch.p_P) * cfg.label_smoothing
        scaled_P = cfg.beta * margin_P
        loss_P = -label_P * F.logsigmoid(scaled_P) - (1 - label_P) * F.logsigmoid(-scaled_P)
    chosen = batch.rows["direct", "chosen"]
    if cfg.rpo_alpha:
        logprobs_S = sum_by_sample(logprobs_N, batch.owner_N, len(batch.num_tokens_S))
        loss_P = loss_P - cfg.rpo_alpha * logprobs_S[chosen] / batch.num_tokens_S[chosen]
    held = margin_P.detach()
    metrics = {
        "direct/rewards/margins": cfg.beta * held.sum(),
        "direct/rewards/accuracies": (held > 0).float().sum(),
        "direct/rewards/chosen": cfg.beta * gain_S.detach()[chosen].sum(),
        "direct/rewards/rejected": cfg.beta * gain_S.detach()[batch.rows["direct", "rejected"]].sum(),
    }
    return Loss(loss_P.sum(), float(batch.num_pairs), metrics)
