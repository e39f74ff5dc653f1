"""EVOLVE's joint preference loss (arXiv:2502.05605): DPO on direct answers and the refinement loss.

What it does   Trains the direct and the refining ability together.
Equation       loss = (1 - alpha) L_DPO + alpha L_refine (+ nll_weight times the NLL per token of chosen answers)
Needs          whatever the two parts need; alpha = 0 needs no refinement rows, alpha = 1 no direct ones.
Differs        The paper's alpha and its normalisation are unknown; ours is 0.8 on the sum of both sides. The NLL term
               is an option of ours, off by default; its mean is over the tokens of a pair, so every pair weighs the
               same, and how a step is cut into micro-batches does not matter.
"""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor

from upturn._model import Strict
from upturn.objectives import dpo, nll, refine
from upturn.objectives._base import Batch, Loss, Row
from upturn.objectives.dpo import Config as DpoConfig
from upturn.objectives.nll import Config as NllConfig
from upturn.objectives.refine import Config as RefineConfig


class Config(Strict):
    """The two parts and their balance."""

    alpha: float = Field(default=0.8, ge=0, le=1)
    """Share of the refinement loss."""
    dpo: DpoConfig = DpoConfig()
    refine: RefineConfig = RefineConfig()
    nll_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean token NLL of each pair's chosen answers in the contexts of `nll`."""
    nll: NllConfig = NllConfig()

    @model_validator(mode="after")
    def _critiques_are_shown(self) -> Config:
        if self.nll.critique and not self.nll_weight:
            raise ValueError("nll.critique does nothing without nll_weight: drafts would be shown without critiques")
        return self


def needs(cfg: Config) -> frozenset[Row]:
    """Rows of the parts that have a weight."""
    rows: frozenset[Row] = frozenset()
    if cfg.alpha < 1:
        rows |= dpo.needs(cfg.dpo)
    if cfg.alpha > 0:
        rows |= refine.needs(cfg.refine)
    return rows | nll.needs(cfg.nll) if cfg.nll_weight else rows


def uses_reference(cfg: Config) -> bool:
    """Always."""
    return True


def loss(logprobs_N: Tensor, batch: Batch, cfg: Config) -> Loss:
    """Joint loss summed over pairs."""
    total, metrics = logprobs_N.sum() * 0, {}
    if cfg.alpha < 1:
        direct = dpo.loss(logprobs_N, batch, cfg.dpo)
        total = total + (1 - cfg.alpha) * direct.total
        metrics |= direct.metrics | {"direct/loss": direct.total.detach()}
    if cfg.alpha > 0:
        refined = refine.loss(logprobs_N, batch, cfg.refine)
        total = total + cfg.alpha * refined.total
        metrics |= refined.metrics | {"refine/loss": refined.total.detach()}
    if cfg.nll_weight:
        total_P, weight_P, _ = nll.by_pair(logprobs_N, batch, cfg.nll)
        likely = (total_P / weight_P).sum()
        total = total + cfg.nll_weight * likely
        metrics |= {"nll/loss": likely.detach()}
    return Loss(total, float(batch.num_pairs), metrics)
