"""Memory for what the layers of a training keep until their backward pass.

It is taken for all layers at once, before the first one computes: pieces that are taken one by one, between others that
come and go, leave holes that nothing fits into, a fifth of what a training step needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEP = 64
"""Bytes that every tensor begins at a multiple of."""


class Piece:
    """One layer's memory. It is free again when no tensor in it is left."""

    __slots__ = ("_memory", "_taken")

    def __init__(self, memory: Tensor | None = None) -> None:
        self._memory, self._taken = memory, 0

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """A tensor of this shape in the piece, of the type of `like`; in memory of its own where there is no room."""
        size = torch.Size(shape).numel() * like.element_size()
        if self._memory is None or self._taken + size > len(self._memory):
            return like.new_empty(shape)
        part = self._memory[self._taken : self._taken + size]
        self._taken += _room(size)
        return part.view(like.dtype).view(shape)

    def close(self) -> None:
        """Nothing more is taken."""
        self._memory = None


def pieces(sizes: Sequence[Sequence[int]]) -> list[Piece]:
    """For each layer one that has room for tensors of so many bytes."""
    return [Piece(torch.empty(sum(map(_room, layer)), dtype=torch.uint8)) for layer in sizes]


def _room(size: int) -> int:
    """Bytes that a tensor of so many takes with what is left free behind it."""
    return -(-size // STEP) * STEP
