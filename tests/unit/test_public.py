"""The public surface: every name leads somewhere, and `import upturn` costs nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import upturn

HEAVY = ("torch", "transformers", "numpy", "scipy", "pydantic", "matplotlib", "rich")


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_brings_nothing_heavy():
    assert fresh(f"import sys, upturn; dir(upturn); print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_the_nouns_do_not_bring_torch():
    assert fresh("import sys, upturn; upturn.Prompt('a', 'b'); print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("name", upturn.__all__)
def test_every_public_name_is_there_and_stays_the_same(name: str):
    assert getattr(upturn, name) is getattr(upturn, name)
    assert name in dir(upturn)


def test_all_and_the_places_name_the_same_things():
    assert {*upturn.__all__} - {"__version__"} == {*upturn._PLACES}
    assert upturn.__all__ == sorted(upturn.__all__)


def test_public_names_are_documented():
    for name in upturn._PLACES:
        assert getattr(upturn, name).__doc__, name
        assert name in (upturn.__doc__ or ""), name


def test_an_unknown_name_is_an_attribute_error_and_rooms_still_import():
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        upturn.load_modle  # type: ignore[attr-defined]  # noqa: B018
    assert fresh("from upturn import trees; print(trees.__name__)") == "upturn.trees"
