"""Negative log-likelihood of chosen answers in any mix of contexts: joint SFT (EVOLVE, arXiv:2502.05605, eq. 4).

What it does   Teaches the better answer directly and as the refinement of a worse draft; with `keep`, also that a
               good draft is repeated; with `critique`, also what is wrong with a draft, which the other contexts show.
Equation       loss = -[ a log policy(y_w | x) + b log policy(y_w | x, y_l, z) + c log policy(y_w | x, y_w, z)
                         + d log policy(q_w | x, y_w) + d log policy(q_l | x, y_l) ]       q: the verifier's critique
               summed over tokens; the weight is the weighted number of tokens, so the mean is per token.
Needs          chosen answers in the contexts with a weight above 0; critiques of both answers.
Differs        The paper's form is a = b = 1, c = d = 0 (as printed by a derivative work); weights are ours to set. With
               critiques `keep` is not needed: a draft whose critique finds nothing is kept without asking.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor

from upturn._model import Strict
from upturn.numerics import sum_by_sample
from upturn.objectives._base import CONTEXTS, SIDES, Batch, Context, Loss, Row, Side, _row


class Config(Strict):
    """Weights of the contexts."""

    direct: float = Field(default=1.0, ge=0)
    """Weight of answering the question directly."""
    improve: float = Field(default=1.0, ge=0)
    """Weight of refining the worse draft into the better one."""
    keep: float = Field(default=0.0, ge=0)
    """Weight of repeating the better draft when it is shown."""
    critique: float = Field(default=0.0, ge=0)
    """Weight of saying what the verifier says of either draft."""

    @model_validator(mode="after")
    def _something_is_learnt(self) -> Config:
        if not _weights(self):
            raise ValueError("every weight is 0, so nothing would be learnt: set one of them above 0")
        return self


def _weights(cfg: Config) -> dict[Row, float]:
    sides: dict[Context, Sequence[Side]] = {"critique": SIDES}
    rows: list[Row] = [(context, side) for context in CONTEXTS for side in sides.get(context, ("chosen",))]
    return {(context, side): w for context, side in rows if (w := getattr(cfg, context)) > 0}


def needs(cfg: Config) -> frozenset[Row]:
    """Chosen answers in the weighted contexts, and both critiques."""
    return frozenset(_weights(cfg))


def uses_reference(cfg: Config) -> bool:
    """Never."""
    return False


def loss(logprobs_N: Tensor, batch: Batch, cfg: Config) -> Loss:
    """Weighted NLL over target tokens."""
    total_P, weight_P, metrics = by_pair(logprobs_N, batch, cfg)
    return Loss(total_P.sum(), float(weight_P.sum()), metrics)


def by_pair(logprobs_N: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Each pair's weighted NLL and its weighted number of tokens, both `[P]`, and the metrics of the batch."""
    logprobs_S = sum_by_sample(logprobs_N, batch.owner_N, len(batch.num_tokens_S))
    total_P = logprobs_N.new_zeros(batch.num_pairs)
    weight_P = torch.zeros_like(total_P)
    metrics: dict[str, Tensor] = {}
    for (context, side), w in _weights(cfg).items():
        rows_P = _row(batch, context, side)
        total_P = total_P - w * logprobs_S[rows_P]  # eq. 4
        weight_P = weight_P + w * batch.num_tokens_S[rows_P]
        metrics[f"{context}/logps/{side}"] = logprobs_S[rows_P].detach().sum()
    return total_P, weight_P, metrics
