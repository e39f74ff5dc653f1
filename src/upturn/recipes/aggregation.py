"""Aggregation Fine-Tuning: several drafts are shown at once, and one answer is made of them (arXiv:2501.11877).

Reproduces   SFT on (question, N proposals -> good answer) with the model's own proposals; propose-and-aggregate with
             hidden layers at inference.
Settings     `direct: true` is the hybrid training of GSR (arXiv:2509.00084): the same answer also without proposals.
Differs      The target is a verified answer of the model itself, not a stronger model's aggregation.
"""

from __future__ import annotations

from pydantic import Field

from upturn.lab.lab import Lab
from upturn.recipes._base import Iterated, Round, begin, iterate, part


class Config(Iterated):
    """One run."""

    proposals: int = Field(default=4, ge=2)
    """Drafts that are shown."""
    samples: int = Field(default=8, ge=3)
    """Answers per prompt in training: the proposals, and those among which a right one is looked for."""
    direct: bool = False
    """Also train the direct answer."""
    layers: int = Field(default=0, ge=0)
    """Hidden layers of aggregation when measured."""


def run(cfg: Config, lab: Lab) -> None:
    """So many times: propose, find a right answer, train to aggregate."""
    strategy = part("strategies", "aggregate", proposals=cfg.proposals, layers=cfg.layers)
    measured = cfg.model_copy(update={"measure": cfg.measure.model_copy(update={"strategy": strategy})})
    what = Round(
        part("strategies", "parallel", turns=cfg.samples),
        part("selection", "aggregation", proposals=cfg.proposals, direct=cfg.direct),
        part("objectives", "sft"),
    )
    model = iterate(measured, lab, begin(measured, lab), what)
    lab.publish(model, "Trained with Aggregation Fine-Tuning (arXiv:2501.11877).")
