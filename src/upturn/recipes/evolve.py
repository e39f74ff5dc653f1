"""EVOLVE: activate refinement by joint SFT, then iterate refinement chains and preference training (arXiv:2502.05605).

Reproduces   the method: Stage A (eq. 4), the joint preference loss (eq. 5 with DPO), K online iterations.
Differs      Pairs of Stage A come from the model's own samples; drafts are shown as a conversation where the template
             allows; the reference is the model at the start of each iteration (or the SFT model, by `reference`).
Results      docs/results/
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from upturn._model import Strict
from upturn.config import Selector, Strategy
from upturn.engines.sampling import Config as Sampling
from upturn.errors import NothingToLearn
from upturn.lab.lab import Examples, Lab, Model, Training
from upturn.recipes._base import Prompts, Run, begin, say_ended


class Collect(Strict):
    """Drafts from the current model, judged and made into pairs."""

    prompts: int = Field(default=500, ge=1)
    """Fresh prompts each time."""
    strategy: Strategy
    sampling: Sampling = Sampling()
    selection: Selector


class Config(Run):
    """One EVOLVE run."""

    activate: Collect | None
    """Stage A's data; null starts the iterations from the model as it is."""
    sft: Training
    """Stage A's training."""
    sft_rounds: int = Field(default=1, ge=1)
    """Times that Stage A is done, each time with drafts of the model so far."""
    iterations: int = Field(default=3, ge=0)
    collect: Collect
    """Stage B's data, in every iteration."""
    prefer: Training
    """Stage B's training."""
    reference: Literal["previous", "sft"] = "previous"
    """The model that preference margins count from: the start of the iteration, or the SFT model."""


def run(cfg: Config, lab: Lab) -> None:
    """Measure, activate, then K times: collect, prefer, measure."""
    prompts = Prompts(lab)

    def examples_from(model: Model, how: Collect, label: str) -> Examples:
        drafts = lab.generate(model, prompts.take(how.prompts), how.strategy, how.sampling, label)
        return lab.select(lab.score(drafts, cfg.scorer, label), how.selection, label)

    model = begin(cfg, lab)
    if cfg.activate:
        for sft_round in range(1, cfg.sft_rounds + 1):
            label = f"sft {sft_round}" if cfg.sft_rounds > 1 else "sft"
            model = lab.train(model, examples_from(model, cfg.activate, label), cfg.sft, label)  # eq. 4
            lab.measure(model, cfg.measure, label, scorer=cfg.scorer)
    start = model
    for iteration in range(1, cfg.iterations + 1):
        label = f"iteration {iteration}"
        try:
            examples = examples_from(model, cfg.collect, label)
        except NothingToLearn as nothing:
            if model is start:
                raise
            say_ended(label, nothing)
            break
        reference = start if cfg.reference == "sft" else None
        model = lab.train(model, examples, cfg.prefer, label, iteration, reference)  # eq. 5
        lab.measure(model, cfg.measure, label, iteration, cfg.scorer)
    lab.publish(model, "Trained with EVOLVE (arXiv:2502.05605).")
