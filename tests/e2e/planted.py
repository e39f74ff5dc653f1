"""Plant each bug and run the test that must fail: `python planted.py FOLDER` writes `outcome.json`.

One warm process forks a child per bug, so that torch, the package and the tests are imported once.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from bugs import BUGS, Bug

ROOT = Path(__file__).parents[2]


def plant(bug: Bug) -> None:
    """Give the functions of a module the code that they would have with the bug."""
    module = importlib.import_module("upturn." + bug.file.removesuffix(".py").replace("/", "."))
    source = Path(str(module.__file__)).read_text()
    assert source.count(bug.right) == 1, f"{bug.file} holds {source.count(bug.right)} times {bug.right!r}"
    wrong: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(source.replace(bug.right, bug.wrong), bug.file, "exec"), wrong)
    for name, function in vars(module).items():
        if isinstance(function, FunctionType) and function.__module__ == module.__name__:
            function.__code__ = wrong[name].__code__


def run(tests: Sequence[str], *options: str) -> int:
    """Exit code of pytest."""
    return int(pytest.main(["-x", "--assert=plain", "--tb=line", "-p", "no:cacheprovider", *options, *tests]))


def verdict(bug: Bug | None, said: Path) -> dict[str, object]:
    """Exit code and output of the test that must fail; of all such tests where there is no bug."""
    tests = [bug.caught_by] if bug else sorted({each.caught_by for each in BUGS.values()})
    child = os.fork()
    if not child:
        code = 70
        try:
            if bug:
                plant(bug)
            with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                code = run(tests)
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
    with (here / "collected.txt").open("w") as file, contextlib.redirect_stdout(file):
        run(sorted({bug.caught_by.split("::")[0] for bug in BUGS.values()}), "--collect-only")  # imports everything
    gc.freeze()  # pytest collects garbage ten times: no child needs to look through what all share
    said = here / "said.txt"
    found = {"none": verdict(None, said)} | {name: verdict(bug, said) for name, bug in BUGS.items()}
    (here / "outcome.json").write_text(json.dumps(found))
