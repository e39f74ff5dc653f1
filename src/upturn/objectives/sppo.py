"""Self-Play Preference Optimization (Wu et al., 2024, arXiv:2405.00675): regress gains on win rates.

What it does   Moves the log-ratio of each draft to its win rate against the policy that sampled it, times eta. Repeated
               with the reference reset each time, the average policy goes to the winner of the preference game.
Equation       loss = 1/2 (l(y|x) - eta (P(y > policy | x) - 1/2))^2,  l(y|x) = log policy(y|x) - log reference(y|x)
               summed over tokens; reference = the policy before this training. At a small eta one training is a step
               of multiplicative weights: policy proportional to reference exp(eta P).
Needs          groups of drafts with win rates in [0, 1], reference log-probs.
Differs        The mean is per draft. The released code sums the best and the worst draft of a prompt under the same
               1/2, so its number is twice ours; TRL's `sppo_hard` leaves the 1/2 out, and is four times ours.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from upturn._model import Strict
from upturn.objectives._base import Batch, Loss, gains, values


class Config(Strict):
    """The step of the game."""

    eta: float = Field(default=1000.0, gt=0)
    """1 / TRL's `beta`. A sure winner is to gain eta/2 nats over all its tokens: the paper's 1000 is for answers of
    about 300 tokens. Scale it with the length: 3 or so for each token."""


def needs(cfg: Config) -> None:
    """No rows: it learns from groups."""
    return None


def uses_reference(cfg: Config) -> bool:
    """Always."""
    return True


def loss(logprobs_N: Tensor, batch: Batch, cfg: Config) -> Loss:
    """Squared error summed over drafts."""
    win_S = values(batch)
    if bool(((win_S < 0) | (win_S > 1)).any()):
        raise ValueError("sppo takes win rates from 0 to 1, and a draft has another value")
    gain_S = gains(logprobs_N, batch)
    loss_S = 0.5 * (gain_S - cfg.eta * (win_S - 0.5)) ** 2
    reward_S = gain_S.detach() / cfg.eta
    metrics = {
        "rewards/errors": (reward_S - (win_S - 0.5)).abs().sum(),
        "rewards/accuracies": (reward_S * (win_S - 0.5) > 0).float().sum(),
    }
    return Loss(loss_S.sum(), float(len(win_S)), metrics)
