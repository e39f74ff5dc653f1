"""Aligner: a separate model learns to correct the answers of frozen ones (arXiv:2402.02416).

Reproduces   a corrector trained on (question, answer, better answer) after a warm-up on copies; at inference any
             upstream model answers and the corrector rewrites.
Differs      Better answers are other samples of the upstream model that the scorer prefers.
"""

from __future__ import annotations

from pydantic import Field

from upturn.engines.sampling import Config as Sampling
from upturn.lab.lab import Lab, Model, Training
from upturn.recipes._base import Prompts, Run, part
from upturn.training.plan import Config as Train


class Config(Run):
    """One run; `model` becomes the corrector."""

    upstream: str
    """The frozen model whose answers are corrected."""
    serves: tuple[str, ...] = ()
    """Further upstream models that the corrector is measured behind, as "upstream 2" and so on."""
    prompts: int = Field(default=500, ge=1)
    sampling: Sampling = Sampling()
    samples: int = Field(default=8, ge=2)
    """Answers per prompt of the upstream model."""
    warm_up: Train | None = Train()
    """Training on copies, that a good answer is left as it is; null for none."""
    keep: float = Field(default=0.0, ge=0)
    """Weight of leaving better answers as they are, in the main training."""
    train: Train = Train()


def run(cfg: Config, lab: Lab) -> None:
    """Collect corrections, warm up on copies, learn to correct, measure behind every upstream model."""
    upstream, corrector = lab.load(cfg.upstream), lab.load(cfg.model)
    strategy = part("strategies", "parallel", turns=cfg.samples)
    prompts = Prompts(lab)
    behind = {f"upstream {n}": lab.load(name) for n, name in enumerate(cfg.serves, 2)} | {"upstream": upstream}

    def measure(model: Model, label: str, iteration: int = 0) -> None:
        for name, other in behind.items():
            lab.measure(model, cfg.measure, f"{label} behind {name}", iteration, cfg.scorer, upstream=other)

    measure(corrector, "base")
    drafts = lab.generate(upstream, prompts.take(cfg.prompts), strategy, cfg.sampling, "corrections")
    judged = lab.score(drafts, cfg.scorer, "corrections")
    pairs = lab.select(judged, part("selection", "best_vs_worst", rejected="random"), "corrections")
    if cfg.warm_up:
        copies = Training(objective=part("objectives", "nll", direct=0, improve=0, keep=1), train=cfg.warm_up)
        corrector = lab.train(corrector, pairs, copies, "warm-up")
    correct = Training(objective=part("objectives", "nll", direct=0, improve=1, keep=cfg.keep), train=cfg.train)
    corrector = lab.train(corrector, pairs, correct, "corrector", 1)
    measure(corrector, "corrector", 1)
    lab.publish(corrector, "A corrector, trained as in Aligner (arXiv:2402.02416).")
