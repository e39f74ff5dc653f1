"""Decoder layers that learn, in fewer passes over memory and with less of it kept.

The counterpart of `fused` for log-probs of trees: the same kind of layer. On a CPU each is one autograd function over
kernels (`_fused_layer`), on CUDA two compiled halves around the attention (`_compiled_layer`).
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
from upturn.models import _attention, _common, _graphed, _kept, _memory, _slow, fused
from upturn.models._attention import How
from upturn.models._compiled_layer import Compiled
from upturn.models._fused_layer import Fused
from upturn.models._tree_plan import TreePlan
from upturn.models.native import back
from upturn.types import Sample

NEAR = 0.2
"""How far bfloat16 kernels may be from exact ones, relative to the largest number: one that errs is further."""

KINDS: dict[str, type[Fused] | type[Compiled]] = {"cpu": Fused, "cuda": Compiled}
"""What common layers compute with, by device."""


@contextmanager
def fused_training(model: nn.Module, plan: TreePlan) -> Iterator[None]:
    """Inside, the forward pass of common layers is fused where the plan is that of the device. The backward pass may
    follow outside."""
    _attention.use_plans(model)
    device = plan.tree.ids_T.device
    is_other = plan.flex and device.type == "cpu"
    known = {} if is_other else {layer: how for layer in _common.layers_of(model) if (how := _fusable(layer))}
    layers: list[Any] = [*known]
    _slow.tell(model, (layer for layer in _common.layers_of(model) or [model] if layer not in known))
    tokens = len(plan.tree.ids_T)
    made = [KINDS[device.type](layer, known[layer]) for layer in layers]
    keeps_gates = _memory.may_keep(sum(one.gates_bytes(tokens) for one in made), device)
    for one in made:
        one.keeps_gates = keeps_gates
    if torch.is_grad_enabled():
        _lay_out([one for one in made if isinstance(one, Fused)], tokens)
    forwards: dict[Any, Any] = dict(zip(layers, made, strict=True))
    is_whole = len(made) == len(_common.layers_of(model)) and _graphed.may_capture(model, tokens, device)
    whole = [one for one in made if isinstance(one, Compiled)] if is_whole else []
    if stack := _graphed.stacked(whole, [*known.values()]):
        forwards = dict.fromkeys(layers, _graphed.same) | {layers[0]: stack}
    with _common.swapped(forwards):
        yield


def _lay_out(layers: list[Fused], tokens: int) -> None:
    """Give each layer the memory for what it keeps."""
    for one, piece in zip(layers, _kept.pieces([one.kept_bytes(tokens) for one in layers]), strict=True):
        one.piece = piece


def _fusable(layer: nn.Module) -> How | None:
    """How a common layer attends, if it was found to compute the same, gradients too."""
    device = next((weight.device.type for weight in layer.parameters()), "")
    kind = KINDS.get(device)
    if kind is None or not _common.is_common(layer):
        return None
    width: int = layer.self_attn.head_dim  # type: ignore[union-attr,assignment]
    if kind is Fused and (not fused.has_kernels(layer) or width > back.MOST_WIDTH):
        return None
    seen = _SEEN.setdefault(layer, {})
    if device not in seen:
        seen[device] = _computes_the_same(layer, kind)
    return seen[device]


_SEEN: WeakKeyDictionary[nn.Module, dict[str, How | None]] = WeakKeyDictionary()
"""By layer and device."""


def _computes_the_same(layer: nn.Module, kind: type[Fused] | type[Compiled]) -> How | None:
    """Both ways on a tree of two branches: the output, and the gradients of input and weights.

    Exactly, since the rounding of bfloat16 changes some gradients as much as another kind of layer would: in fp32, and
    in fp64 on CUDA, where products of fp32 may round like ten bits. What kernels give in the layer's own type need only
    come near that. Functions are tried before they are compiled.
    """
    with torch.inference_mode(False), torch.enable_grad():
        is_compiled = issubclass(kind, Compiled)
        exact = _common.tried(lambda: copy.deepcopy(layer).to(torch.float64 if is_compiled else torch.float32))
        how = None if exact is None else _common.asked_by(exact)
        if exact is None or how is None or (how.softcap and not is_compiled):
            return None
        tree = trees.build([Sample((0,), (1, 2)), Sample((0,), (3, 4))])
        plan = TreePlan(tree.to(next(layer.parameters()).device), flex=False)
        plain = _learnt(exact, partial(_common.plain, exact), plan)
        same = _learnt(exact, Compiled(exact, how, is_compiled=False) if is_compiled else Fused(exact, how), plan)
        has_own = not is_compiled and next(layer.parameters()).dtype != torch.float32
        own = _learnt(layer, Fused(layer, how), plan) if has_own else same
    if not plain or not same or not own or not all(map(_common.close, plain, same)):
        return None
    return how if all(map(_near, same, own)) else None


def _near(exact: Tensor, own: Tensor) -> bool:
    return bool((exact - own).abs().max() <= NEAR * exact.abs().max())


def _learnt(layer: nn.Module, forward: Any, plan: TreePlan) -> list[Tensor] | None:
    """The output, and the gradients of its sum of squares; None where it fails."""
    x, around = _common.probe(layer)
    inputs = [x.clone().requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]

    def work() -> list[Tensor]:
        out = forward(inputs[0], **around, upturn_plan=plan)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]

    return _common.tried(work)
