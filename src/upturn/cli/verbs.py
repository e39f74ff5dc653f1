"""What the smaller verbs do: answer and refine one question, and list the plug-ins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upturn import registry
from upturn.errors import ConfigError
from upturn.types import Attempt, Draft, Prompt, Requests

if TYPE_CHECKING:
    from rich.console import Console

    from upturn.cli.typewriter import Types
    from upturn.engines.api import Endpoint
    from upturn.evaluation.study import Study
    from upturn.models.card import Refining

ROOMS = (*registry.ROOMS, "configs")
_STYLES = {"answer": ("bold", ""), "critique": ("bold dim", "dim")}
"""Of a draft's title and of its text."""


@dataclass(frozen=True, slots=True)
class Asked:
    """How one question is answered, and the answer refined; None is what the model was trained for."""

    strategy: str | None
    turns: int
    request: str | None
    critique_request: str | None
    temperature: float
    max_new_tokens: int
    seed: int


def catalogue(what: str | None) -> dict[str, dict[str, str]]:
    """Room -> plug-in -> first line of its docstring."""
    if what is not None and what not in ROOMS:
        raise ConfigError(
            f"list {what}", "There is nothing of this name to list.", f"Choose one of: {', '.join(ROOMS)}."
        )
    return {room: _entries(room) for room in ([what] if what else ROOMS)}


def _entries(room: str) -> dict[str, str]:
    if room != "configs":
        return {name: registry.first_line(room, name) for name in registry.names(room)}
    from upturn.config import shipped

    return {name: path.read_text().split("\n")[0].lstrip("# ") for name, path in shipped().items()}


def place(model: str, api: str | None, **how: Any) -> str | Endpoint:
    """A model's name, or where it answers."""
    if api is None:
        return model
    from upturn import config
    from upturn.engines.api import Endpoint

    return config.checked(Endpoint, {"url": api, "model": model} | how, "--api")


def trained_for(model: str | Endpoint) -> Refining:
    """How a model was led to refine in its run; the defaults for any other model, and for an endpoint."""
    from upturn.models import card, folders

    return card.refining(Path(folders.resolve(model))) if isinstance(model, str) else card.Refining()


def measuring(strategy: str | None, own: Refining, turns: int, prompts: int, temperature: float) -> dict[str, Any]:
    """What is measured, as it stands in a recipe file."""
    sampling, rule = {"temperature": temperature}, _strategy(strategy, own.strategy, turns)
    return {"prompts": prompts, "turns": turns, "strategy": rule, "sampling": sampling}


def _strategy(name: str | None, own: dict[str, Any], turns: int) -> dict[str, Any]:
    """The named strategy, else the model's own with its settings; a chain where that one has no turns."""
    settings = own if name in (None, own["name"]) else {"name": name}
    if name is None and "turns" not in registry.find("strategies", settings["name"]).Config.model_fields:
        settings = {"name": "chain"}
    return settings | {"turns": turns}


def show_diagnosis(folder: Path, study: Study) -> None:
    """The verdict, the turns of the model, its controls, and where the page lies."""
    from upturn.evaluation.summary import Summary
    from upturn.report import terminal

    console = terminal.console()
    console.print(terminal.turn_table(Summary.read(folder / "summary.json")))
    console.print(terminal.verdict(study), style="bold", highlight=False)
    console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def refine(question: str, model: str, how: Asked, *, show: bool) -> Attempt:
    """Answer, refine for some turns, and print each answer and each critique as it comes: in a terminal word by word.

    Raises ConfigError where there is no strategy of the name, or none with turns.
    """
    from rich.console import Console

    from upturn.cli.typewriter import typewriter

    console = Console(quiet=not show)
    with typewriter(console) as types:
        types(lambda: f"loading {model} ...")
        return _refine(question, model, how, console, types)


def _refine(question: str, model: str, how: Asked, console: Console, types: Types) -> Attempt:
    from upturn import config
    from upturn.engines import local, sampling
    from upturn.models import card, chat, folders, load

    folder = folders.resolve(model)  # once: it may fetch from the hub, or read a whole GGUF file
    own = card.refining(Path(folder))
    strategy = config.plugin("strategies", _strategy(how.strategy, own.strategy, how.turns))
    loaded = load.load_to_answer(folder)
    requests = Requests(how.request or own.refine, how.critique_request or own.critique)
    talk = chat.load(loaded.tokenizer, loaded.end_ids, requests, own.layout)
    if talk.notice:
        console.print(f"({talk.notice})", style="dim")
    lengths = sampling.Config(temperature=how.temperature, max_new_tokens=how.max_new_tokens)
    seen: dict[int, Draft] = {}

    def on_draft(draft: Draft) -> None:
        types(None)
        if not console.quiet:
            _show(console, draft, seen, how.max_new_tokens)
        seen[draft.index] = draft

    engine = local.Local(loaded.model, talk, lengths, seed=how.seed, slots=1)
    prompt = Prompt("question", question)
    engine.check([prompt])
    rule = partial(strategy.module.generate, cfg=strategy.cfg)
    [attempt] = engine.run([prompt], rule, on_draft, lambda ids: types(lambda: talk.decode(ids)))
    if len(attempt.drafts) > len(seen):  # kept answers cost nothing: the model was not asked for them
        console.print("The critique found nothing to change: the answer stays.", style="dim", highlight=False)
    return attempt


def _show(console: Console, draft: Draft, seen: Mapping[int, Draft], limit: int) -> None:
    """Print one draft, with its changes against the last answer among the drafts that it was shown."""
    from upturn.report import terminal

    shown = [seen[index].text for index in draft.parents if seen[index].kind == draft.kind]
    same = draft.text in shown[-1:]
    changed = shown and not same and console.is_terminal  # without colours a diff reads like one text
    text = terminal.diff(shown[-1], draft.text) if changed else draft.text
    title = "Turn" if draft.kind == "answer" else "Critique of turn"
    why = "at the length limit" if draft.num_tokens >= limit else "where the model's context was full"
    cut = "" if draft.complete else f", cut {why}"
    console.print(
        f"{title} {draft.turn}{' (unchanged)' if same else ''} [{draft.num_tokens} tokens{cut}]",
        style=_STYLES[draft.kind][0],
        markup=False,
    )
    console.print(text, style=_STYLES[draft.kind][1], highlight=False, markup=False)
    console.print()
