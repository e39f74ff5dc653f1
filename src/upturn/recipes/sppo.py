"""SPPO: regress log-ratios onto win rates among the model's own samples (arXiv:2405.00675).

Reproduces   K samples, win-rate matrix, the best and the worst by win rate, squared regression with eta, three
             iterations with the reference at the sampling model.
Differs      Win rates come from scores by a logistic link instead of a pair judge. eta of 1000 is for answers of some
             300 tokens: `eta` is by config. AdamW instead of RMSprop.
"""

from __future__ import annotations

from pydantic import Field

from upturn.lab.lab import Lab
from upturn.recipes._base import Iterated, Round, begin, iterate, part


class Config(Iterated):
    """One run."""

    samples: int = Field(default=5, ge=2)
    """Answers per prompt."""
    eta: float = Field(default=1000.0, gt=0)
    """Inverse strength of the pull towards the reference: the target log-ratio of a sure win is eta/2 nats."""
    scale: float = Field(default=1.0, gt=0)
    """Scores are multiplied by this before they become win rates."""


def run(cfg: Config, lab: Lab) -> None:
    """So many times: sample, play all against all, regress."""
    what = Round(
        part("strategies", "parallel", turns=cfg.samples),
        part("selection", "win_rates", scale=cfg.scale),
        part("objectives", "sppo", eta=cfg.eta),
    )
    model = iterate(cfg, lab, begin(cfg, lab), what)
    lab.publish(model, "Trained with SPPO (arXiv:2405.00675).")
