"""Trackers: a run's events as metrics of an experiment tracker, one file each, imported when first used."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from upturn import registry
from upturn.errors import ConfigError
from upturn.tracking.events import Sink
from upturn.tracking.trackers._base import Run

__all__ = ["Chosen", "Run", "names", "start"]


def names() -> list[str]:
    """What there is to choose from: the files of this folder."""
    return registry.names("tracking/trackers")


def _known(name: str) -> str:
    if name not in names():
        raise ValueError(f"There is no such tracker; choose from {', '.join(names())}")
    return name


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Chosen = Annotated[tuple[Annotated[str, AfterValidator(_known)], ...], BeforeValidator(_listed)]
"""Trackers by name, in a config."""


def start(chosen: Sequence[str], run: Run) -> list[Sink]:
    """Open trackers for a run. Raises ConfigError for the first that cannot be had, before any work is done."""
    sinks: list[Sink] = []
    try:
        for name in chosen:
            sinks.append(_start(name, run))
    except ConfigError:
        for sink in sinks:
            sink.close()
        raise
    return sinks


def _start(name: str, run: Run) -> Sink:
    where, leave = f"track: {name}", "or leave it out of `track`."
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            return importlib.import_module(f"{__name__}.{name}").start(run)
    except ImportError as error:
        mend = f'pip install "upturn[{name}]", {leave}'
        raise ConfigError(where, f"Its library cannot be imported: {error}.", mend) from error
    except Exception as error:  # whatever a library says of a login or a server
        mend = f"Mend the settings of {name}, {leave}"
        raise ConfigError(where, f"It does not start: {type(error).__name__}: {error}", mend) from error
