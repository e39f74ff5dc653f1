"""One run from its config: the run folder, the lab, and what is written when something changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml

from upturn import __version__, config
from upturn.engines.api import Endpoint
from upturn.errors import RunError
from upturn.evaluation.phrases import counted
from upturn.evaluation.summary import Summary
from upturn.lab import estimate
from upturn.lab.bench import Bench
from upturn.lab.lab import Measure, Options
from upturn.lab.store import Planned, Store, at_work, unwritable, write_text, writing
from upturn.models.chat import Layout
from upturn.strategies._base import num_drafts
from upturn.tracking import events, trackers
from upturn.types import Requests

CONFIG = "config.yaml"
"""Name of the resolved settings in a run folder."""
COPIES = ("drafts/*.jsonl", "steps/[0-9][0-9]*-*.json", "metrics.jsonl")
"""What a run folder holds as copies of results in the store."""


def run(name: str, overrides: Sequence[str]) -> tuple[Path, Summary]:
    """Run a recipe, or go on with it. Returns the run folder and the summary."""
    run_name, recipe, cfg = config.load(name, overrides)
    would, planned = _planned(run_name, recipe, cfg)  # finds what is missing for a late step before the first one
    settled, given = _settled(recipe, cfg), config.file_of(name)
    _refuse_another_config(would.run_dir, settled, given)  # before anything is written there
    steps = [step["name"] for step in planned.steps]
    with at_work(would.run_dir):
        bench = _bench(run_name, recipe, cfg, given, would.copies)
        earlier = _copies(bench.run_dir)
        with writing(bench.run_dir), _told(bench, steps, cfg), _stopped_if_it_fails(bench):
            recipe.run(cfg, bench)
            return _finish(bench, earlier)


def _name(recipe: ModuleType) -> str:
    return recipe.__name__.rsplit(".", 1)[-1]


def _summary(run_name: str, recipe: ModuleType, cfg: Any) -> Summary:
    return Summary(
        upturn=__version__,
        recipe=_name(recipe),
        name=run_name,
        model=cfg.model,
        task=cfg.task.name,
        seed=cfg.seed,
        status="running",
        turns=cfg.measure.turns,
    )


@dataclass(frozen=True, slots=True)
class Setting:
    """How a model is measured, besides what is asked of it."""

    seed: int = 0
    data: str | None = None
    """Where the task's data lie."""
    dtype: str = "auto"
    output_dir: Path | None = None
    """Run folder; runs/eval-... or runs/diagnose-... when not given."""
    task: Sequence[str] = ()
    """Settings of the task: key=value."""
    skip_failed: bool = False
    """Go on without the prompts that an endpoint does not answer."""
    requests: Requests | None = None
    """What is said behind drafts; the task's own requests when not given."""
    layout: Layout = "auto"
    """How drafts are shown."""


def evaluate(model: str, task: str, cfg: dict[str, Any], setting: Setting = Setting()) -> tuple[Path, Summary]:
    """The turn table of one model on one task; `cfg` as in `Measure`."""
    return _measured("eval", {"model": model}, task, cfg, setting)


def diagnose(
    model: str | Endpoint,
    task: str,
    cfg: dict[str, Any],
    setting: Setting = Setting(),
    base: str | Endpoint | None = None,
) -> tuple[Path, Summary]:
    """Can this model refine? Chains and independent answers, of the model and of the base it came from.

    There are two answers more than the strategy asks for drafts, critiques among them: refinements may be longer, and
    controls are read at equal tokens.
    """
    models = ({"base": base} if base else {}) | {"model": model}
    return _measured("diagnose", models, task, {"parallel": _drafts(cfg) + 2} | cfg, setting)


def _drafts(settings: dict[str, Any]) -> int:
    """How many drafts of a prompt the model is asked for, at most, beside the controls."""
    cfg = config.checked(Measure, settings, "diagnose")
    return num_drafts(cfg.strategy.cfg) if cfg.strategy else cfg.turns


def _measured(
    recipe: Literal["eval", "diagnose"],
    models: Mapping[str, str | Endpoint],
    task: str,
    settings: dict[str, Any],
    s: Setting,
) -> tuple[Path, Summary]:
    """Measure models on one task, no training: names or endpoints by label, the model in question last."""
    plugin = config.plugin("tasks", config.override({"name": task} | ({"data": s.data} if s.data else {}), s.task))
    cfg = config.checked(Measure, settings, recipe)
    names = {label: m if isinstance(m, str) else m.model for label, m in models.items()}
    name = list(names.values())[-1]
    folder = s.output_dir.expanduser() if s.output_dir else Path("runs") / f"{recipe}-{_short_name(name)}-{task}"
    summary = Summary(
        upturn=__version__,
        recipe=recipe,
        name=folder.name,
        model=name,
        task=task,
        seed=s.seed,
        status="running",
        turns=cfg.turns,
    )
    options = config.checked(Options, {"dtype": s.dtype, "layout": s.layout}, recipe)
    what = {"models": {label: _told_model(model) for label, model in models.items()}, "task": plugin.dump()}
    how = {"measure": cfg.model_dump(), "options": options.model_dump(), "seed": s.seed}
    settled = {"recipe": recipe} | what | how
    _refuse_another_config(folder, settled, fixed=what)
    with at_work(folder):
        _refuse_another_config(folder, settled, fixed=what)  # which may have come since
        bench = Bench(folder, _store(folder, None), plugin, options, s.seed, summary, skip_failed=s.skip_failed)
        if s.requests and not any(setting.startswith(("refine_request", "critique_request")) for setting in s.task):
            bench.requests = s.requests  # a model is measured as it was trained
        earlier = _copies(folder)
        _write_config(folder, settled)
        with writing(folder), _told(bench), _stopped_if_it_fails(bench):
            for label, model in models.items():
                bench.measure(bench.load(model) if isinstance(model, str) else bench.behind(model), cfg, label)
            return _finish(bench, earlier)


def _bench(run_name: str, recipe: ModuleType, cfg: Any, given: Path, copies: Set[str]) -> Bench:
    """The lab of a run, in a folder that holds no more than this run and earlier ones of its plan have copied there."""
    folder, settled = _folder(run_name, cfg), _settled(recipe, cfg)
    _refuse_another_config(folder, settled, given)
    store = _store(folder, cfg.store)
    with writing(folder):
        _make_way(folder, settled, copies)
    _write_config(folder, settled)
    return Bench(folder, store, cfg.task, cfg.options, cfg.seed, _summary(run_name, recipe, cfg), cfg.limit)


def _settled(recipe: ModuleType, cfg: Any) -> dict[str, Any]:
    return {"recipe": _name(recipe)} | cfg.model_dump(mode="json")


def _copies(folder: Path) -> set[str]:
    """Names of what earlier runs have copied into their folder from the store; none where no run has been."""
    if "recipe" not in (_read(folder / CONFIG) if (folder / CONFIG).is_file() else {}):
        return set()
    return {path.relative_to(folder).as_posix() for pattern in COPIES for path in folder.glob(pattern)}


def _make_way(folder: Path, settled: dict[str, Any], planned: Set[str]) -> None:
    """Drop the copies of an earlier run that this one's plan does not name: nobody can tell whose they are.

    With other settings its numbers go as well, and first of all: they would speak of drafts that are gone.
    """
    earlier = _copies(folder)
    if earlier and not _says(folder / CONFIG, settled):
        (folder / "summary.json").unlink(missing_ok=True)
        planned = planned - {"metrics.jsonl"}
    _drop(folder, earlier - planned)


def _drop(folder: Path, names: Set[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _store(folder: Path, store: str | None) -> Store:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    return Store(Path(store).expanduser() if store else folder / "store")


def _folder(run_name: str, cfg: Any) -> Path:
    return Path(cfg.output_dir).expanduser() if cfg.output_dir else Path("runs") / run_name


def _short_name(model: str) -> str:
    """What a run folder is called after: a local model with the folder around it, as all runs call theirs `model`."""
    path = Path(model).expanduser()
    return "-".join(path.resolve().parts[-2:]) if path.is_dir() else path.name


def _told_model(model: str | Endpoint) -> Any:
    return model if isinstance(model, str) else {"url": model.url, "model": model.model}


def _refuse_another_config(
    folder: Path, settled: dict[str, Any], given: Path | None = None, fixed: Mapping[str, Any] | None = None
) -> None:
    """Raises RunError where the resolved settings would be written over what is no earlier version of them.

    That is the config that was `given`, unless it says the same; a file that no run wrote; another recipe's; or one
    with other `fixed` settings.
    """
    path, elsewhere = folder / CONFIG, "Set output_dir to another folder."
    if not path.is_file() or _says(path, settled):
        return
    there = _read(path)
    if given and path.samefile(given):
        what = f"The resolved config would be written over the one that was given, {given}."
        raise RunError(f"run folder {folder}", what, elsewhere)
    if "recipe" not in there:
        raise RunError(f"run folder {folder}", f"It holds a {CONFIG} that no run wrote.", elsewhere)
    if there["recipe"] != settled["recipe"]:
        raise RunError(f"run folder {folder}", f"It holds a run of the recipe '{there['recipe']}'.", elsewhere)
    for name, value in (fixed or {}).items():
        if there.get(name, value) != value:
            what = f"It holds the results of other {name}: {there[name]}, not {value}."
            raise RunError(f"run folder {folder}", what, "Give another --output-dir, or delete this one.")


def _read(path: Path) -> dict[str, Any]:
    """The settings in a file; none where it holds something else."""
    with suppress(yaml.YAMLError, UnicodeDecodeError):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _text(settled: dict[str, Any]) -> str:
    return yaml.safe_dump(settled, sort_keys=False)


def _says(path: Path, settled: dict[str, Any]) -> bool:
    return path.is_file() and _read(path) == yaml.safe_load(_text(settled))


def _write_config(folder: Path, settled: dict[str, Any]) -> None:
    """Keep the resolved settings, unless they are there."""
    if _says(folder / CONFIG, settled):
        return
    with writing(folder):
        write_text(folder / CONFIG, _text(settled))


def _told(bench: Bench, steps: Sequence[str] | None = None, cfg: Any = None) -> AbstractContextManager[None]:
    """Tell what happens to the run folder's log of events, and to the trackers that the config asks for."""
    chosen = getattr(cfg, "track", ())
    settings = cfg.model_dump(mode="json") if chosen else {}
    sinks = trackers.start(chosen, trackers.Run(bench.summary.name, bench.run_dir, settings))
    start = bench.summary.model_dump(include={"name", "recipe", "model", "task"})
    start |= {"config": str(bench.run_dir / CONFIG)} | ({"steps": steps} if steps else {})
    return events.record([events.File(bench.run_dir / events.FILE), *sinks], **start)


@contextmanager
def _stopped_if_it_fails(bench: Bench) -> Iterator[None]:
    """A summary that nobody goes on with says so."""
    try:
        yield
    except BaseException:
        if bench.summary.stages:
            with suppress(OSError):
                bench.summary.model_copy(update={"status": "stopped"}).write(bench.run_dir / "summary.json")
        raise


def _finish(bench: Bench, earlier: Set[str]) -> tuple[Path, Summary]:
    """The last words of a run; what `earlier` runs have left and this one did not write, as it ended early, goes."""
    from upturn.report import page

    _drop(bench.run_dir, earlier - bench.copies)
    bench.summary = bench.summary.model_copy(update={"status": "finished"})
    bench.summary.write(bench.run_dir / "summary.json")
    page.write_page(bench.run_dir)
    return bench.run_dir, bench.summary


def _planned(run_name: str, recipe: ModuleType, cfg: Any) -> tuple[Bench, Planned]:
    """Go through a recipe without doing or writing anything."""
    folder = _folder(run_name, cfg)
    store = Planned(Path(cfg.store).expanduser() if cfg.store else folder / "store")
    bench = Bench(folder, store, cfg.task, cfg.options, cfg.seed, _summary(run_name, recipe, cfg), cfg.limit)
    recipe.run(cfg, bench)
    return bench, store


def plan(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What a run would do: the resolved config, the steps, which are done, tokens and time."""
    run_name, recipe, cfg = config.load(name, overrides)
    bench, store = _planned(run_name, recipe, cfg)
    resolved = _settled(recipe, cfg)
    _refuse_another_config(bench.run_dir, resolved, config.file_of(name))
    speed = estimate.measure(Path(bench.load(cfg.model).folder), cfg.options.dtype, cfg.options.device)
    steps = [
        {"name": s["name"], "key": s["key"], "done": s["done"], "tokens": s["guess"].get("tokens", 0)}
        | {"seconds": round(speed.seconds(s["step"], s["guess"].get("tokens", 0)), 1)}
        for s in store.steps
    ]
    todo = [step for step in steps if not step["done"]]
    return {
        "config": resolved,
        "output_dir": str(bench.run_dir),
        "steps": steps,
        "tokens": sum(step["tokens"] for step in todo),
        "seconds": sum(step["seconds"] for step in todo),
    }


def describe(planned: dict[str, Any]) -> str:
    """A plan as text."""
    lines = [yaml.safe_dump(planned["config"], sort_keys=False), f"output_dir: {planned['output_dir']}", ""]
    width = max(len(step["name"]) for step in planned["steps"])
    for step in planned["steps"]:
        takes = f"about {step['tokens']:,} tokens, {step['seconds'] / 60:.1f} min" if step["tokens"] else "a moment"
        lines.append(f"  {step['name']:<{width}}  {'done' if step['done'] else takes}")
    minutes = round(planned["seconds"] / 60)
    takes = counted(minutes, "minute") if minutes else "under a minute"
    todo = f"about {planned['tokens']:,} tokens, {takes} on this machine."
    if all(step["done"] for step in planned["steps"]):
        todo = "nothing, all steps are done."
    return "\n".join([*lines, f"\nTo do: {todo}"])
