"""A static KV cache with one slot per running draft, and the attention plan over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from upturn.errors import ModelError
from upturn.models._attention import How, heads_of, hidden, sdpa
from upturn.models._memory import free_on
from upturn.models.native import ops

BEGIN = 128
"""Tokens of a slot at first."""
GROW = ops.STEP
"""Slots grow by whole steps of this many tokens: without kernels every slot is read as far as the longest one."""
GROW_SHARE = 8
"""And by no less than this part of their length, so that copying them stays cheap however long they get."""
FEW_QUERIES = 32
"""Up to so many new tokens of a slot two plain matrix products beat the fused kernel on a CPU at any number of keys
(twice as fast at one token and 512 keys)."""

USUAL = {"cpu": 96, "cuda": 256}
"""Slots where nobody asks for a number: a pass costs a CPU as much as some 10 to 40 tokens, and a GPU as hundreds."""
SHARE_OF_FREE = 3
"""On a GPU they may come to take one part in so many of its free memory: it is copied when it grows."""


def usual(model: nn.Module, longest: Callable[[], int]) -> int:
    """How many slots suit the device of a model; `longest` tells how many tokens each comes to hold. Without CUDA they
    are always the same number: in some types and layouts it moves last bits."""
    like, config = next(model.parameters()), cast(Any, model).config.get_text_config()
    most = USUAL.get(like.device.type, USUAL["cpu"])
    if like.device.type != "cuda":
        return most
    (heads, width), tokens = heads_of(config), min(max(longest(), BEGIN), config.max_position_embeddings)
    one = 2 * config.num_hidden_layers * heads * width * like.element_size() * tokens
    return max(1, min(most, free_on(like.device) // SHARE_OF_FREE // one))


class Slots:
    """Keys and values of up to `size` contexts, each as long as `reserve` made them.

    Tokens lie from place 0 of their slot without gaps, so a context that begins like the slot's old one reuses it.
    """

    graphs = False
    """Whether passes over them are captured as CUDA graphs (`_graphs`)."""

    def __init__(self, config: object, size: int, like: Tensor, length: int = BEGIN) -> None:
        self.size = size
        heads, width = heads_of(config)
        layers: int = config.num_hidden_layers  # type: ignore[attr-defined]
        self.native = ops.usable(like)
        """Whether kernels attend: they read each slot as far as it is filled, wherever it lies, and lay it out."""
        self.heads, self.width = heads, width
        wide = _whole_steps(width) if self.native else width
        self.keys = torch.zeros((layers, size, heads, _whole_steps(length), wide), dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)

    @property
    def length(self) -> int:
        """Tokens that fit into a slot."""
        return self.keys.shape[3]

    def reserve(self, length: int) -> None:
        """Make every slot at least this long."""
        if length > self.length:
            wanted = max(length, self.length + self.length // GROW_SHARE)
            more = _whole_steps(wanted) - self.length
            self.keys = nn.functional.pad(self.keys, (0, 0, 0, more))  # one after the other: they may be large
            self.values = nn.functional.pad(self.values, (0, 0, 0, more))

    def copy(self, source: int, target: int, first: int, last: int) -> None:
        """Copy the places from `first` up to `last` of one slot into another, which begin alike."""
        if self.native:  # whole blocks: they begin in what is alike already, and end where nothing is yet
            first, last = first // GROW * GROW, _whole_steps(last)
        for held in (self.keys, self.values):
            held[:, target, :, first:last] = held[:, source, :, first:last]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first tokens of two slots. Not with kernels, which need no order of slots."""
        assert not self.native
        for held in (self.keys, self.values):
            held[:, [one, other], :, :length] = held[:, [other, one], :, :length]


class Span(NamedTuple):
    """New tokens of one slot in a forward pass."""

    slot: int
    start: int
    """Tokens that the slot holds already."""
    count: int  # type: ignore[assignment]
    """New tokens."""
    asked: int
    """Of how many of these, the last ones, the next token is wanted: one, and one for each proposed token."""


class StepPlan:
    """One forward pass: some slots each get new tokens, which see the slot's earlier tokens and each other.

    The new tokens lie one slot after the other in the flat step. Slots that decode bring one token and the guess
    behind it, slots that begin bring their context. Kernels take them as they are. Without kernels, the last tokens of
    every slot, padded to the longest guess, form one attention call over the cache as it lies; the earlier tokens of
    beginning slots form a second one.
    """

    def __init__(self, slots: Slots, spans: Sequence[Span]) -> None:
        self.slots = slots
        device = slots.keys.device
        ends = list(accumulate(span.count for span in spans))
        self.row_T = torch.tensor([s.slot for s in spans for _ in range(s.count)], device=device)
        self.place_T = torch.tensor([s.start + i for s in spans for i in range(s.count)], device=device)
        asked = [place for s, end in zip(spans, ends, strict=True) for place in range(end - s.asked, end)]
        self.asked_N = torch.tensor(asked, device=device)
        """Places in the flat step whose next token is wanted."""
        self._runs = [_Run(s.slot, end - s.count, s.start, s.count) for s, end in zip(spans, ends, strict=True)]
        self._tail = max(span.asked for span in spans)
        self._few_queries = FEW_QUERIES if device.type == "cpu" else 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """See `Plan`: store the new keys and values, then attend over each slot."""
        keys, values = self.slots.keys[layer], self.slots.values[layer]
        q_T, k_T, v_T = (part[0].transpose(0, 1) for part in (q, k, v))  # [T, H, D]
        out_T = torch.empty(q_T.shape, dtype=q.dtype, device=q.device)
        if self.slots.native:
            self._check(layer, q_T, k_T, v_T)
            (q_T,), (k_T, v_T) = _as_kernels_read(q_T), _as_kernels_read(k_T, v_T)
            ops.keep(k_T, v_T, self.row_T, self.place_T, keys, values)
            limits = (how.scaling, how.softcap or 0.0, how.window or 0)
            ops.attend(q_T, self._runs_R4, (keys, values), limits, out_T)
            return out_T[None]
        keys[self.row_T, :, self.place_T] = k_T
        values[self.row_T, :, self.place_T] = v_T
        for part in self._padded:
            k_B, v_B = keys[part.rows, :, : part.top], values[part.rows, :, : part.top]
            out = sdpa(part.queries(q_T), k_B, v_B, part.mask(how.window), how, few_queries=self._few_queries)
            part.put(out, out_T)
        return out_T[None]

    def takes(self, layer: ops.Layer, x_T: Tensor) -> bool:
        """Whether `run` can do all of a layer: on kernels, and with sizes as config and plan promised."""
        slots, size = self.slots, (len(self.row_T), layer.width)
        asked, promised = (layer.kv_heads, layer.d, x_T.dtype), (slots.heads, slots.width, slots.keys.dtype)
        return slots.native and asked == promised and x_T.shape == size

    def run(self, layer: int, whole: ops.Layer, x_T: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """A layer in one call: `x [T, d] -> [T, d]`, with cos and sin `[T, D]`."""
        return ops.decoder_layer(whole, self._step, x_T, turn, (self.slots.keys[layer], self.slots.values[layer]))

    @cached_property
    def _step(self) -> ops.Step:
        slots, runs = self.slots, self._runs_R4
        length, width = slots.keys.shape[3:]
        tensors = {"slot": self.row_T, "place": self.place_T, "run": runs}
        where = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        return ops.Step(tokens=len(self.row_T), runs=len(runs), length=length, slot_width=width, **where)

    def _check(self, layer: int, q_T: Tensor, k_T: Tensor, v_T: Tensor) -> None:
        """Kernels trust what they are given, so it must be what the config promised."""
        slots, like = self.slots, self.slots.keys.dtype
        shape = (len(self.row_T), slots.heads, slots.width)
        if (
            k_T.shape != shape
            or v_T.shape != shape
            or q_T.shape[2] != slots.width
            or {q_T.dtype, k_T.dtype, v_T.dtype} != {like}
        ):
            raise ModelError(
                f"layer {layer}",
                f"Its keys are {k_T.dtype} {[*k_T.shape[1:]]} and its values {v_T.dtype} {[*v_T.shape[1:]]}, where the "
                f"config of the model promises {like} [{slots.heads}, {slots.width}].",
                "Serve this model (`vllm serve`) and name the endpoint instead: upturn asks any.",
            )

    @cached_property
    def _runs_R4(self) -> Tensor:
        return torch.tensor([(run.slot, run.flat, run.place, run.count) for run in self._runs], dtype=torch.long)

    @cached_property
    def _padded(self) -> list[_Part]:
        """All tokens in padded calls: the last ones of each slot, and contexts."""
        tails, contexts = [run.last(self._tail) for run in self._runs], [run.first(self._tail) for run in self._runs]
        return self._part(tails) + self._part([run for run in contexts if run.count])

    def _part(self, runs: list[_Run]) -> list[_Part]:
        return [_Part(runs, self.slots.length, self.slots.keys.device)] if runs else []


@dataclass(frozen=True, slots=True)
class _Run:
    """New tokens of one slot that lie side by side."""

    slot: int
    flat: int
    """First place in the flat step."""
    place: int
    """First place in the slot."""
    count: int

    def last(self, size: int) -> _Run:
        """The last tokens, at most `size`."""
        left = self.count - min(size, self.count)
        return _Run(self.slot, self.flat + left, self.place + left, self.count - left)

    def first(self, size: int) -> _Run:
        """All but the last `size` tokens."""
        return replace(self, count=max(0, self.count - size))


class _Part:
    """Runs of some slots as the queries of one padded attention call."""

    def __init__(self, runs: Sequence[_Run], length: int, device: torch.device) -> None:
        slots = [run.slot for run in runs]
        whole = slots == list(range(len(slots)))
        self.rows: slice | Tensor = slice(0, len(slots)) if whole else torch.tensor(slots, device=device)
        columns = zip(*((run.flat, run.place, run.count) for run in runs), strict=True)
        flat, depth, count = (torch.tensor(column, device=device)[:, None] for column in columns)
        span = torch.arange(max(run.count for run in runs), device=device)
        real = span < count
        self._shape = real.shape
        self._flat = torch.where(real, flat + span, 0)
        self._real = real.nonzero(as_tuple=True)
        self._depth = torch.where(real, depth + span, 0)
        first, tokens = runs[0].flat, sum(run.count for run in runs)
        as_they_lie = tokens == real.numel() and runs[-1].flat + runs[-1].count == first + tokens
        self._block = slice(first, first + tokens) if as_they_lie else None
        """Where runs of one length without a gap lie in the flat step: they need no padding."""
        # Slots that take part as they lie are read in their whole length: a cut would not be contiguous, and slow.
        self.top = length if whole else max(run.place + run.count for run in runs)
        self._masks: dict[int | None, Tensor] = {}

    def queries(self, q_T: Tensor) -> Tensor:
        """`[T, H, D]` of the flat step -> `[B, H, Q, D]` of the runs, padded with the step's first token."""
        q_B = q_T[self._flat] if self._block is None else q_T[self._block].unflatten(0, self._shape)
        return q_B.transpose(1, 2)

    def put(self, out_B: Tensor, out_T: Tensor) -> None:
        """Write `[B, H, Q, D]` of the runs, less the padding, to their places in the flat step `[T, H, D]`."""
        out_B = out_B.transpose(1, 2)
        if self._block is None:
            out_T[self._flat[self._real]] = out_B[self._real]
        else:
            out_T[self._block] = out_B.flatten(0, 1)

    def mask(self, window: int | None) -> Tensor:
        """`[B, 1, Q, K]`: each query sees the keys up to its own place."""
        if window not in self._masks:
            key = torch.arange(self.top, device=self._depth.device)
            seen = key <= self._depth[:, :, None]
            if window is not None:
                seen &= self._depth[:, :, None] - key < window
            self._masks[window] = hidden(seen[:, None])
        return self._masks[window]


def _whole_steps(size: int) -> int:
    return -(-size // GROW) * GROW


def _as_kernels_read(*parts: Tensor) -> Sequence[Tensor]:
    """The same heads `[T, H, D]`, one behind the other, and all parts alike."""
    like = parts[0]
    fits = like.stride()[1:] == (like.shape[2], 1) and all(part.stride() == like.stride() for part in parts)
    return parts if fits else [part.contiguous() for part in parts]
