"""Rough tokens and times for `--dry-run`: arithmetic from parameter count and a short matrix product, nothing more."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from upturn.errors import ModelError

ANSWER_SHARE = 0.6
"""Length of a usual answer as a share of the longest allowed."""
PROMPT_TOKENS = 64
"""Tokens of a usual question with its template."""
EFFICIENCY = {"cpu": {"generate": 0.4, "train": 0.5}, "cuda": {"generate": 0.08, "train": 0.35}}
"""Share of the matrix rate that a step usually reaches, by device. Those of a CPU are measured (docs/performance.md);
those of an H200 follow from the rates of SmolLM2-135M, and larger models reach more."""
PRODUCT = {"cpu": (256, 1024), "cuda": (8192, 4096)}
"""Rows, and inputs and outputs, of a product that shows the rate of a device."""
REPEATS = 16
DRAFTS_PER_GROUP = 8
"""Drafts of a group that are learned from, as far as can be told before they are made."""
FLOPS_PER_TOKEN = {"generate": 2 * 1.5, "train": 8}
"""Per parameter; generation also computes contexts, training also the reference."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What this machine does with this model."""

    parameters: int
    flops: float
    """Of a matrix product, per second."""
    device: str

    def seconds(self, step: str, tokens: int) -> float:
        """Expected seconds of a step; 0 for the light ones."""
        if step not in FLOPS_PER_TOKEN:
            return 0.0
        return tokens * self.parameters * FLOPS_PER_TOKEN[step] / (EFFICIENCY[self.device][step] * self.flops)


def training_tokens(pairs: int, rows: int, max_new_tokens: int, epochs: float) -> int:
    """Tree tokens of a training: the question once, each row its answer, each draft shown once."""
    answer = ANSWER_SHARE * max_new_tokens
    return round(epochs * pairs * (PROMPT_TOKENS + rows * answer))


def measure(folder: Path, dtype: str, device: str = "auto") -> Speed:
    """Parameters as the files of the weights tell them, and the device's best rate at one product of a generation."""
    import torch

    from upturn.models import load, packed

    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    device = "cuda" if torch.cuda.is_available() and load.place_of(device).startswith("cuda") else "cpu"
    rows, width = PRODUCT[device]
    times = packed.Product([torch.nn.Linear(width, width, bias=False, dtype=kind, device=device)])
    x = torch.ones(rows, width, dtype=kind, device=device)
    took: list[float] = []
    with torch.inference_mode():
        for _ in range(REPEATS):
            began = time.perf_counter()
            times(x)[0, 0].item()  # waits for the device
            took.append(time.perf_counter() - began)
    return Speed(parameters(folder), 2 * rows * width**2 / min(took), device)


def parameters(folder: Path) -> int:
    """Numbers in the weights of a folder; only the heads of its files are read. ModelError where one is none."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        except SafetensorError as error:
            raise ModelError(f"weights {path}", f"They cannot be read: {error}.", "Fetch the file again.") from error
    return count
