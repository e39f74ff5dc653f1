"""Functions of tensors that torch compiles, each once for all that has the same shape but for the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from upturn.models import _slow
from upturn.tracking import progress

BACKEND: Any = "inductor"
OF_COMPILER = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")
"""Where the faults of a compiler are defined."""


class Function:
    """A function that is compiled when it is first called; it runs as it is where that fails, and it is said once.

    Bits differ between both ways, so what failed never compiles again, and what has run compiled never runs otherwise
    for the same shapes.
    """

    __slots__ = ("_compiled", "_dynamic", "_has_run", "_work", "failed")

    def __init__(self, work: Callable[..., Any], *, dynamic: bool = False) -> None:
        self._work, self._dynamic = work, dynamic
        self._compiled: Any = None
        self._has_run = self.failed = False

    def __call__(self, *args: Any) -> Any:
        out = self.tried(*args)
        return self._work(*args) if self.failed else out

    def tried(self, *args: Any) -> Any:
        """What it gives compiled; None where it `failed`."""
        if self.failed:
            return None
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self._work, dynamic=self._dynamic, fullgraph=True, backend=BACKEND)
            out = self._compiled(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as fault:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise  # it might compile where kernels are run
            if self._has_run and not type(fault).__module__.startswith(OF_COMPILER):
                raise
            self.failed = True
            _tell(fault)
            return None
        self._has_run = True
        return out


_MADE: dict[tuple[Any, ...], Function] = {}
_TOLD: list[Exception] = []


def function(work: Any, *key: Any, dynamic: bool = False) -> Function:
    """The function for shapes and types that the key names. Each has code of its own, since torch compiles the same
    code for some eight shapes only."""
    name = (work, *key)
    if name not in _MADE:
        code = work.__code__.replace(co_name=f"{work.__name__}_{len(_MADE)}")
        own = FunctionType(code, work.__globals__, work.__name__, work.__defaults__, work.__closure__)
        own.__kwdefaults__ = work.__kwdefaults__
        _MADE[name] = Function(own, dynamic=dynamic)
    return _MADE[name]


def by_tokens(*tensors: Tensor | None) -> None:
    """The first axis of these counts tokens: another number of them must not compile anew."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _tell(fault: Exception) -> None:
    if not _TOLD:
        inner = getattr(fault, "inner_exception", fault)
        progress.say(f"torch.compile fails here, so training is slower: {_slow.reason(inner)}")
    _TOLD.append(fault)
