"""Forward passes of the engine: what each slot gets goes in, the next tokens come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upturn.engines import sampling
from upturn.engines._slots import BEGIN, Slots, Span, StepPlan
from upturn.models import policy
from upturn.models._attention import heads_of
from upturn.models.fused import fused
from upturn.models.native import on_gpu, ops

Chosen = tuple[list[int], list[float]]
"""Tokens, and their log-probs under the unmodified model to six places: one for each token that was asked for."""
Pending = Callable[[], Chosen]
"""Waits for a pass."""
BELOW_ONE = 1 - 2**-24
"""The greatest uniform number that single precision does not round to 1."""


class Passes:
    """Passes that compute at once."""

    overlaps = False
    """Whether a pass runs while the program goes on."""
    burst = 1
    """Most passes in a row that need no look at what they choose."""

    def __init__(self, model: nn.Module, cache: Slots, cfg: sampling.Config) -> None:
        self.model, self.cache, self.cfg = model, cache, cfg

    def start(self, fed: list[int], spans: Sequence[Span], uniforms: np.ndarray) -> Pending:
        """Feed new tokens, whose keys and values go into the cache; `uniforms` has a number for each asked one, `[N]`.

        With `[N, steps]` of them as many passes follow each other: each of the later ones feeds what was chosen before.
        """
        self.cache.reserve(max(span.start + span.count for span in spans))
        device = self.cache.keys.device
        plan = StepPlan(self.cache, spans)
        hidden_T = policy.hidden_states(self.model, torch.tensor(fed, device=device), plan.place_T, plan)
        if not len(uniforms):
            return lambda: ([], [])
        logits = policy.head(self.model, hidden_T[plan.asked_N])
        uniform_N = torch.tensor(uniforms.clip(max=BELOW_ONE), dtype=torch.float32, device=device)
        chosen, logprobs = sampling.choose(logits, uniform_N, self.cfg.temperature, self.cfg.top_p)
        found = told(chosen, logprobs)
        return lambda: found


class Ready:
    """The cache of an engine and passes over it, made for each run.

    On a GPU both last as long as the engine, and the joined weights too: graphs know where they lie.
    """

    def __init__(self, model: nn.Module, cfg: sampling.Config, num_slots: int) -> None:
        self._model, self._cfg, self._num_slots = model, cfg, num_slots
        self._length = BEGIN
        self._held: dict[Any, Any] = {}
        self._lasting: tuple[Slots, Passes] | None = None
        self._addresses: list[int] = []

    @contextmanager
    def opened(self) -> Iterator[tuple[Slots, Passes]]:
        """For one run, in inference mode; weights must not change within it."""
        like = next(self._model.parameters())
        with _on(like.device), fused(self._model, self._held):
            cache, passes = self._graphs() if on_gpu(like) and self._has_kernels else self._plain()
            yield cache, passes
            if cache.native:  # else their length shapes the arithmetic, and every run must begin alike
                self._length = cache.length

    def _plain(self) -> tuple[Slots, Passes]:
        cache = Slots(self._config, self._num_slots, next(self._model.parameters()), self._length)
        return cache, Passes(self._model, cache, self._cfg)

    @cached_property
    def _has_kernels(self) -> bool:
        from upturn.models import _gpu_layer

        like, config = next(self._model.parameters()), self._config
        return _gpu_layer.runs(like, config.num_attention_heads, *heads_of(config))

    def _graphs(self) -> tuple[Slots, Passes]:
        from upturn.engines._graphs import GpuSlots, GraphPasses

        addresses = [weight.data_ptr() for weight in self._model.parameters()]
        addresses += [address for layer in self._held.values() for address in layer.addresses()]
        if self._lasting is None or addresses != self._addresses:
            self._lasting = None  # there may be no room for both
            cache = GpuSlots(self._config, self._num_slots, next(self._model.parameters()), self._length)
            self._lasting, self._addresses = (cache, GraphPasses(self._model, cache, self._cfg)), addresses
        return self._lasting

    @property
    def _config(self) -> Any:
        return self._model.config.get_text_config()  # type: ignore[operator,union-attr]


def told(chosen: Tensor, logprobs: Tensor) -> Chosen:
    """What a pass chose. A single times a million is exact in double precision, so this rounds as `round` does."""
    exact = logprobs.cpu().numpy().astype(np.float64)
    return chosen.cpu().numpy().tolist(), (np.rint(exact * 1e6) / 1e6).tolist()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels and graphs go to the current device, whatever their tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True, slots=True)
class Launched:
    """A pass of some slots that was started."""

    rows: list[int]
    guesses: list[tuple[int, ...]]
    steps: int
    pending: Pending
    """Gives the tokens row by row: one more than was guessed, or one for each step."""


def kind_of(cache: Slots) -> str:
    """What passes over a cache cost, as a name in `_propose.COSTS`."""
    like = cache.keys
    if cache.graphs:
        return "graphs"
    own = "tiles" if ops.has_tiles(like.dtype) else "vectors"
    return own if cache.native and ops.has_product(like.dtype) else like.device.type
