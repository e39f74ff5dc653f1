"""The house stands: imports point one way, libraries stay in their rooms, every plug-in says what it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import upturn
from upturn import config, registry

HOUSE = Path(str(upturn.__file__)).parent

ROOMS = {
    # pure: plain data and arithmetic
    "types": "",
    "errors": "",
    "_model": "",
    "numerics": "",
    "trees": "types",
    "registry": "errors",
    "config": "errors registry",
    "objectives": "_model numerics",
    "strategies": "_model types",
    "selection": "_model types",
    "evaluation": "_model errors types",
    # edges: files, libraries, the screen
    "tracking": "errors registry types",
    "tasks": "_model errors types",
    "scorers": "_model errors tasks types",
    "models": "_model errors evaluation numerics tracking trees types",
    "engines": "_model errors models types",
    # machinery
    "training": "_model errors models numerics objectives tracking trees types",
    "report": "errors evaluation types",
    "lab": "_model config engines errors evaluation models registry report selection strategies tracking training "
    "trees types",
    # wiring and doors
    "recipes": "_model config engines errors lab tracking training types",
    "cli": "config engines errors evaluation lab models registry report strategies tracking types",
}
"""Room -> the rooms it may import. A room names only rooms above it, so no circle can arise."""

LIBRARIES = {
    "torch": "numerics trees objectives models engines training scorers lab tracking",
    "transformers": "models scorers",
    "triton": "models",
    "safetensors": "models training scorers lab",
    "scipy": "evaluation",
    "matplotlib": "report",
    "jinja2": "models report",
    "datasets": "tasks",
    "typer": "cli",
    "httpx": "engines",
    "rapidfuzz": "evaluation",
    "wandb": "tracking",
    "trackio": "tracking",
}
"""Library -> the rooms that may import it, at the top of a file or where it is used."""

TORCH_AT_THE_TOP = {"numerics", "trees", "objectives", "models", "engines", "training"}

SHIPPED: dict[str, list[str]] = {
    "aggregation": [],
    "aligner": [],
    "arithmetic_self_training": [],
    "demo": [],
    "grpo_turns": [],
    "gsm8k-smollm2": ["data=openai/gsm8k"],
    "gsr": [],
    "iterative_dpo": [],
    "iterative_rpo": [],
    "keywords-smollm2": [],
    "rest_em": [],
    "score_rl": [],
    "self_refine": [],
    "sppo": [],
    "srpo": [],
    "srt": [],
    "star": [],
    "think_prune_train": [],
}
"""Every shipped config, with the settings it cannot do without."""


def room_of(path: Path) -> str:
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    return [path for path in sorted(HOUSE.rglob("*.py")) if room_of(path) != "__init__"]


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[str]:
    """Dotted names of everything imported by these nodes."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports name the package"
            if node.module == "upturn":
                yield from (f"upturn.{alias.name}" for alias in node.names if alias.name != "__version__")
            else:
                yield node.module


def arrows() -> Iterator[tuple[str, str, str]]:
    """(room, what it imports, where) over the whole package."""
    for path in files():
        for name in imported(ast.walk(ast.parse(path.read_text()))):
            yield room_of(path), name, str(path.relative_to(HOUSE))


def test_every_room_is_in_the_table_and_names_only_rooms_above_it():
    assert {room_of(path) for path in files()} == set(ROOMS)
    above: set[str] = set()
    for room, allowed in ROOMS.items():
        assert set(allowed.split()) <= above, room
        above.add(room)


def test_imports_point_one_way():
    wrong = [
        f"{room} -> {name} ({where})"
        for room, name, where in arrows()
        if name.startswith("upturn.") and name.split(".")[1] not in {room, *ROOMS[room].split()}
    ]
    assert wrong == []


def test_libraries_stay_in_their_rooms():
    wrong = [
        f"{room} -> {name} ({where})"
        for room, name, where in arrows()
        if (library := name.split(".")[0]) in LIBRARIES and room not in LIBRARIES[library].split()
    ]
    assert wrong == []


def test_torch_is_at_the_top_only_where_tensors_are_the_matter():
    found = {
        room_of(path)
        for path in files()
        if any(name.split(".")[0] in ("torch", "transformers") for name in imported(ast.parse(path.read_text()).body))
    }
    assert found <= TORCH_AT_THE_TOP


def test_help_list_and_config_start_without_torch():
    program = "import sys, upturn.config, upturn.cli.main, upturn.cli.verbs\n"
    program += "upturn.cli.verbs.catalogue(None)\n"
    program += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    "path",
    [path for path in files() if path.name != "__init__.py"],
    ids=lambda path: str(path.relative_to(HOUSE)),
)
def test_every_file_says_what_it_is(path: Path):
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
    assert len(first) > 10 and first[-1] in ".:", first


@pytest.mark.parametrize("room", registry.ROOMS)
def test_every_plug_in_has_a_config_and_a_first_line(room: str):
    assert registry.names(room)
    for name in registry.names(room):
        assert registry.first_line(room, name)[-1] in ".:"
        tree = ast.parse((HOUSE / room / f"{name}.py").read_text())
        assert "Config" in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_every_shipped_config_is_known_here():
    assert list(config.shipped()) == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads(name: str):
    run_name, recipe, cfg = config.load(name, SHIPPED[name])
    assert run_name == name
    assert isinstance(cfg, recipe.Config)
