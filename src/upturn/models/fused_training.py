"""Decoder layers that learn, in fewer passes over memory and with less of it kept, for training on a CPU.

The counterpart of `fused` for log-probs of trees: the same kind of layer, one autograd function each (`_fused_layer`).
The inputs of the gate are computed again in the backward pass where memory is short: they are half of what a layer
holds and a twelfth of a step. Either way gives the same bits. Every weight stays a parameter and gets its own gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from upturn import trees
from upturn.models import _attention, _kept, _memory, _slow, fused
from upturn.models._attention import How
from upturn.models._fused_layer import Fused
from upturn.models._tree_plan import TreePlan
from upturn.models.native import back
from upturn.types import Sample

SHARE_OF_FREE = 8
"""The inputs of all gates may take one part in so many of the memory that is free."""
NEAR = 0.2
"""How far bfloat16 kernels may be from exact ones, relative to the largest number: one that errs is further."""


@contextmanager
def fused_training(model: nn.Module, plan: TreePlan) -> Iterator[None]:
    """Inside, the forward pass of common layers is fused where the plan is that of a CPU. The backward pass may follow
    outside."""
    _attention.use_plans(model)
    known = {} if plan.flex else {layer: how for layer in fused.layers_of(model) if (how := _fusable(layer))}
    layers: list[Any] = [*known]
    _slow.tell(model, (layer for layer in fused.layers_of(model) or [model] if layer not in known))
    tokens = len(plan.tree.ids_T)
    made = [Fused(layer, known[layer]) for layer in layers]
    keeps_gates = SHARE_OF_FREE * sum(one.gates_bytes(tokens) for one in made) <= _memory.free()
    for one in made:
        one.keeps_gates = keeps_gates
    if torch.is_grad_enabled():
        for one, piece in zip(made, _kept.pieces([one.kept_bytes(tokens) for one in made]), strict=True):
            one.piece = piece
    for layer, one in zip(layers, made, strict=True):
        layer.forward = one
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _fusable(layer: nn.Module) -> How | None:
    """How a common layer attends, if it was found to compute the same, gradients too."""
    if not fused.has_kernels(layer) or layer.self_attn.head_dim > back.MOST_WIDTH:  # type: ignore[union-attr,operator]
        return None
    if layer not in _SEEN:
        _SEEN[layer] = _computes_the_same(layer)
    return _SEEN[layer]


_SEEN: WeakKeyDictionary[nn.Module, How | None] = WeakKeyDictionary()


def _computes_the_same(layer: nn.Module) -> How | None:
    """Both ways on a tree of two branches: the output, and the gradients of input and weights.

    In fp32, since the rounding of bfloat16 changes some gradients as much as another kind of layer would. What the
    layer's own type gives need only come near that.
    """
    with torch.inference_mode(False), torch.enable_grad():
        exact = fused.tried(lambda: copy.deepcopy(layer).float())
        how = None if exact is None else fused.asked_by(exact)
        if exact is None or how is None or how.softcap:
            return None
        plan = TreePlan(trees.build([Sample((0,), (1, 2)), Sample((0,), (3, 4))]), flex=False)
        plain = _learnt(exact, partial(fused.plain, exact), plan)
        same = _learnt(exact, Fused(exact, how), plan)
        is_exact = next(layer.parameters()).dtype == torch.float32
        own = same if is_exact else _learnt(layer, Fused(layer, how), plan)
    if not plain or not same or not own or not all(map(fused.close, plain, same)):
        return None
    return how if all(map(_near, same, own)) else None


def _near(exact: Tensor, own: Tensor) -> bool:
    return bool((exact - own).abs().max() <= NEAR * exact.abs().max())


def _learnt(layer: nn.Module, forward: Any, plan: TreePlan) -> list[Tensor] | None:
    """The output, and the gradients of its sum of squares; None where it fails."""
    x, around = fused.probe(layer)
    inputs = [x.clone().requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]

    def work() -> list[Tensor]:
        out = forward(inputs[0], **around, upturn_plan=plan)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]

    return fused.tried(work)
