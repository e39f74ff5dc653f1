"""What objectives share: the batch they read, the loss they return, and gains over the reference.

A pair (chosen, rejected) gives samples in four contexts:

    direct     x            the question alone
    improve    x, rejected  the draft shown is the worse one: improve it, do not repeat it
    keep       x, chosen    the draft shown is the better one: keep it, do not degrade it
    critique   x, the draft the answer is the verifier's critique of that draft

Where an objective needs the last one, the drafts of the other contexts are shown with their critiques.

An objective on pairs names the (context, answer) rows it needs; only those are computed. An objective on groups needs
no rows: it reads every draft in the context in which it was sampled, with the number that a selection rule gave it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from upturn.numerics import sum_by_sample

Context = Literal["direct", "improve", "keep", "critique"]
Side = Literal["chosen", "rejected"]
Row = tuple[Context, Side]
CONTEXTS: tuple[Context, ...] = ("direct", "improve", "keep", "critique")
SIDES: tuple[Side, ...] = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of some pairs, or of some groups. Axes: `N` target tokens, `S` samples, `P` pairs."""

    owner_N: Tensor
    """Sample of each target token."""
    num_tokens_S: Tensor
    """Target tokens of each sample."""
    rows: dict[Row, Tensor]
    """Sample of each pair in a role, `[P]`; empty for groups."""
    p_P: Tensor
    """Probability that chosen is better; 1 is a hard label."""
    reference_S: Tensor | None = None
    """Summed log-prob of each sample under the reference."""
    reference_N: Tensor | None = None
    """The same for each target token."""
    old_N: Tensor | None = None
    """Log-prob of each target token under the model as it was before this training, which sampled the drafts."""
    value_S: Tensor | None = None
    """The number that a selection rule gave each draft of a group."""
    turn_S: Tensor | None = None
    """Turn of each draft of a group, from 1."""
    group_S: Tensor | None = None
    """Group of each draft, from 0."""

    @property
    def num_pairs(self) -> int:
        """Pairs in the batch."""
        return len(self.p_P)


@dataclass(frozen=True, slots=True)
class Loss:
    """A sum and its weight. Only the trainer divides, once per optimizer step."""

    total: Tensor
    weight: float
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the same weight."""

    def detached(self) -> Loss:
        """The same numbers, that no gradient can be asked of."""
        return Loss(self.total.detach(), self.weight, {name: sum_.detach() for name, sum_ in self.metrics.items()})


class Objective(Protocol):
    """An objective file holds `Config` and these functions; one that reads `batch.old_N` sets `USES_OLD = True`."""

    def needs(self, cfg: object) -> frozenset[Row] | None:
        """Rows of pairs that must be in the batch; None where it learns from groups."""
        ...

    def uses_reference(self, cfg: object) -> bool:
        """Whether `batch.reference_S` and `batch.reference_N` must be there."""
        ...

    def loss(self, logprobs_N: Tensor, batch: Batch, cfg: object) -> Loss:
        """The loss of a batch."""
        ...


def gains(logprobs_N: Tensor, batch: Batch) -> Tensor:
    """`l(y|c) = log policy(y|c) - log reference(y|c)`, summed over the tokens of each sample, `[S]`."""
    if batch.reference_S is None:
        raise ValueError("this objective needs reference log-probs, and the batch has none")
    return sum_by_sample(logprobs_N, batch.owner_N, len(batch.num_tokens_S)) - batch.reference_S


def margin(values_S: Tensor, batch: Batch, context: Context) -> Tensor:
    """`value(chosen) - value(rejected)` in one context, `[P]`."""
    return values_S[_row(batch, context, "chosen")] - values_S[_row(batch, context, "rejected")]


def values(batch: Batch) -> Tensor:
    """The number of each draft of a group, `[S]`."""
    if batch.value_S is None:
        raise ValueError("this objective learns from groups of drafts, and the batch holds pairs")
    return batch.value_S


def _row(batch: Batch, context: Context, side: Side) -> Tensor:
    if (context, side) not in batch.rows:
        raise ValueError(f"this objective needs the {side} answer in the {context} context, and the batch has none")
    return batch.rows[context, side]
