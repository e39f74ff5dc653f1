"""Self-training on verified samples by SFT, DPO, KTO or IPO, offline or online (arXiv:2407.08400).

Reproduces   16 samples per prompt and a verifier; SFT on right ones, or a preference loss on right against wrong.
             Offline: one pass over samples of the base. Online: fresh samples of the current model in each iteration.
Differs      Online is by iterations of `prompts` prompts, not by single steps. SFT learns one right answer of each
             prompt, not all of them. No LoRA.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from upturn.lab.lab import Lab
from upturn.recipes._base import Iterated, Round, begin, iterate, part

LOSSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("correct", "sft", {}),
    "dpo": ("right_vs_wrong", "dpo", {"beta": 0.9}),
    "ipo": ("right_vs_wrong", "dpo", {"beta": 0.99, "loss_type": "ipo"}),
    "kto": ("desirable", "kto", {"beta": 0.1}),
}
"""Loss -> selection and objective, with the paper's best beta (tau for IPO)."""


class Config(Iterated):
    """One arm: `iterations` of 1 is the offline one."""

    loss: Literal["sft", "dpo", "kto", "ipo"] = "kto"
    samples: int = Field(default=16, ge=2)
    """Answers per prompt."""
    beta: float | None = Field(default=None, gt=0)
    """The paper's best value of the loss when not given."""


def run(cfg: Config, lab: Lab) -> None:
    """Sample, verify, train: once, or again from the model that came out."""
    selection, objective, best = LOSSES[cfg.loss]
    beta = {"beta": cfg.beta} if cfg.beta else {}
    what = Round(
        part("strategies", "parallel", turns=cfg.samples),
        part("selection", selection),
        part("objectives", objective, **best | beta),
    )
    model = iterate(cfg, lab, begin(cfg, lab), what)
    lab.publish(model, "Self-trained on verified samples (arXiv:2407.08400).")
