"""Linear layers over packed weights, for the time of a generation on a CPU.

Our own product takes them (`native/product.c`) where it was compiled, and a row's result never depends on its
neighbours there. In bfloat16 it is twice as fast as oneDNN's with few rows and 1.0 to 1.2 times with hundreds, on
matrix tiles (AMX) and with AVX-512's instructions for bfloat16; without either 2.5 to 8 times. In float32 it is 3 times
as fast as torch's with 1 to 16 rows, 2 times with 64. Elsewhere oneDNN's takes bfloat16.

oneDNN brings a plain bfloat16 weight into blocks before it multiplies, anew in every call. Weights that lie in blocks
already save that: 1.8 times as fast at one row, 1.2 times at 64, 1.1 times at thousands (AMD EPYC with avx512_bf16, one
thread). The kernels behind both are the same, and so are the results, to the bit (compared there).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from upturn.models.native import ops

PATIENCE = 2
"""Plain calls of a layer before its weight is packed for oneDNN: that costs what some 30 calls save. To pack it for our
own product costs less than one call, and saves up to half of it."""
TINY = 16**3
"""Products of so few multiplications torch does itself, in another order: weights this small stay plain."""

NEEDED = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_acl_supported")
"""Operators of torch, those that its compiler uses for frozen weights. They are not documented, so they may go."""


@contextmanager
def packed(model: nn.Module, besides: Collection[nn.Module] = ()) -> Iterator[None]:
    """Inside, linear layers compute from a packed copy of their weights, for oneDNN from the third call on.

    The copies go when the block ends, so they are never older than the block; weights must not change within it. They
    take as much memory as the weights of these layers. Where packing brings nothing (other devices, other types, layers
    with a forward of their own) and within the parts `besides`, the model stays as it is.
    """
    others = {part for whole in besides for part in whole.modules()}
    plain = (layer for layer in model.modules() if layer not in others and is_plain(layer))
    layers = [layer for layer in cast(Iterator[nn.Linear], plain) if _pays(layer.weight)]
    for layer in layers:
        layer.forward = _Packed(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def available() -> bool:
    """Whether this CPU and this build of torch multiply packed bfloat16 weights."""
    known = cast(Any, torch.ops.mkldnn)
    is_whole = ops.onednn_has_bf16() and all(hasattr(known, name) for name in NEEDED)
    return is_whole and not known._is_mkldnn_acl_supported()


class Product:
    """`x @ weight.T + bias` of linear layers that share their input, side by side, packed where that pays."""

    __slots__ = ("_rows", "_weight", "bias", "panels")

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight = _joined([layer.weight for layer in layers])
        biases = biases_of(layers)
        self._rows, self.bias = len(weight), _joined(biases) if biases else None
        self.panels = ops.packed(weight) if _is_ours(weight) else None
        if self.panels is None and _suits_onednn(weight):
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._weight = weight if self.panels is None else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.panels is not None:
            out = ops.product(x.reshape(-1, x.shape[-1]), self.panels, self._rows, self.bias)
            return out.view(*x.shape[:-1], self._rows)
        assert self._weight is not None
        if self._weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return nn.functional.linear(x, self._weight, self.bias)


class Gated:
    """SiLU of one linear layer times another one over the same input, `[T, d] -> [T, f]`."""

    __slots__ = ("_both", "_rows", "bias", "panels")

    def __init__(self, gate: nn.Linear, up: nn.Linear) -> None:
        biases, fits = biases_of((gate, up)), _is_ours(gate.weight) and gate.out_features % (ops.PANEL // 2) == 0
        self.panels = ops.packed(_by_turns(gate.weight, up.weight)) if fits else None
        self._rows, self.bias = 2 * gate.out_features, _by_turns(*biases) if biases and fits else None
        self._both = Product((gate, up)) if self.panels is None else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.panels is not None:
            return ops.product(x, self.panels, self._rows, self.bias, gated=True)
        assert self._both is not None
        return ops.silu_mul(self._both(x))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])


def _by_turns(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of both, half a panel of the one before half a panel of the other."""
    halves = [part.detach().unflatten(0, (-1, ops.PANEL // 2)) for part in (gate, up)]
    return torch.stack(halves, 1).flatten(0, 2)


def biases_of(layers: Sequence[nn.Linear]) -> list[Tensor]:
    """Those of all layers, 0 where one has none; nothing where none has one."""
    known: list[Tensor | None] = [layer.bias for layer in layers]
    missing = [layer.weight.new_zeros(layer.out_features) for layer in layers]
    filled = [zeros if bias is None else bias for bias, zeros in zip(known, missing, strict=True)]
    return [] if all(bias is None for bias in known) else filled


class _Packed:
    """The forward of one layer, which packs its weight when that is worth it."""

    __slots__ = ("_calls", "_layer", "_product")

    def __init__(self, layer: nn.Linear) -> None:
        self._layer, self._calls = layer, 0
        self._product: Product | None = None

    def __call__(self, input: Tensor) -> Tensor:
        layer = self._layer
        if self._product is None:
            if self._calls < PATIENCE and not _is_ours(layer.weight):
                self._calls += 1
                return nn.functional.linear(input, layer.weight, layer.bias)
            self._product = Product([layer])
        return self._product(input)


def is_plain(layer: nn.Module) -> bool:
    """A linear layer as torch made it; one that was adapted or quantised computes something else."""
    return type(layer) is nn.Linear and "forward" not in layer.__dict__


def _pays(weight: Tensor) -> bool:
    return _is_ours(weight) or _suits_onednn(weight)


def _is_ours(weight: Tensor) -> bool:
    return weight.numel() > TINY and ops.fits(weight)


def _suits_onednn(weight: Tensor) -> bool:
    is_bf16 = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    return is_bf16 and weight.numel() > TINY and available()
