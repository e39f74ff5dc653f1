"""Files of questions, and what it takes to grade some of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from upturn.tasks._base import Task

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="the extra 'math' is not installed"
)


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(task: Task, split: Any) -> list[str]:
    return [prompt.text for prompt in task.prompts(split, 0, 10**6)]
