"""Tables of three answers for the tests of fixed points."""

from __future__ import annotations

import torch
from torch import Tensor

from upturn.training.tabular import TabularPolicy

REFERENCE_A = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
REWARD_A = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)
WINS_AA = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
"""`p(a > b)`, in a circle: no rewards explain it."""
ANSWERS = range(3)


def one_row(probs_A: Tensor = REFERENCE_A) -> TabularPolicy:
    """A table with the direct context only."""
    return TabularPolicy(probs_A[None])


def whole_table() -> TabularPolicy:
    """The direct context, and one for each answer shown."""
    generator = torch.Generator().manual_seed(3)
    return TabularPolicy(normalised(0.1 + torch.rand(4, 3, generator=generator, dtype=torch.float64)))


def normalised(weights: Tensor) -> Tensor:
    """Rows that sum to 1."""
    return weights / weights.sum(-1, keepdim=True)


def same(found: Tensor, expected: Tensor, atol: float = 1e-7) -> None:
    """Equal up to an absolute error."""
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
