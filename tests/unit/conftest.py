"""What tests of single rooms share."""

from __future__ import annotations

import pytest
from benchmark_room import BENCHMARKS


@pytest.fixture
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of the benchmarks can be imported, as they import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
