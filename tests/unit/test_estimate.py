"""What `--dry-run` expects."""

from __future__ import annotations

from pathlib import Path

from upturn.lab import estimate
from upturn.models import load


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
