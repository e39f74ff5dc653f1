"""What torch does in many small operations, in few: in C for a CPU (`ops`, `back`), in Triton for a GPU (`gpu`)."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

GPU_TYPES = (torch.bfloat16, torch.float16, torch.float32)
AMPERE = (8, 0)
"""The first GPUs that multiply bfloat16."""


def on_gpu(like: Tensor) -> bool:
    """Whether the kernels of `gpu` take tensors of this kind. None do with UPTURN_NATIVE=0."""
    return like.is_cuda and like.dtype in GPU_TYPES and _has_triton()


@cache
def _has_triton() -> bool:
    is_asked = os.environ.get("UPTURN_NATIVE") != "0" and find_spec("triton") is not None
    return is_asked and torch.cuda.get_device_capability() >= AMPERE
