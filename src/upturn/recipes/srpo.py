"""SRPO: generator and improver of one model in one joint loss (arXiv:2406.01660).

Reproduces   the offline joint loss on preference pairs: `objectives/srpo.py`.
Differs      The pairs are the model's own samples, judged, and may be made anew in each iteration; the paper trains
             once on given pairs, which is `iterations: 1`.
"""

from __future__ import annotations

from pydantic import Field

from upturn.config import Objective
from upturn.lab.lab import Lab
from upturn.recipes._base import Iterated, Round, begin, iterate, part


class Config(Iterated):
    """One run."""

    samples: int = Field(default=8, ge=2)
    """Answers per prompt."""
    objective: Objective = Field(default="srpo", validate_default=True)


def run(cfg: Config, lab: Lab) -> None:
    """So many times: sample, rank, train both roles."""
    what = Round(
        part("strategies", "parallel", turns=cfg.samples),
        part("selection", "best_vs_worst", rejected="random"),
        cfg.objective,
    )
    model = iterate(cfg, lab, begin(cfg, lab), what)
    lab.publish(model, "Trained with SRPO (arXiv:2406.01660).")
