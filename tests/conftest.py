"""Shared fixtures: a tiny model on disk, and quiet progress."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny

from upturn.tracking import progress


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model with one token per character."""
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def quiet() -> None:
    """No progress lines in test output."""
    progress.set_mode("quiet")
