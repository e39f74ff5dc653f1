"""Run tests on copies of the package, each with one bug: `python planted.py FOLDER` writes `outcome.json`.

One warm process forks a child per bug, so that torch is imported once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import rich.progress
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

ROOT = Path(__file__).parents[2]
TESTS = ("tests/contracts/test_objectives.py", "tests/unit/test_rows.py")
assert all((hypothesis, rich, AutoModelForCausalLM, AutoTokenizer, tiny))  # here, so that no child has to


@dataclass(frozen=True)
class Bug:
    """A piece of text in a file of the package, and what stands there instead."""

    file: str
    right: str
    wrong: str


BUGS = {
    "chosen and rejected swapped": Bug(
        "objectives/_base.py",
        'values_S[_row(batch, context, "chosen")] - values_S[_row(batch, context, "rejected")]',
        'values_S[_row(batch, context, "rejected")] - values_S[_row(batch, context, "chosen")]',
    ),
    "mean for sum over pairs": Bug("objectives/dpo.py", "Loss(loss_P.sum(),", "Loss(loss_P.mean(),"),
    "mean for sum over tokens": Bug(
        "objectives/_base.py",
        "return sum_by_sample(logprobs_N, batch.owner_N, len(batch.num_tokens_S)) - batch.reference_S",
        "return sum_by_sample(logprobs_N, batch.owner_N, len(batch.num_tokens_S)) / batch.num_tokens_S"
        " - batch.reference_S",
    ),
    "prompt not masked": Bug(
        "training/rows.py",
        "Sample(contexts[context], getattr(pair, side).token_ids)",
        "Sample(contexts[context][:1], contexts[context][1:] + getattr(pair, side).token_ids)",
    ),
    "no reference": Bug(
        "objectives/_base.py", "len(batch.num_tokens_S)) - batch.reference_S", "len(batch.num_tokens_S))"
    ),
    "beta outside the square": Bug(
        "objectives/refine.py",
        "loss_P = (batch.p_P - 0.5 - margin_P) ** 2",
        "loss_P = cfg.beta * (batch.p_P - 0.5 - margin_P / cfg.beta) ** 2",
    ),
    "beta outside the sigmoid": Bug(
        "objectives/dpo.py",
        "loss_P = -label_P * F.logsigmoid(scaled_P) - (1 - label_P) * F.logsigmoid(-scaled_P)",
        "loss_P = -cfg.beta * (label_P * F.logsigmoid(margin_P) + (1 - label_P) * F.logsigmoid(-margin_P))",
    ),
}


def plant(bug: Bug | None, folder: Path) -> Path:
    """A copy of the package with the bug in it."""
    copy = shutil.copytree(ROOT / "src" / "upturn", folder / "upturn", ignore=shutil.ignore_patterns("__pycache__"))
    if bug:
        path = copy / bug.file
        source = path.read_text()
        assert source.count(bug.right) == 1, f"{bug.file} holds {source.count(bug.right)} times {bug.right!r}"
        path.write_text(source.replace(bug.right, bug.wrong))
    return folder


def verdict(bug: Bug | None, folder: Path) -> dict[str, object]:
    """Exit code of pytest on the copy, and what it said."""
    source, said = plant(bug, folder), folder / "said.txt"
    child = os.fork()
    if not child:
        code = 70
        try:
            sys.path.insert(0, str(source))
            import upturn

            assert Path(str(upturn.__file__)).is_relative_to(source)
            with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                code = int(pytest.main(["-x", "--assert=plain", "--tb=line", "-p", "no:cacheprovider", *TESTS]))
            assert sys.modules["upturn"] is upturn
        except BaseException:
            code = 71
            said.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "said": said.read_text()}


if __name__ == "__main__":
    os.chdir(ROOT)
    here = Path(sys.argv[1])
    found = {name: verdict(bug, here / name.replace(" ", "-")) for name, bug in {"none": None, **BUGS}.items()}
    (here / "outcome.json").write_text(json.dumps(found))
