"""The folder is the registry: a plug-in's name is its file name, and nothing is imported until asked for."""

from __future__ import annotations

import ast
import difflib
import importlib
from pathlib import Path
from types import ModuleType

from upturn.errors import ConfigError

ROOMS = ("tasks", "recipes", "objectives", "strategies", "scorers", "selection")


def names(room: str) -> list[str]:
    """Names of the plug-ins in a room, sorted. Files that begin with an underscore are helpers."""
    folder = Path(__file__).parent / room
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def first_line(room: str, name: str) -> str:
    """First line of a plug-in's docstring, read without importing it."""
    source = (Path(__file__).parent / room / f"{name}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]


def find(room: str, name: str) -> ModuleType:
    """Import one plug-in; an unknown name is a `ConfigError` that names the nearest."""
    known = names(room)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"Choose one of: {', '.join(known)}."
        raise ConfigError(f"{room}: {name}", f"There is no '{name}' among the {room}.", hint)
    return importlib.import_module(f"upturn.{room}.{name}")
