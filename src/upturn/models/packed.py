"""Linear layers over packed weights, for the time of a generation on a CPU.

oneDNN brings a plain bfloat16 weight into blocks before it multiplies, anew in every call. Weights that lie in blocks
already save that: 1.8 times as fast at one row, 1.2 times at 64, 1.1 times at thousands (AMD EPYC with avx512_bf16, one
thread). The kernels behind both are the same, and so are the results, to the bit (compared there).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

PATIENCE = 16
"""Plain calls of a layer before its weight is packed. Packing costs what some 30 calls save: short runs go without."""
TINY = 16**3
"""Products of so few multiplications torch does itself, in another order: weights this small stay plain."""

NEEDED = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported", "_is_mkldnn_acl_supported")
"""Operators of torch, those that its compiler uses for frozen weights. They are not documented, so they may go."""


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers called more than `PATIENCE` times compute from a packed copy of their weights.

    The copies go when the block ends, so they are never older than the block; weights must not change within it. They
    take as much memory as the weights of these layers. Where packing brings nothing (other devices, other types, layers
    with a forward of their own), the model stays as it is.
    """
    layers = [layer for layer in model.modules() if _is_plain(layer)] if available() else []
    for layer in layers:
        layer.forward = _Packed(cast(nn.Linear, layer))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def available() -> bool:
    """Whether this CPU and this build of torch multiply packed bfloat16 weights."""
    known = cast(Any, torch.ops.mkldnn)
    if not torch.backends.mkldnn.is_available() or not all(hasattr(known, name) for name in NEEDED):
        return False
    return known._is_mkldnn_bf16_supported() and not known._is_mkldnn_acl_supported()


class _Packed:
    """The forward of one layer, which packs its weight when that is worth it."""

    __slots__ = ("_calls", "_layer", "_weight")

    def __init__(self, layer: nn.Linear) -> None:
        self._layer, self._calls = layer, 0
        self._weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        layer = self._layer
        if self._weight is None:
            if self._calls < PATIENCE:
                self._calls += 1
                return nn.functional.linear(x, layer.weight, layer.bias)
            self._weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, layer.bias, "none", [], "")


def _is_plain(layer: nn.Module) -> bool:
    """A bfloat16 linear layer as torch made it; one that was adapted or quantised computes something else."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.numel() > TINY
