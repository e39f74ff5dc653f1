"""Work on a GPU as a CUDA graph: captured once, launched at once from then on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from upturn.models import _memory


class Pool:
    """Memory of graphs that never run at the same time. It is that of torch as long as one of them lives."""

    def __init__(self, like: Tensor) -> None:
        self._device = like.device
        self._handle: Any = None
        self._stream: Any = None
        """One for all: a backward pass runs on the streams of its forward pass."""

    def captured(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What the work gives, at places that stay, and what computes it there again.

        It must have run before, so that what it needs is compiled and known. Raises what the work raises, and
        RuntimeError where it waits for the device or cannot be captured.
        """
        with torch.cuda.device(self._device):
            self._handle = self._handle or torch.cuda.graph_pool_handle()
            self._stream = stream = self._stream or torch.cuda.Stream()
            graph = torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), _memory.held_by(self, self._device):
                try:
                    graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
                    out = work()
                    graph.capture_end()
                except BaseException:
                    self._abandon(graph)
                    raise
            torch.cuda.current_stream().wait_stream(stream)
        return out, graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Leave nothing half captured: the allocator would go on as if it were, for the rest of the process."""
        with suppress(RuntimeError):
            graph.capture_end()
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._handle)
        self._handle = None
