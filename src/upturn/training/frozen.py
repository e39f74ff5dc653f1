"""Log-probs under models that do not learn, computed once per training and cached beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from upturn.models import policy
from upturn.tracking import progress
from upturn.training import plan, rows

Pack = Callable[[Sequence[int]], rows.Packed]
"""Numbers of examples -> their packed batch."""


def logps(
    model: nn.Module, path: Path, num_targets: Sequence[int], steps: Sequence[plan.Step], pack: Pack, label: str
) -> list[Tensor]:
    """Log-probs of the target tokens of each example, in the very batches of the first pass over the examples.

    The same layout, dtype and chunks as in training make the margins at step 0 exactly 0, not nearly. An example that
    the steps never reach has NaN.
    """
    found = _read(path, label) if path.is_file() else None
    if found is None:
        _write(path, _compute(model, num_targets, steps, pack, label))
        found = load_file(path)["logps"]
    return list(found.split(list(num_targets)))


def _read(path: Path, label: str) -> Tensor | None:
    """What is cached; None where a failed disk left the file empty or cut."""
    try:
        return load_file(path)["logps"]
    except SafetensorError:
        progress.say(f"{label}: {path.name} is damaged, so its values are computed again")
        return None


def _compute(
    model: nn.Module, num_targets: Sequence[int], steps: Sequence[plan.Step], pack: Pack, label: str
) -> Tensor:
    ends = list(accumulate(num_targets))
    values = torch.full((ends[-1],), torch.nan)
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), progress.track(label, len(num_targets), "examples") as bar:
        for batch in [batch for step in steps if step.epoch == 0 for batch in step.micro_batches]:
            found_N = policy.tree_logprobs(model, rows.to_device(pack(batch), device).tree).cpu()
            for example, part in zip(batch, found_N.split([num_targets[e] for e in batch]), strict=True):
                values[ends[example] - num_targets[example] : ends[example]] = part
            bar.advance(len(batch))
    return values


def _write(path: Path, values: Tensor) -> None:
    scratch = path.with_suffix(".part")
    save_file({"logps": values}, scratch)
    os.replace(scratch, path)
