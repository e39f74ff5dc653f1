"""GRPO over the turns of a chain: each draft's advantage among the drafts of its turn (GRPO, arXiv:2402.03300).

Reproduces   GRPO's group advantages, clipping and KL, on chains of refinement: several chains per prompt, all turns of
             a chain in one token tree, only drafts are targets.
Settings     reward: `last` (the last draft pays all), `sum` (of all turns), `improvement` (over the draft shown).
Differs      Advantages are taken within a turn, since turns differ in difficulty. Prompts whose advantages are all 0
             (all chains as good as each other) are left out, and with them the KL that would hold their drafts.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from upturn.engines.sampling import Config as Sampling
from upturn.lab.lab import Lab
from upturn.recipes._base import Iterated, Loop, Round, begin, iterate, part


class Config(Iterated):
    """One run."""

    sampling: Sampling = Sampling(temperature=1.0)
    """Temperature 1, since ratios count from the model as it is: drafts of a cooler one move where training rests. Name
    it in a `sampling` of your own, too."""
    chains: int = Field(default=8, ge=2)
    """Chains per prompt."""
    turns: int = Field(default=4, ge=1)
    """Drafts per chain; 1 is GRPO without refinement."""
    reward: Literal["last", "sum", "improvement", "own"] = "sum"
    scale: bool = True
    """Whether advantages are divided by their standard deviation."""
    clip: float = Field(default=0.2, gt=0)
    kl: float = Field(default=0.04, ge=0)


def run(cfg: Config, lab: Lab) -> None:
    """So many times: sample chains, reward, reinforce."""
    what = Round(
        part("strategies", "chains", chains=cfg.chains, turns=cfg.turns),
        part("selection", "advantages", reward=cfg.reward, estimator="grpo", scale=cfg.scale),
        part("objectives", "policy_gradient", clip=cfg.clip, kl=cfg.kl, loss_agg="sequence_mean"),
    )
    base = begin(cfg, lab)
    model = iterate(cfg, lab, base, what, Loop(reference=base))
    lab.publish(model, "Trained with GRPO over turns (arXiv:2402.03300).")
