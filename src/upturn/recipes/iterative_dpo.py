"""Iterative DPO: the best against the worst of K samples, with the sampling model as the reference (arXiv:2405.07863).

Reproduces   the online loop of "RLHF Workflow": sample K answers, score them, DPO on best against worst, begin again.
Differs      The scorer is the config's (a verifier or a reward model); ties make no pair.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from upturn.lab.lab import Lab
from upturn.recipes._base import Iterated, Loop, Round, begin, iterate, part


class Config(Iterated):
    """One run."""

    samples: int = Field(default=8, ge=2)
    """Answers per prompt."""
    beta: float = Field(default=0.1, gt=0)
    reference: Literal["previous", "base"] = "previous"
    """The model that log-ratios count from: the one that sampled, or the first one."""


def run(cfg: Config, lab: Lab) -> None:
    """So many times: sample, rank, DPO."""
    what = Round(
        part("strategies", "parallel", turns=cfg.samples),
        part("selection", "best_vs_worst"),
        part("objectives", "dpo", beta=cfg.beta),
    )
    base = begin(cfg, lab)
    model = iterate(cfg, lab, base, what, Loop(reference=base if cfg.reference == "base" else None))
    lab.publish(model, "Trained with iterative DPO (arXiv:2405.07863).")
