"""Think, Prune, Train: fine-tune on the model's own right answers, again and again (arXiv:2504.18116).

Reproduces   sample n answers, keep right ones (distinct, at most `cap` per prompt), SFT, iterate.
Settings     STaR (arXiv:2203.14465): samples 1, greedy, from the base each time, without its rationalisation by hints.
             ReST-EM (arXiv:2312.06585): samples 32, cap 10, from the base each time.
Differs      Whether each SFT of the paper starts from the base or the last model is unknown: `start` chooses.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from upturn.lab.lab import Lab
from upturn.recipes._base import Iterated, Loop, Round, begin, iterate, part


class Config(Iterated):
    """One run."""

    samples: int = Field(default=10, ge=1)
    """Answers per prompt."""
    cap: int = Field(default=1, ge=1)
    """Right answers kept per prompt."""
    prune: bool = True
    """Whether wrong answers are left out; the paper's claim is that without this the model stagnates or collapses."""
    start: Literal["base", "last"] = "base"
    """The model that each SFT starts from."""
    answers: Literal["replace", "accumulate"] = "replace"
    """Whether each iteration's answers replace the earlier ones, or are learnt together with them. (Not `data`: in a
    config that is the task's.)"""


def run(cfg: Config, lab: Lab) -> None:
    """So many times: think, prune, train."""
    what = Round(
        part("strategies", "parallel", turns=cfg.samples),
        part("selection", "correct", cap=cfg.cap, right_only=cfg.prune),
        part("objectives", "sft"),
    )
    model = iterate(cfg, lab, begin(cfg, lab), what, Loop(start=cfg.start, data=cfg.answers))
    lab.publish(model, "Trained with Think, Prune, Train (arXiv:2504.18116).")
