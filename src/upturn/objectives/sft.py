"""Weighted negative log-likelihood of drafts in their own contexts: STaR, ReST-EM, Think-Prune-Train, aggregation.

What it does   Teaches the drafts that a selection rule kept, each behind what it was shown: the question alone, a worse
               draft, several drafts, a critique.
Equation       loss = -sum_y v(y) log policy(y | its context), summed over tokens;  v(y) >= 0 is the draft's weight
               The weight is sum_y v(y) |y|, so the mean is per token. Its minimum is the drafts' weighted distribution.
Needs          groups of drafts with weights: 1 to learn, 0.5 to learn half as much.
Differs        STaR (arXiv:2203.14465) and ReST-EM (arXiv:2312.06585) average over tokens in their own ways; the papers
               differ in what they keep and from which model they start, which are not the objective's to say.
"""

from __future__ import annotations

from torch import Tensor

from upturn._model import Strict
from upturn.numerics import sum_by_sample
from upturn.objectives._base import Batch, Loss, values


class Config(Strict):
    """There is nothing to set: the weights come with the drafts."""


def needs(cfg: Config) -> None:
    """No rows: it learns from groups."""
    return None


def uses_reference(cfg: Config) -> bool:
    """Never."""
    return False


def loss(logprobs_N: Tensor, batch: Batch, cfg: Config) -> Loss:
    """Weighted NLL over target tokens; the metrics tell direct answers from refined ones."""
    value_S = values(batch)
    if bool((value_S < 0).any()):
        raise ValueError("sft takes weights of 0 and more, and a draft has less: an advantage is for policy_gradient")
    logps_S = value_S * sum_by_sample(logprobs_N, batch.owner_N, len(value_S))
    held_S, direct_S = logps_S.detach(), batch.turn_S == 1
    metrics = {"direct/logps/chosen": held_S[direct_S].sum(), "refined/logps/chosen": held_S[~direct_S].sum()}
    return Loss(-logps_S.sum(), float((value_S * batch.num_tokens_S).sum()), metrics)
