"""The tests are worth something: each classic bug of preference training, once planted, makes one fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bugs import BUGS


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every bug, planted in the package of a process of its own and met by the test that is to catch it."""
    folder = tmp_path_factory.mktemp("planted")
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    helper = [sys.executable, str(Path(__file__).with_name("planted.py")), str(folder)]
    done = subprocess.run(helper, capture_output=True, text=True, env=one_thread, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "outcome.json").read_text())


def test_without_a_bug_they_pass(outcome: dict[str, Any]):
    assert outcome["none"]["code"] == 0, outcome["none"]["said"]


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_makes_its_test_fail(outcome: dict[str, Any], bug: str):
    assert outcome[bug]["code"] == pytest.ExitCode.TESTS_FAILED, outcome[bug]["said"]
    assert "1 failed" in outcome[bug]["said"]
