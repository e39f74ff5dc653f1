"""Says what is needlessly slow.

bfloat16 by torch, on a processor that has no instruction for it; passes on a GPU that cannot be captured.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakSet

import torch
from torch import Tensor, nn

from upturn.models.native import ops
from upturn.tracking import progress

_TOLD: WeakSet[nn.Module] = WeakSet()
_TOLD_NO_ROOM: WeakSet[nn.Module] = WeakSet()


def tell(model: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Once for a model of which torch multiplies these parts, if that is slow here."""
    if model not in _TOLD and any(is_slow(weight) for part in parts for weight in part.parameters()):
        _TOLD.add(model)
        progress.say(
            "this processor has no instructions for bfloat16, and upturn no kernels for layers of this kind here: "
            "dtype float32 is two to eight times as fast"
        )


def reason(fault: Exception) -> str:
    """The first line of what it says."""
    return (str(fault).strip() or type(fault).__name__).splitlines()[0]


def tell_uncaptured(fault: Exception) -> None:
    """Passes go on one kernel at a time."""
    progress.say(f"this model's passes cannot be captured as CUDA graphs, so they are slower: {reason(fault)}")


def tell_no_kernels(fault: Exception) -> None:
    """A generation goes on as torch does it."""
    progress.say(f"upturn's kernels do not run on this GPU, so generation is slower: {reason(fault)}")


def tell_no_room(model: nn.Module) -> None:
    """Once for a model: a generation goes on without joined weights."""
    if model in _TOLD_NO_ROOM:
        return
    _TOLD_NO_ROOM.add(model)
    progress.say("too little memory is free on this GPU to join weights, so generation is slower")


def is_slow(weight: Tensor) -> bool:
    """Whether torch has no fast product with this weight."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not ops.torch_has_bf16()
