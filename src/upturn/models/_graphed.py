"""All layers of a small model as two CUDA graphs, one for each direction.

A layer of a small model is done in less time than it takes to launch its kernels one by one. So where a number of
tokens comes again (`padded` leaves few different ones), what the layers do is captured, and launched at once from then
on. What changes from one batch to the next is copied to where the graphs look for it. The same kernels run either way.

Axes: `T` tokens, `d` width of the model, `D` width of a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from upturn import trees
from upturn.models import _common, _flex, _slow
from upturn.models._attention import How
from upturn.models._capture import Pool
from upturn.models._compiled_layer import Compiled
from upturn.trees import TokenTree

SMALL = 1e12
"""Operations of a layer, forward and back, up to which launching takes longer: 2 ms of a GPU that does 500 TFLOP/s."""
SEEN = 2
"""The batch of a size with which it is captured: those before it have compiled and warmed all that it needs."""
STEPS = 8
"""Sizes between a power of 2 and the next."""
LEAST = 128
"""Smallest difference of two sizes: a block of FlexAttention."""
_Around = tuple[Tensor, Tensor, TokenTree]
_Batch = tuple[Tensor, Tensor, Tensor, TokenTree]
_OPEN: list[Graphs] = []


@contextmanager
def kept() -> Iterator[None]:
    """Inside, layers are captured; graphs, and the memory of what their layers keep, last until the block ends."""
    _OPEN.append(Graphs())
    try:
        yield
    finally:
        _OPEN.pop().made.clear()  # they know each other: else their memory would wait for a search for such circles


def padded(tree: TokenTree, model: nn.Module) -> TokenTree:
    """The tree with tokens that nobody sees behind it, up to one of few sizes, where layers may be captured."""
    size = len(tree.ids_T)
    step = step_of(size)
    whole = -(-size // step) * step
    return trees.filled(tree, whole) if _OPEN and may_capture(model, whole, tree.ids_T.device) else tree


def may_capture(model: nn.Module, tokens: int, device: torch.device) -> bool:
    """Whether the layers of a model are of a kind that is captured, and small enough. The same for policy and
    reference."""
    layers = _common.layers_of(model)
    if device.type != "cuda" or not layers or not _common.is_common(layers[0]):
        return False
    return 6 * tokens * sum(weight.numel() for weight in layers[0].parameters()) <= SMALL


def step_of(size: int) -> int:
    """What the number of tokens becomes a multiple of."""
    return max(LEAST, 2 ** (size.bit_length() - 1) // STEPS)


def stacked(layers: Sequence[Compiled], hows: Sequence[How]) -> Stack | None:
    """All layers as one; None where nothing is captured, or a layer has a window, which not every batch needs."""
    return Stack(layers, _OPEN[-1]) if _OPEN and layers and not any(how.window for how in hows) else None


def same(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of the layers behind the first one, which has done their work."""
    return hidden_states


class Graphs:
    """Those of one training, by the first weight of the layers and the number of tokens."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, ...], _Captured] = {}
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.pool: Any = None
        self.works = True
        self.number = 0
        """Of the forward pass whose activations are there: all sizes have one memory."""
        self.grads: dict[int, list[Tensor]] = {}
        """Those of the weights, of the last backward pass, by the first weight."""


class Stack:
    """The forward of the first layer: all of them, captured where that pays."""

    def __init__(self, layers: Sequence[Compiled], graphs: Graphs) -> None:
        self._layers, self._graphs = layers, graphs

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (cos, sin), tree = kwargs["position_embeddings"], kwargs["upturn_plan"].tree
        found = self._captured(hidden_states[0], cos[0], sin[0], tree)
        if found is not None:
            return _Run.apply(hidden_states[0], (cos[0], sin[0], tree), found, *found.weights)[None]  # type: ignore[index]
        for layer in self._layers:
            hidden_states = layer(hidden_states, *args, **kwargs)
        return hidden_states

    def _captured(self, x: Tensor, cos: Tensor, sin: Tensor, tree: TokenTree) -> _Captured | None:
        graphs, first = self._graphs, self._layers[0]
        weight, size = id(first.weights.q), len(x)
        keeps = first.keeps_gates or (weight, size, True) in graphs.made  # the same bits, and their memory is taken
        key = (weight, size, keeps)
        learns = torch.is_grad_enabled() and first.weights.q.requires_grad
        if key not in graphs.made and graphs.works and learns:
            graphs.seen[key] += 1
            if graphs.seen[key] >= SEEN:
                try:
                    torch.cuda.empty_cache()  # graphs cannot use what torch holds for others
                    graphs.made[key] = _Captured(self._layers, (x, cos, sin, tree), graphs)
                except Exception as error:  # a layer that waits for the device, or whose kernels cannot be captured
                    graphs.works = False
                    _slow.tell_uncaptured(error)
        return graphs.made.get(key)


class _Captured:
    """Graphs of one number of tokens, and where they look."""

    def __init__(self, layers: Sequence[Compiled], batch: _Batch, graphs: Graphs) -> None:
        *inputs, tree = batch
        self.x, self.cos, self.sin = (part.detach().clone() for part in inputs)
        self.x.requires_grad_()
        self.g = torch.zeros_like(self.x)
        self._mask = _flex.block_mask(tree, None)
        self.weights = [weight for layer in layers for weight in layer.weights.learning()]
        self.graphs = graphs
        # A loss that is still alive holds nodes of these weights, made on the stream of its own pass. A capture must
        # wait for no other stream, so it has leaves of its own.
        apart = [layer.apart() for layer in layers]
        leaves = [weight for layer in apart for weight in layer.weights.learning()]

        def forward() -> Tensor:
            h = self.x[None]
            around = {"position_embeddings": (self.cos[None], self.sin[None]), "upturn_plan": self}
            for layer in apart:
                h = layer(h, **around)
            return h[0]

        def backward() -> Tensor:
            g_x, *grads = torch.autograd.grad(self.out, (self.x, *leaves), self.g)
            copied(grads, self.grads)
            return g_x

        empty = [torch.empty_like(weight).detach() for weight in self.weights]
        self.grads = graphs.grads.setdefault(id(self.weights[0]), empty)
        graphs.pool = graphs.pool or Pool(self.x)
        with torch.enable_grad():
            self.out, self.replay_forward = graphs.pool.captured(forward)
            self.g_x, self.replay_backward = graphs.pool.captured(backward)
        self.out = self.out.detach()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """See `Plan`."""
        if (out := _flex.attend(q, k, v, self._mask, how)) is None:
            raise RuntimeError("FlexAttention cannot be compiled")
        return out

    def fill(self, x: Tensor, cos: Tensor, sin: Tensor, tree: TokenTree) -> None:
        """Copy a batch to where the graphs look for it."""
        news = [x.detach(), cos, sin, *_flex.tensors_of(_flex.block_mask(tree, None))]
        olds = [self.x.detach(), self.cos, self.sin, *_flex.tensors_of(self._mask)]
        for old, new in zip(olds, news, strict=True):
            old.copy_(new)


class _Run(torch.autograd.Function):
    """`x [T, d] -> [T, d]` by a captured stack."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, around: _Around, captured: _Captured, *weights: Tensor) -> Tensor:
        captured.fill(x, *around)
        captured.replay_forward()
        captured.graphs.number += 1
        ctx.captured, ctx.number = captured, captured.graphs.number
        return captured.out.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        captured: _Captured = ctx.captured
        if ctx.number != captured.graphs.number:
            raise RuntimeError("a backward pass must come before the next forward pass")
        captured.g.copy_(g)
        captured.replay_backward()
        grads = [torch.empty_like(grad) for grad in captured.grads]
        copied(captured.grads, grads)
        return captured.g_x.clone(), None, None, *grads


def copied(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy tensors into others, in few launches."""
    torch._foreach_copy_(list(targets), list(sources))  # type: ignore[attr-defined]
