"""A decoder layer of the common kind that learns on CUDA: two compiled halves, and the plan's attention between them.

It keeps what enters the two norms and, where memory allows it, the inputs of the gate; queries, keys, values and what
they attended to are kept by the attention. The forward pass is the same compiled code with gradients and without, so
that log-probs of policy and reference have the same bits: torch would compile another graph for each. Axes: `T` tokens,
`d` width of the model, `D` width of a head.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upturn.models import _common, _compiled, _compiled_math
from upturn.models._attention import How
from upturn.models._layer_weights import Eps, Weights, weights_of


@dataclass(frozen=True, slots=True)
class _Halves:
    """The functions of all layers of one shape, and what is compiled into them."""

    enter: Any
    enter_back: Any
    leave: Any
    leave_back: Any
    eps: Eps
    width: int
    """Of a head."""


class Compiled:
    """The forward of one layer."""

    __slots__ = ("_halves", "_how", "_layer", "keeps_gates", "weights")

    def __init__(self, layer: Any, how: How, *, is_compiled: bool = True) -> None:
        self._layer, self._how, self.keeps_gates = layer, how, True
        self.weights, eps = weights_of(layer)
        shapes = tuple(None if weight is None else weight.shape for weight in self.weights)
        key = (shapes, self.weights.q.dtype, eps, layer.self_attn.head_dim)
        math = _compiled_math
        works = (math.enter, math.enter_back, math.leave, math.leave_back)
        enter, enter_back, leave, leave_back = (
            _compiled.function(work, *key) if is_compiled else work for work in works
        )
        self._halves = _Halves(enter, enter_back, leave, leave_back, eps, layer.self_attn.head_dim)

    def apart(self) -> Compiled:
        """The same layer over leaves of its own, see `Weights`."""
        other = copy.copy(self)
        other.weights = self.weights.apart()
        return other

    def gates_bytes(self, tokens: int) -> int:
        """What the inputs of the gate take."""
        return self.weights.gates_bytes(tokens)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _common.is_usual(self._layer, hidden_states, kwargs):
            return _common.plain(self._layer, hidden_states, *args, **kwargs)
        cos, sin = kwargs["position_embeddings"]
        x, weights, halves = hidden_states[0], self.weights, self._halves
        q, k, v, x = _Enter.apply(x, (cos[0], sin[0]), halves, *weights)  # type: ignore[misc]
        attended = kwargs["upturn_plan"].attend(self._layer.self_attn.layer_idx, q, k, v, self._how)
        out = _Leave.apply(x, attended.reshape(len(x), -1), halves, self.keeps_gates, *weights)
        return out[None]  # type: ignore[index]


class _Enter(torch.autograd.Function):
    """`x [T, d]` -> queries, keys and values `[1, H, T, D]`, and `x` again: its gradients meet here, in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, around: tuple[Tensor, Tensor], halves: _Halves, *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        q, k, v, raw = halves.enter(*_varying(x, *around), _bare(weights), halves.eps, halves.width)
        ctx.halves = halves
        ctx.save_for_backward(x, raw, *around, *weights)
        return *(part.transpose(0, 1)[None].detach() for part in (q, k, v)), x

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, raw, cos, sin, *weights = ctx.saved_tensors
        around = _varying(cos, sin)
        x, raw = _varying(x, raw)
        more = (_bare(weights), ctx.halves.eps, ctx.needs_input_grad[3:])
        by_token = (*(g[0].transpose(0, 1).contiguous() for g in gs[:3]), gs[3].contiguous())
        g_x, grads = ctx.halves.enter_back(_varying(*by_token), x, raw, around, *more)
        return g_x, None, None, *grads


class _Leave(torch.autograd.Function):
    """`x [T, d]` and what was attended to, `[T, H D]` -> `[T, d]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, attended: Tensor, halves: _Halves, keeps_gates: bool, *weights: Tensor | None
    ) -> Tensor:
        out, middle, gate, up = halves.leave(*_varying(x, attended), _bare(weights), halves.eps)
        ctx.halves, gates = halves, (gate, up) if keeps_gates else (None, None)
        ctx.save_for_backward(middle, attended, *gates, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        middle, attended, gate, up, *weights = ctx.saved_tensors
        gates = None if gate is None else _varying(gate, up)
        more = (_bare(weights), ctx.halves.eps, ctx.needs_input_grad[4:])
        g_x, g_attended, grads = ctx.halves.leave_back(*_varying(g.contiguous(), middle, attended), gates, *more)
        return g_x, g_attended, None, None, *grads


def _bare(weights: Any) -> Weights:
    """Without their history: whether a weight learns must not tell one compiled function from another."""
    return Weights(*(None if weight is None else weight.detach() for weight in weights))  # type: ignore[arg-type]


def _varying(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The same without their history; their first axis counts tokens."""
    bare = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    _compiled.by_tokens(*bare)
    return bare
