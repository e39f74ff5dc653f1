"""What the smaller verbs do: answer and refine one question, and list the plug-ins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from upturn import registry
from upturn.errors import ConfigError
from upturn.types import Attempt, Draft, Prompt, Requests

if TYPE_CHECKING:
    from upturn.engines.api import Endpoint
    from upturn.evaluation.study import Study

ROOMS = (*registry.ROOMS, "configs")


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


def place(model: str, api: str | None, concurrency: int, max_retries: int) -> str | Endpoint:
    """A model's name, or where it answers."""
    if api is None:
        return model
    from upturn import config
    from upturn.engines.api import Endpoint

    asked = {"url": api, "model": model, "concurrency": concurrency, "max_retries": max_retries}
    return config.checked(Endpoint, asked, "--api")


def show_diagnosis(folder: Path, study: Study) -> None:
    """The verdict, the turns of the model, its controls, and where the page lies."""
    from rich.console import Console

    from upturn.evaluation.summary import Summary
    from upturn.report import terminal

    console = Console()
    console.print(terminal.turn_table(Summary.read(folder / "summary.json")))
    if study.verdict:
        console.print(study.verdict.sentence, style="bold", highlight=False)
    console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def refine(
    question: str,
    model: str,
    turns: int,
    temperature: float,
    max_new_tokens: int,
    request: str,
    seed: int,
    *,
    show: bool,
) -> Attempt:
    """Answer, refine for some turns, and print each turn as it comes."""
    from rich.console import Console

    from upturn.engines import local, sampling
    from upturn.models import chat, load
    from upturn.strategies import chain

    console = Console()
    loaded = load.load(model)
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests(request))
    if talk.notice and show:
        console.print(f"({talk.notice})", style="dim")
    how = sampling.Config(temperature=temperature, max_new_tokens=max_new_tokens)
    seen: list[Draft] = []

    def on_draft(draft: Draft) -> None:
        if show:
            _show(console, draft, seen)
        seen.append(draft)

    async def strategy(prompt: Prompt, sample: Any) -> list[Draft]:
        return await chain.generate(prompt, sample, chain.Config(turns=turns))

    engine = local.Local(loaded.model, talk, how, seed=seed, slots=1)
    prompt = Prompt("question", question)
    engine.check([prompt])
    return engine.run([prompt], strategy, on_draft)[0]


def _show(console: Any, draft: Draft, seen: list[Draft]) -> None:
    from upturn.report import terminal

    cut = "" if draft.complete else ", cut at the length limit"
    same = bool(seen) and seen[-1].text == draft.text
    console.print(
        f"Turn {draft.turn}{' (unchanged)' if same else ''} [{draft.num_tokens} tokens{cut}]",
        style="bold",
        markup=False,
    )
    changed = seen and not same and console.is_terminal  # without colours a diff reads like one text
    text = terminal.diff(seen[-1].text, draft.text) if changed else draft.text
    console.print(text, highlight=False, markup=False)
    console.print()
