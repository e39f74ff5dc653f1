"""Passes on a GPU: kernels over slots, and a CUDA graph for each size of a step that comes again.

A small model's pass is some hundreds of kernels of a few microseconds each. Launched one by one they take ten times as
long as they run, so a pass of a size that was seen before is captured, and launched at once from then on. All that
changes from step to step lies in one buffer. Sizes are rounded up: what fills a step goes to a slot of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upturn.engines import sampling
from upturn.engines._passes import BELOW_ONE, Chosen, Passes, Pending, told
from upturn.engines._slots import Slots, Span
from upturn.models import _slow, policy
from upturn.models._capture import Pool
from upturn.models._gpu_layer import KernelPlan, kernels, sampler

SIZES = (8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 3072, 4096)
"""Tokens of a captured step."""
COARSE = 1024
"""Longer steps are multiples of this; they keep a GPU busy without a graph."""
SEEN = 2
"""Steps of a size before it is captured: they have compiled and warmed all that it needs."""

SMALL = 2**31
"""Bytes of a cache that may double. A larger one grows by the step of any cache."""
BURST = 4
"""Passes in a row. A draft that ends in the first of them is computed further for nothing; it has some 30 tokens."""


class GpuSlots(Slots):
    """Slots in the plain layout, and one more for what only fills a step."""

    graphs = True

    def __init__(self, config: object, size: int, like: Tensor, length: int) -> None:
        super().__init__(config, size + 1, like, length)
        self.size = size
        self.native = True
        self._copies: dict[tuple[int, int, int], list[int]] = {}

    def reserve(self, length: int) -> None:
        """Make every slot at least this long, twice as long where all are small: graphs know where slots lie."""
        if length > self.length:
            is_small = 2 * self.keys.nbytes <= SMALL
            super().reserve(max(length, 2 * self.length) if is_small else length)

    def copy(self, source: int, target: int, first: int, last: int) -> None:
        """Copy places of one slot into another, together with others, before the next pass."""
        targets = {row for rows in self._copies.values() for row in rows}
        if source in targets or target in targets or target in {row for row, _, _ in self._copies}:
            self.flush()
        self._copies.setdefault((source, first, last), []).append(target)

    def flush(self) -> None:
        """Do the copies that were asked for."""
        for (source, first, last), targets in self._copies.items():
            for held in (self.keys, self.values):
                held[:, targets, :, first:last] = held[:, source : source + 1, :, first:last]
        self._copies.clear()


@dataclass(slots=True)
class _Size:
    """A step of one size: its buffer, and its graph once it has one."""

    buffer: Tensor
    tokens: int
    asked: int
    replay: Callable[[], None] | None = None
    out: tuple[Tensor, Tensor] | None = None
    parts: dict[str, slice] = field(default_factory=dict)
    """Where each part of a step lies in the buffer."""
    length: int = 0
    """Of the buffer."""

    def __post_init__(self) -> None:
        sizes = {"ids": self.tokens, "slot": self.tokens, "place": self.tokens}
        sizes |= {"asked": self.asked, "uniform": self.asked, "tiles": 4 * self.tokens}
        for name, size in sizes.items():
            self.parts[name] = slice(self.length, self.length + size)
            self.length += size

    def put_uniforms(self, packed: np.ndarray, uniforms: np.ndarray) -> None:
        """Into a packed step."""
        packed[self.parts["uniform"]].view(np.float32)[: len(uniforms)] = uniforms.clip(max=BELOW_ONE)

    def move_on(self, packed: np.ndarray, count: int) -> None:
        """Make a step of one token for each of `count` slots the one that follows it."""
        packed[self.parts["place"]][:count] += 1
        packed[self.parts["tiles"]].reshape(4, -1)[2, :count] += 1


class GraphPasses(Passes):
    """Passes that run while the program goes on."""

    overlaps = True
    burst = BURST

    def __init__(self, model: nn.Module, cache: GpuSlots, cfg: sampling.Config) -> None:
        self.model, self.cache, self.cfg = model, cache, cfg
        self._sizes: dict[tuple[int, int], _Size] = {}
        self._seen: Counter[tuple[int, int]] = Counter()
        self._where = self._tile = 0
        self._captures = True
        self._pool: Pool | None = None
        """Memory of all graphs."""

    def start(self, fed: list[int], spans: Sequence[Span], uniforms: np.ndarray) -> Pending:
        """See `Passes`."""
        first, *more = uniforms.T if uniforms.ndim == 2 else (uniforms,)
        columns = np.fromiter(chain.from_iterable(spans), np.int32, 4 * len(spans)).reshape(-1, 4).T
        slots, starts, counts, asked = columns
        self.cache.reserve(int((starts + counts).max()) + len(more))
        self.cache.flush()
        self._forget_moved()
        size = self._size(len(fed), int(asked.sum()))
        packed = self._packed(size, columns, first)
        packed[size.parts["ids"]][: len(fed)] = fed
        out = self._pass(size, packed)
        waiting = _Waiting()
        waiting.add(out, len(first))
        if more:
            ones = np.ones_like(slots)
            size = self._size(len(slots), len(slots))
            packed = self._packed(size, np.stack([slots, starts + counts, ones, ones]), more[0])
        for numbers in more:
            size.put_uniforms(packed, numbers)
            out = self._pass(size, packed, out[0][: len(slots)])
            waiting.add(out, len(slots))
            size.move_on(packed, len(slots))
        return waiting.ready()

    def _pass(self, size: _Size, packed: np.ndarray, fed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One pass; it feeds the ids that were packed, or what an earlier one chose."""
        size.buffer.copy_(torch.from_numpy(packed).pin_memory(), non_blocking=True)
        if fed is not None:
            size.buffer[size.parts["ids"]][: len(fed)].copy_(fed)
        if size.replay is None:
            out = self._compute(size)
            self._capture(size)
            return out
        size.replay()
        assert size.out is not None
        return size.out

    @property
    def _waits(self) -> bool:
        """Whether torch chooses: it looks whether more than a few tokens are likely."""
        return self.cfg.top_p < 1 and self.cfg.temperature > 0

    @property
    def _config(self) -> Any:
        return self.model.config.get_text_config()  # type: ignore[operator,union-attr]

    def _forget_moved(self) -> None:
        """Graphs know addresses: of the cache, which may have grown."""
        if self._where != self.cache.keys.data_ptr():
            self._where = self.cache.keys.data_ptr()
            self._sizes.clear()
            self._pool = None
            torch.cuda.empty_cache()  # graphs cannot use what torch holds of the old cache
            self._pool = Pool(self.cache.keys)

    def _size(self, tokens: int, asked: int) -> _Size:
        key = _rounded(tokens), _rounded(asked)
        if key not in self._sizes:
            size = _Size(torch.empty(0), *key)
            size.buffer = torch.zeros(size.length, dtype=torch.int32, device=self.cache.keys.device)
            self._sizes[key] = size
        return self._sizes[key]

    def _packed(self, size: _Size, columns: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """A step as its buffer has it, less the ids; `columns [4, N]` of `Span`."""
        packed = np.zeros(size.length, dtype=np.int32)
        part = {name: packed[where] for name, where in size.parts.items()}
        slots, starts, counts, asked = columns
        ends = counts.cumsum()
        part["slot"].fill(self.cache.size)
        part["slot"][: ends[-1]] = slots.repeat(counts)
        part["place"][: ends[-1]] = _running(starts, counts)
        part["asked"][: asked.sum()] = _running(ends - asked, asked)
        size.put_uniforms(packed, uniforms)
        tiles = self._tiles(slots, ends - counts, starts, counts)
        part["tiles"].reshape(4, -1)[:, : tiles.shape[1]] = tiles
        return packed

    def _tiles(self, slots: np.ndarray, firsts: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """See `gpu.attend`."""
        if not self._tile:
            self._tile = kernels().tile_tokens(self._config.num_attention_heads, self.cache.heads)
        if counts.max() <= self._tile:
            return np.stack([slots, firsts, starts, counts])
        parts = -(-counts // self._tile)
        before = self._tile * _running(np.zeros_like(parts), parts)
        sizes = np.minimum(self._tile, counts.repeat(parts) - before)
        return np.stack([slots.repeat(parts), firsts.repeat(parts) + before, starts.repeat(parts) + before, sizes])

    def _compute(self, size: _Size) -> tuple[Tensor, Tensor]:
        part = {name: size.buffer[size.parts[name]] for name in ("ids", "slot", "place", "asked", "tiles")}
        uniform_N = size.buffer[size.parts["uniform"]].view(torch.float32)
        tiles = part["tiles"].view(4, -1)
        heads = self._config.num_attention_heads
        plan = KernelPlan(self.cache.keys, self.cache.values, part["slot"], part["place"], tiles, heads)
        hidden_T = policy.hidden_states(self.model, part["ids"].long(), part["place"].long(), plan)
        logits = policy.head(self.model, hidden_T[part["asked"].long()])
        if not self._waits:
            return sampler().sample(logits.contiguous(), uniform_N, self.cfg.temperature)
        return sampling.choose(logits, uniform_N, self.cfg.temperature, self.cfg.top_p)

    def _capture(self, size: _Size) -> None:
        """Capture a step that was computed often enough; a model that cannot be captured goes on without."""
        key = size.tokens, size.asked
        self._seen[key] += 1
        if not self._captures or self._seen[key] < SEEN or size.tokens > SIZES[-1]:
            return
        try:
            if self._waits:  # known before: a capture that fails keeps its memory
                raise RuntimeError("with top_p below 1 they wait for the GPU")
            assert self._pool is not None
            size.out, size.replay = self._pool.captured(lambda: self._compute(size))
        except Exception as error:  # a layer that waits for the device, or whose kernels cannot be captured
            self._captures = False
            _slow.tell_uncaptured(error)


class _Waiting:
    """The tokens of passes, on their way to the CPU."""

    __slots__ = ("_event", "_out")

    def __init__(self) -> None:
        self._out: list[tuple[Tensor, Tensor]] = []
        self._event = torch.cuda.Event()

    def add(self, out: tuple[Tensor, Tensor], count: int) -> None:
        """Fetch what a pass chose, before the next one writes there."""
        chosen, logprobs = (torch.empty(count, dtype=part.dtype, pin_memory=True) for part in out)
        for here, there in zip((chosen, logprobs), out, strict=True):
            here.copy_(there[:count], non_blocking=True)
        self._out.append((chosen, logprobs))

    def ready(self) -> _Waiting:
        """Nothing will be added."""
        self._event.record()
        return self

    def __call__(self) -> Chosen:
        """Row by row, the steps of each side by side."""
        self._event.synchronize()
        chosen, logprobs = (torch.stack(parts, 1).flatten() for parts in zip(*self._out, strict=True))
        return told(chosen, logprobs)


def _rounded(size: int) -> int:
    place = bisect_left(SIZES, size)
    return SIZES[place] if place < len(SIZES) else -(-size // COARSE) * COARSE


def _running(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """From each first number so many ones, one behind the other."""
    ends = counts.cumsum()
    return np.arange(ends[-1]) + (firsts + counts - ends).repeat(counts)
