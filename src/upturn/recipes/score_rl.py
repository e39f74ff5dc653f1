"""SCoRe: two stages of reinforcement over two turns, so that correcting is learnt and not copying (arXiv:2409.12917).

Reproduces   stage I: reward for the second turn only, the first one held by a strong KL; stage II: both turns, the
             second one's reward shaped by its progress over the first; REINFORCE-like updates on-policy.
Differs      Advantages are leave-one-out over several chains of a prompt, for less variance. Prompts whose advantages
             are all 0 are left out, and with them the KL that would hold their first turn. In stage II the first turn
             gets no credit for the second one's reward, where the objective is the sum of both. The paper's base
             models, scale and step counts are out of reach here.
"""

from __future__ import annotations

from pydantic import Field

from upturn.engines.sampling import Config as Sampling
from upturn.lab.lab import Lab
from upturn.recipes._base import Iterated, Loop, Prompts, Round, begin, iterate, part


class Config(Iterated):
    """One run; `iterations` are those of each stage."""

    sampling: Sampling = Sampling(temperature=1.0)
    """Temperature 1, since ratios count from the model as it is: drafts of a cooler one move where training rests. Name
    it in a `sampling` of your own, too."""
    chains: int = Field(default=4, ge=2)
    """Chains of two turns per prompt."""
    shaping: float = Field(default=10.0, ge=0)
    """Weight of the second turn's progress in its reward, in stage II."""
    kl_first: float = Field(default=0.1, ge=0)
    """KL coefficient that holds the first turn in stage I."""
    kl: float = Field(default=0.01, ge=0)
    """KL coefficient everywhere else."""
    clip: float = Field(default=0.2, gt=0)
    stage_one: bool = True
    """The paper's claim is that without it the model collapses to copying."""


def run(cfg: Config, lab: Lab) -> None:
    """Hold the first turn and learn the second, then learn both."""
    model = base = begin(cfg, lab)
    prompts = Prompts(lab)
    one = ({"turns": [2], "reward": "own"}, [cfg.kl_first, cfg.kl])
    two = ({"reward": "shaped", "shaping": cfg.shaping}, [cfg.kl])
    for number, (advantages, kl) in enumerate([one, two] if cfg.stage_one else [two]):
        what = Round(
            part("strategies", "chains", chains=cfg.chains, turns=2),
            part("selection", "advantages", estimator="rloo", **advantages),
            part("objectives", "policy_gradient", clip=cfg.clip, kl=kl, loss_agg="sequence_sum"),
        )
        how = Loop(reference=base, first=1 + number * cfg.iterations)
        model = iterate(cfg, lab, model, what, how, prompts)
    lab.publish(model, "Trained with SCoRe (arXiv:2409.12917).")
