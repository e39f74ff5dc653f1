"""What `--dry-run` expects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from upturn.lab import estimate
from upturn.models import load, packed
from upturn.models.native import ops


def test_parameters_are_counted_from_the_files(tiny_model: Path):
    model = load.load(str(tiny_model), "float32", device="cpu").model
    assert estimate.parameters(tiny_model) == sum(weight.numel() for weight in {*model.parameters()})


def test_seconds_by_hand():
    speed = estimate.Speed(1_000_000, 1e9, "cpu")
    share = estimate.EFFICIENCY["cpu"]["train"]
    assert speed.seconds("train", 50) == 50 * 1e6 * 8 / (share * 1e9)
    assert speed.seconds("score", 50) == 0


def test_a_machine_has_a_rate(tiny_model: Path):
    assert estimate.measure(tiny_model, "float32").flops > 1e6


def test_the_rate_is_that_of_the_product_that_a_generation_uses(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the processor has no instructions for bfloat16, torch is a hundred times slower than our kernels."""
    made: list[packed.Product] = []
    real = packed.Product.__call__
    monkeypatch.setattr(packed.Product, "__call__", lambda self, x: made.append(self) or real(self, x))
    estimate.measure(tiny_model, "bfloat16", "cpu")
    assert len(made) == estimate.REPEATS
    assert (made[0].panels is not None) == ops.has_product(torch.bfloat16)
