"""SRT: reinforcement by the model's own majority vote, without labels (arXiv:2505.21444).

Paper        "Can Large Reasoning Models Self-Train?"
Reproduces   n samples per prompt, reward for agreeing with their majority, RLOO with a small KL; hard or soft rewards,
             a threshold, and labels of the frozen first model as a remedy against collapse.
Watch        the share of votes of the winner and the verifier's accuracy, in `training` of summary.json: consistent and
             wrong is the collapse that the paper describes.
Differs      KL stands in the loss (low-variance estimator per token) and not in the reward; no curriculum.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from upturn.engines.sampling import Config as Sampling
from upturn.lab.lab import Attempts, Lab
from upturn.recipes._base import Iterated, Loop, Round, begin, iterate, part
from upturn.types import Prompt


class Config(Iterated):
    """One run."""

    sampling: Sampling = Sampling(temperature=1.0)
    """Temperature 1, since ratios count from the model as it is: drafts of a cooler one move where training rests. Name
    it in a `sampling` of your own, too."""
    samples: int = Field(default=32, ge=2)
    """Answers per prompt."""
    labeller: Literal["self", "frozen"] = "self"
    """Whose votes make the label: the current model's, or the first one's."""
    reward: Literal["hard", "soft"] = "hard"
    tau: float = Field(default=0.0, ge=0, le=1)
    """Share of the votes below which a prompt gets no label."""
    clip: float = Field(default=0.2, gt=0)
    kl: float = Field(default=0.001, ge=0)


def run(cfg: Config, lab: Lab) -> None:
    """So many times: sample, vote, reinforce."""
    base = begin(cfg, lab)
    strategy = part("strategies", "parallel", turns=cfg.samples)
    majority = part("scorers", "majority", soft=cfg.reward == "soft", tau=cfg.tau)

    def judge(made: Attempts, asked: list[Prompt], label: str) -> Attempts:
        voters = None
        if cfg.labeller == "frozen":
            voters = lab.generate(base, asked, strategy, cfg.sampling, f"votes {label}", purpose="votes")
        return lab.score(made, majority, label, voters)

    what = Round(
        strategy,
        part("selection", "advantages", reward="own", estimator="rloo"),
        part("objectives", "policy_gradient", clip=cfg.clip, kl=cfg.kl, loss_agg="sequence_sum"),
    )
    model = iterate(cfg, lab, base, what, Loop(reference=base, judge=judge))
    lab.publish(model, "Trained with SRT (arXiv:2505.21444).")
