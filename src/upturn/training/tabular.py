"""A policy that is a table: exact probabilities of a few answers, so that expectations and fixed points are exact.

A context is a row of the table and an answer a column; an answer is one token. Row 0 is the question alone. Row 1 + a,
where a table has it, is the question with answer a shown. Every objective reads a table as it reads a language model:

    policy = TabularPolicy(start_CA)
    draws = [Draw(0, answer, value=reward[answer]) for answer in range(3)]
    loss = sppo.loss(*of_groups(policy, [draws]), sppo.Config(eta=1))

Three readings of one table are kept apart: `policy` learns, `reference` and `old` do not; both are the start unless
they are given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from upturn.objectives._base import Batch, Context, Row
from upturn.training import rows

DIRECT = 0
"""The context in which nothing is shown."""
View = tuple[Tensor, Batch]
"""Log-probs of target tokens and the batch that says whose they are: what an objective takes."""


def shown(answer: int) -> int:
    """The context in which one answer is shown."""
    return 1 + answer


class TabularPolicy(nn.Module):
    """A softmax over `A` answers in each of `C` contexts, with the table that it starts from."""

    start_CA: Tensor

    def __init__(self, start_CA: Tensor) -> None:
        """`start_CA` holds probabilities above 0, each row summing to 1."""
        super().__init__()
        self.logits_CA = nn.Parameter(start_CA.log())
        self.register_buffer("start_CA", start_CA.clone())

    def forward(self) -> Tensor:
        """Log-probabilities, `[C, A]`."""
        return self.logits_CA.log_softmax(-1)

    def probs(self) -> Tensor:
        """The table as it is now, detached, `[C, A]`."""
        return self().detach().exp()


@dataclass(frozen=True, slots=True)
class Draw:
    """An answer drawn in a context: the draft of a group."""

    context: int
    answer: int
    value: float
    turn: int = 1


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers and the probability that the chosen one is better: a pair."""

    chosen: int
    rejected: int
    p: float = 1.0


def of_groups(
    policy: TabularPolicy,
    groups: Sequence[Sequence[Draw]],
    reference_CA: Tensor | None = None,
    old_CA: Tensor | None = None,
) -> View:
    """Groups of draws as an objective on groups reads them. Tables are probabilities; None is the start."""
    flat = [draw for group in groups for draw in group]
    cells = torch.tensor([draw.context for draw in flat]), torch.tensor([draw.answer for draw in flat])
    reference_S = _or_start(policy, reference_CA).log()[cells]
    number = [place for place, group in enumerate(groups) for _ in group]
    batch = Batch(
        **_one_token_each(len(flat)),
        rows={},
        p_P=policy.start_CA.new_zeros(0),
        reference_S=reference_S,
        reference_N=reference_S,
        old_N=_or_start(policy, old_CA).log()[cells],
        value_S=policy.start_CA.new_tensor([draw.value for draw in flat]),
        turn_S=torch.tensor([draw.turn for draw in flat]),
        group_S=torch.tensor(number),
    )
    return policy()[cells], batch


def of_pairs(
    policy: TabularPolicy, pairs: Sequence[Preference], needs: frozenset[Row], reference_CA: Tensor | None = None
) -> View:
    """Pairs as an objective with these needs reads them. `reference_CA` is probabilities; None is the start."""
    order = rows.order(needs)
    flat = [(_context(pair, context), getattr(pair, side)) for pair in pairs for context, side in order]
    cells = torch.tensor([context for context, _ in flat]), torch.tensor([answer for _, answer in flat])
    reference_S = _or_start(policy, reference_CA).log()[cells]
    batch = Batch(
        **_one_token_each(len(flat)),
        rows={row: torch.arange(len(pairs)) * len(order) + place for place, row in enumerate(order)},
        p_P=policy.start_CA.new_tensor([pair.p for pair in pairs]),
        reference_S=reference_S,
        reference_N=reference_S,
    )
    return policy()[cells], batch


def every_group(probs_A: Tensor, size: int) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Every tuple of `size` independent answers with its probability: `A ** size` of them."""
    for answers in itertools.product(range(len(probs_A)), repeat=size):
        yield float(probs_A[list(answers)].prod()), answers


def expected(objective: ModuleType, cfg: Any, cases: Iterable[tuple[float, View]]) -> Tensor:
    """Expectation of an objective's total over weighted cases."""
    totals = [weight * objective.loss(*view, cfg).total for weight, view in cases]
    return torch.stack(totals).sum()


def minimise(policy: TabularPolicy, loss: Callable[[], Tensor], steps: int = 200) -> None:
    """Bring the table to a minimum of a loss with finite targets, by L-BFGS; in float64 to about 1e-8."""
    optimizer = torch.optim.LBFGS(
        policy.parameters(), max_iter=steps, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]


def _context(pair: Preference, context: Context) -> int:
    return {"direct": DIRECT, "improve": shown(pair.rejected), "keep": shown(pair.chosen)}[context]


def _or_start(policy: TabularPolicy, table_CA: Tensor | None) -> Tensor:
    return policy.start_CA if table_CA is None else table_CA


def _one_token_each(samples: int) -> dict[str, Tensor]:
    return {"owner_N": torch.arange(samples), "num_tokens_S": torch.ones(samples, dtype=torch.long)}
