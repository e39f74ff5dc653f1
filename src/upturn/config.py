"""A recipe file and overrides -> one validated config. All problems at once, each with where, what and how to mend."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, PlainSerializer, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from upturn import registry
from upturn.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plug-in chosen by name, with its own validated config."""

    room: str
    name: str
    cfg: BaseModel

    @property
    def module(self) -> ModuleType:
        """The file of the plug-in."""
        return registry.find(self.room, self.name)

    def dump(self) -> dict[str, Any]:
        """As it stands in a recipe file."""
        return {"name": self.name} | self.cfg.model_dump(mode="json")


def written(value: Any) -> dict[str, Any]:
    """A plug-in as it stands in a recipe file, also where that is its bare name; nothing for anything else."""
    if isinstance(value, Plugin):
        return value.dump()
    return {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}


def _plug(value: Any, room: str) -> Plugin:
    if isinstance(value, Plugin):
        return value
    options = written(value)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise PydanticCustomError("plugin", "{what}", {"what": "This needs a name.", "mend": _choices(room)})
    try:
        module = registry.find(room, name)
    except ConfigError as error:
        raise PydanticCustomError("plugin", "{what}", {"what": error.what, "mend": error.mend}) from error
    try:
        return Plugin(room, name, module.Config.model_validate(options))
    except ValidationError as error:
        nested = _problems(error, module.Config)
        raise PydanticCustomError("nested", "nested", {"problems": nested}) from error


def _choices(room: str) -> str:
    return f"Choose one of: {', '.join(registry.names(room))}."


def _room(room: str) -> tuple[Any, ...]:
    schema = WithJsonSchema({"type": "object"})
    return (BeforeValidator(functools.partial(_plug, room=room)), PlainSerializer(lambda p: p.dump()), schema)


Task = Annotated[Any, *_room("tasks")]
Strategy = Annotated[Any, *_room("strategies")]
Scorer = Annotated[Any, *_room("scorers")]
Selector = Annotated[Any, *_room("selection")]
Objective = Annotated[Any, *_room("objectives")]


@dataclass(frozen=True, slots=True)
class _Problem:
    path: tuple[str | int, ...]
    given: str
    what: str
    mend: str


def shipped() -> dict[str, Path]:
    """Names and paths of the recipes' configs that come with the package."""
    folder = Path(str(resources.files("upturn"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def file_of(name: str) -> Path:
    """The file of a config, given as a path or a shipped name."""
    return shipped().get(name) or Path(name)


def read(name: str) -> tuple[str, dict[str, Any]]:
    """The raw data of a config file, given as a path or a shipped name, with a name for the run."""
    path = file_of(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, shipped(), n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"Shipped configs: {', '.join(shipped())}."
        raise ConfigError(f"config {name}", "There is no such file and no shipped config of this name.", hint)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {name}", f"It cannot be read: {error}.", "Name a YAML file.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = f"This is not valid YAML: {getattr(error, 'problem', error)}."
        raise ConfigError(f"config {name}{line}", what, "Mend the file.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"config {name}", "The file holds no keys and values.", "Begin with 'recipe: evolve'.")
    return path.stem, data


def override(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Put `a.b=value` settings over the data; values are YAML."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"override '{text}'", "This is not of the form key=value.", "Example: iterations=2")
        *path, last = key.split(".")
        place = data
        for part in path:
            inner: Any = place.get(part)
            if isinstance(inner, str):  # a plug-in given by its bare name
                inner = {"name": inner}
            if inner is not None and not isinstance(inner, dict):
                raise ConfigError(f"override '{text}'", f"'{part}' holds a value, not keys.", "Check the path.")
            place[part] = inner = inner or {}
            place = inner
        try:
            place[last] = _value(value)
        except yaml.YAMLError as error:
            what = f"Its value is not valid YAML: {getattr(error, 'problem', error)}."
            raise ConfigError(f"override '{text}'", what, "Put quotes around the value.") from error
    return data


def _short_for_task_data(data: dict[str, Any]) -> dict[str, Any]:
    """`data=PATH` says where the task's data lie."""
    if data.get("data") is None:
        return data
    return {k: v for k, v in data.items() if k != "data"} | {"task": written(data.get("task")) | {"data": data["data"]}}


def _value(text: str) -> Any:
    parsed = yaml.safe_load(text) if text else ""
    if isinstance(parsed, str):
        try:
            return float(parsed) if any(c.isdigit() for c in parsed) else parsed  # YAML takes 1e-5 for a string
        except ValueError:
            return parsed
    return parsed


def load(name: str, overrides: Sequence[str] = ()) -> tuple[str, ModuleType, Any]:
    """Run name, recipe module and validated config. Raises ConfigError that lists every problem."""
    run_name, data = read(name)
    data = _short_for_task_data(override(data, overrides))
    recipe = data.pop("recipe", None)
    if not isinstance(recipe, str):
        raise ConfigError(f"config {name}", "It names no recipe.", f"Add 'recipe:', {_choices('recipes')}")
    module = registry.find("recipes", recipe)
    return run_name, module, checked(module.Config, data, name)


def checked(model: type[Model], data: dict[str, Any], where: str) -> Model:
    """Validated data. Raises ConfigError that lists every problem."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = _problems(error, model)
        raise ConfigError(f"{_count(problems)} in {where}", _listing(problems), "Mend these and run again.") from None


def _count(problems: list[_Problem]) -> str:
    return f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"


def _listing(problems: list[_Problem]) -> str:
    blocks = []
    for problem in problems:
        where = ".".join(str(part) for part in problem.path)
        blocks.append(f"{where}{problem.given}\n        {problem.what}\n        {problem.mend}")
    return "\n\n    ".join(blocks) + "\n"


def _problems(error: ValidationError, model: type[BaseModel]) -> list[_Problem]:
    problems: list[_Problem] = []
    for found in error.errors(include_url=False):
        path, context = tuple(found["loc"]), found.get("ctx", {})
        if found["type"] == "nested":
            inner: list[_Problem] = context["problems"]
            problems += [_Problem(path + p.path, p.given, p.what, p.mend) for p in inner]
            continue
        problems.append(_problem(found, path, context, model))
    return problems


def _problem(found: Any, path: tuple[str | int, ...], context: dict[str, Any], model: type[BaseModel]) -> _Problem:
    given = "" if isinstance(found["input"], dict) else f" = {found['input']!r}"
    kind = found["type"]
    if kind == "extra_forbidden":
        known = _fields(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        mend = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(known)}."
        return _Problem(path, given, "There is no such key.", mend)
    if kind == "missing":
        return _Problem(path, "", "This is required.", "Add it to the file.")
    if kind == "plugin":
        return _Problem(path, given, context["what"], context["mend"])
    what = found["msg"].removeprefix("Value error, ")
    return _Problem(path, given, what[0].upper() + what[1:].rstrip(".") + ".", "Change the value.")


def _fields(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        choices = (field.annotation, *get_args(field.annotation)) if field else ()
        inner = next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def plugin(room: str, value: Any) -> Plugin:
    """A plug-in from plain data, outside a recipe file. Raises ConfigError."""
    try:
        return _plug(value, room)
    except PydanticCustomError as error:
        context = error.context or {}
        if "problems" in context:
            raise ConfigError(
                f"{_count(context['problems'])} in {room}", _listing(context["problems"]), "Mend these."
            ) from None
        raise ConfigError(room, context["what"], context["mend"]) from None
