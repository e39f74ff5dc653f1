"""The refinement loss of EVOLVE (arXiv:2502.05605, eq. 5 and what follows).

What it does   Teaches to turn a worse draft into a better one (improve) and to leave a better draft alone (keep).
Equation       m_improve = l(y_w|x,y_l,z) - l(y_l|x,y_l,z)        m_keep = l(y_w|x,y_w,z) - l(y_l|x,y_w,z)
               squared   = (p - 1/2 - beta m_improve)^2 + (p - 1/2 - beta m_keep)^2      p = p(y_w > y_l | x)
               logistic  = -p log sigma(beta m) - (1-p) log sigma(-beta m), summed over the sides
Needs          pairs in the improve and keep contexts (as `sides` says), reference log-probs.
Differs        Whether the paper uses one side or both, and hard or soft labels, is unknown. Ours is the sum of the
               sides with no factor; the loss of Sherlock (arXiv:2505.22651) with empty prefixes is four times this.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from upturn._model import Strict
from upturn.objectives._base import SIDES, Batch, Context, Loss, Row, gains, margin


class Config(Strict):
    """Settings of the refinement loss."""

    beta: float = Field(default=0.25, gt=0)
    """With hard labels the squared form pulls both margins to 1/(2 beta) nats."""
    loss_type: Literal["squared", "logistic"] = "squared"
    sides: Literal["both", "improve", "keep"] = "both"


def _contexts(cfg: Config) -> tuple[Context, ...]:
    return ("improve", "keep") if cfg.sides == "both" else (cfg.sides,)


def needs(cfg: Config) -> frozenset[Row]:
    """Both answers in each context of `sides`."""
    return frozenset((context, side) for context in _contexts(cfg) for side in SIDES)


def uses_reference(cfg: Config) -> bool:
    """Always."""
    return True


def loss(logprobs_N: Tensor, batch: Batch, cfg: Config) -> Loss:
    """Refinement loss summed over pairs and sides; the weight counts pairs."""
    gain_S = gains(logprobs_N, batch)
    total, metrics = gain_S.sum() * 0, {}
    for context in _contexts(cfg):
        margin_P = cfg.beta * margin(gain_S, batch, context)
        if cfg.loss_type == "squared":
            loss_P = (batch.p_P - 0.5 - margin_P) ** 2  # method: section 6.6
        else:
            loss_P = -batch.p_P * F.logsigmoid(margin_P) - (1 - batch.p_P) * F.logsigmoid(-margin_P)
        total = total + loss_P.sum()
        held = margin_P.detach()
        metrics[f"{context}/rewards/margins"] = held.sum()
        metrics[f"{context}/rewards/accuracies"] = (held > 0).float().sum()
    return Loss(total, float(batch.num_pairs), metrics)
