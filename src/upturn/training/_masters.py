"""The fp32 value behind a weight, in as few bytes as it takes.

A bf16 weight is its master rounded, so it holds the upper half already: beside it only the lower 16 bits are kept. An
fp32 weight is its own master. Where there are no kernels that read this, a full copy is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from upturn.models.native import ops


@dataclass(frozen=True, slots=True)
class Master:
    """A weight and what its fp32 value needs besides."""

    weight: Tensor
    rest: Tensor | None
    """int16: the lower half of the value's bits; fp32: the value itself; None: the weight is the value."""
    native: bool
    """Whether kernels update it."""

    def value(self) -> Tensor:
        """In fp32; a copy where it is kept in halves."""
        if self.rest is None or self.rest.dtype == torch.float32:
            return self.weight.detach() if self.rest is None else self.rest
        low = self.rest.to(torch.int32) & 0xFFFF
        high = self.weight.detach().view(torch.int16).to(torch.int32) - (low > 0x8000).to(torch.int32)
        return ((high << 16) | low).view(torch.float32)

    @torch.no_grad()
    def set(self, value: Tensor) -> None:
        """Take over a value; the weight follows. A value halfway between two weights moves by one last bit."""
        if self.rest is not None and self.rest.dtype == torch.int16:
            bits = value.view(torch.int32)
            bits = torch.where(bits & 0xFFFF == 0x8000, bits | 1, bits)
            value = bits.view(torch.float32)
            self.rest.copy_(bits.to(torch.int16))
        elif self.rest is not None:
            self.rest.copy_(value)
        self.weight.copy_(value)


def master_of(weight: Tensor) -> Master:
    """The master of a weight as it is now."""
    if not (ops.usable(weight) and weight.is_contiguous()):
        return Master(weight, weight.detach().to(torch.float32, copy=True), native=False)
    return Master(weight, torch.zeros_like(weight, dtype=torch.int16) if weight.dtype == torch.bfloat16 else None, True)
