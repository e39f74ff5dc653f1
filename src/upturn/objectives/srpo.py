"""Self-Improving Robust Preference Optimization (Choi et al., 2024, arXiv:2406.01660): one game, two abilities.

What it does   Trains an improver, and a generator whose answers leave the improver the least to improve.
Equation       joint    = (2p - 1 - beta [l(y_w|x,y_l) - l(y_l|x,y_w) + l(y_w|x) - l(y_l|x)])^2    p = p(y_w > y_l | x)
               improver = (p - 1/2 - beta m_improve)^2 + (p - 1/2 - beta m_keep)^2, as in `refine`
               loss     = (1 - alpha) joint + alpha improver
               Both are 0 where l(y2|x,y1) = p(y2 > y1)/beta - log Z(y1) and l(y|x) = -log Z(y) + a constant.
Needs          pairs in the direct, improve and keep contexts (alpha = 1: no direct ones), reference log-probs.
Differs        With hard labels 2p - 1 is the paper's 1. We know the convex combination second-hand: which part alpha
               weighs is our reading, and the improver's two sides are summed with no factor; alpha's and beta's values
               are ours. Against EVOLVE the generator learns from the joint term instead of DPO.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from upturn._model import Strict
from upturn.objectives import refine
from upturn.objectives._base import Batch, Loss, Row, _row, gains, margin

JOINT: frozenset[Row] = frozenset(
    {("improve", "chosen"), ("keep", "rejected"), ("direct", "chosen"), ("direct", "rejected")}
)


class Config(Strict):
    """The two parts and their balance."""

    beta: float = Field(default=0.25, gt=0)
    """With hard labels the joint margin is pulled to 1/beta nats, the improver's margins to 1/(2 beta)."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Share of the improver loss."""


def _improver(cfg: Config) -> refine.Config:
    return refine.Config(beta=cfg.beta)


def needs(cfg: Config) -> frozenset[Row]:
    """Rows of the parts that have a weight."""
    joint = JOINT if cfg.alpha < 1 else frozenset[Row]()
    return joint | refine.needs(_improver(cfg)) if cfg.alpha > 0 else joint


def uses_reference(cfg: Config) -> bool:
    """Always."""
    return True


def loss(logprobs_N: Tensor, batch: Batch, cfg: Config) -> Loss:
    """Both parts summed over pairs."""
    total, metrics = logprobs_N.sum() * 0, {}
    if cfg.alpha < 1:
        gain_S = gains(logprobs_N, batch)
        across_P = gain_S[_row(batch, "improve", "chosen")] - gain_S[_row(batch, "keep", "rejected")]
        direct_P = margin(gain_S, batch, "direct")
        joint_P = (2 * batch.p_P - 1 - cfg.beta * (across_P + direct_P)) ** 2
        total = total + (1 - cfg.alpha) * joint_P.sum()
        metrics = {
            "joint/loss": joint_P.detach().sum(),
            "joint/rewards/margins": cfg.beta * (across_P + direct_P).detach().sum(),
            "direct/rewards/margins": cfg.beta * direct_P.detach().sum(),
            "direct/rewards/accuracies": (direct_P.detach() > 0).float().sum(),
        }
    if cfg.alpha > 0:
        improver = refine.loss(logprobs_N, batch, _improver(cfg))
        total = total + cfg.alpha * improver.total
        metrics |= improver.metrics | {"refine/loss": improver.total.detach()}
    return Loss(total, float(batch.num_pairs), metrics)
