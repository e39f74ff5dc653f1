"""Plug-ins made in code rather than in a recipe file."""

from __future__ import annotations

from typing import Any

from upturn import registry
from upturn.config import Plugin


def named(room: str, name: str, **options: Any) -> Plugin:
    """A plug-in by room and name with the given options."""
    return Plugin(room, name, registry.find(room, name).Config(**options))
