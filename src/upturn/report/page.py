"""One self-contained page of a run: `report.html`.

The page needs no network and no fonts; without its script every draft can still be read. The same folder gives the same
bytes.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from upturn.errors import RunError
from upturn.evaluation.study import Study
from upturn.evaluation.summary import Summary
from upturn.report import drafts, read, sections
from upturn.report.formats import headline

FILE = "report.html"
"""The page, in the run folder."""


def write_page(run_dir: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises RunError where files are missing or broken, and OSError where the page cannot be written: a run tells that as
    it does of all its files.
    """
    return _put(run_dir / FILE, render(*read.both(run_dir)))


def render(run: read.Run, study: Study) -> str:
    """The page of a run."""
    shelf = drafts.shelf([(one.label, one.chain) for one in run.measured], run.summary.task)
    panels = sections.of_run(study, run.losses)
    return fill(
        "page.html.jinja",
        summary=run.summary,
        headline=_headline(headline(study)),
        verdict=study.verdict,
        advice=study.advice,
        facts=_facts(run.summary),
        sections={panel.id: panel for panel in panels},
        shelf=shelf,
        kinds=drafts.KINDS,
        config=drafts.visible(run.config),
    )


def fill(template: str, **values: Any) -> str:
    """A template with its values; everything that is not markup is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def write(path: Path, text: str) -> Path:
    """Write a page and return its path. Raises RunError where it cannot be written."""
    try:
        return _put(path, text)
    except OSError as error:
        what = f"The page cannot be written: {error.strerror or error}."
        raise RunError(str(path), what, _mend(path, error)) from error


def _mend(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"Make the folder {path.parent}, or write to another."
    if error.errno == errno.EISDIR:
        return "Move this folder away: the page is a file of its name."
    return f"See that {path.parent} is a folder that you may write to, on a disk with room."


def _put(path: Path, text: str) -> Path:
    """Write by rename: a reader sees the old page or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        raise
    return path


def _headline(sentence: str) -> tuple[str, str]:
    """The first clause, to be set large, and the rest as a sentence of its own."""
    clause, semicolon, rest = sentence.partition("; ")
    return (f"{clause}.", rest[:1].upper() + rest[1:]) if semicolon else (clause, "")


def _facts(summary: Summary) -> list[tuple[str, str]]:
    prompts = max((measured.n for measured in summary.measurements), default=0)
    turns = max((row.turn for measured in summary.measurements for row in measured.turns), default=summary.turns)
    return [
        ("recipe", summary.recipe),
        ("model", summary.model),
        ("task", summary.task),
        ("held-out prompts", f"{prompts:,}"),
        ("turns", str(turns)),
        ("seed", str(summary.seed)),
        ("upturn", summary.upturn),
    ]
