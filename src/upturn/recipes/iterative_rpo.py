"""Iterative RPO: right against wrong samples, DPO with a length-normalised NLL term (arXiv:2404.19733).

Reproduces   sample many answers, pair right with wrong ones (several pairs per prompt), DPO + alpha NLL(y_w)/|y_w|,
             each iteration from the previous model, which is also the reference.
Differs      The paper takes 30 samples and 10 pairs per prompt, and 4 iterations; the shipped config is smaller. The
             right answer of a prompt's pairs is one and the same, its wrong answers are distinct.
"""

from __future__ import annotations

from pydantic import Field

from upturn.lab.lab import Lab
from upturn.recipes._base import Iterated, Round, begin, iterate, part


class Config(Iterated):
    """One run."""

    samples: int = Field(default=30, ge=2)
    """Answers per prompt."""
    pairs_per_prompt: int = Field(default=10, ge=1)
    beta: float = Field(default=0.1, gt=0)
    rpo_alpha: float = Field(default=1.0, ge=0)
    """Weight of the NLL term; 0 leaves it out."""


def run(cfg: Config, lab: Lab) -> None:
    """So many times: sample, pair, train."""
    what = Round(
        part("strategies", "parallel", turns=cfg.samples),
        part("selection", "best_vs_worst", rejected="random", min_chosen=1, pairs_per_prompt=cfg.pairs_per_prompt),
        part("objectives", "dpo", beta=cfg.beta, rpo_alpha=cfg.rpo_alpha),
    )
    model = iterate(cfg, lab, begin(cfg, lab), what)
    lab.publish(model, "Trained with Iterative RPO (arXiv:2404.19733).")
