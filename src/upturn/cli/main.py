"""The `upturn` command. Heavy libraries are imported inside the verbs, so that --help is immediate."""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from upturn.errors import UpturnError

P = ParamSpec("P")
app = typer.Typer(
    name="upturn",
    help="Make language models able to improve their own answers, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OWN = "what the model was trained for when not given."
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="Folder, hub id, GGUF file or short name.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Same seed, same drafts.")]
TaskOption = Annotated[str, typer.Option("--task", help="Name of a task (see `upturn list tasks`).")]
Turns = Annotated[int, typer.Option("--turns", "-t", min=2, help="Turns per prompt.")]
Strategy = Annotated[str | None, typer.Option(help=f"chain, critique_refine, ...; {OWN}")]
NumPrompts = Annotated[int, typer.Option("--prompts", "-n", min=1, help="Held-out prompts.")]
Data = Annotated[str | None, typer.Option(help="Where the task's data lie.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float32 or auto.")]
TaskSettings = Annotated[list[str] | None, typer.Argument(help="Settings of the task: key=value.")]


def friendly(verb: Callable[P, None]) -> Callable[P, None]:
    """One clear message for what the user can mend, and exit code 2; Ctrl-C and SIGTERM say how to go on."""

    @functools.wraps(verb)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with _terminated_like_interrupted():
                verb(*args, **kwargs)
        except UpturnError as error:
            typer.secho(str(error), err=True, fg="red")
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            typer.echo("\nStopped. Run the same command again to go on where it stopped.", err=True)
            raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None

    return guarded


class _Terminated(KeyboardInterrupt):
    """SIGTERM, with which Slurm, Docker and systemd stop what runs: the same end as Ctrl-C."""


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM stop a verb as Ctrl-C does, unless somebody has seen to it; else a run would say that it goes on."""

    def stop(*_: object) -> None:
        raise _Terminated

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _quiet(quiet: bool, as_json: bool) -> None:
    from upturn.tracking import progress

    progress.set_mode("quiet" if quiet or as_json else "auto")


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, default=str))


@app.command()
@friendly
def run(
    config: Annotated[str, typer.Argument(help="A config file or the name of a shipped one (see `upturn list`).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings over the file: key=value, a.b=value.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the config, the steps and an estimate.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe; the same command again goes on where it stopped."""
    from upturn.lab import session

    _quiet(quiet, as_json)
    if dry_run:
        planned = session.plan(config, overrides or [])
        _print_json(planned) if as_json else typer.echo(session.describe(planned))
        return
    folder, summary = session.run(config, overrides or [])
    if as_json:
        _print_json(json.loads(summary.model_dump_json()))
        return
    from upturn.report import read, terminal

    console = terminal.console()
    console.print(terminal.turn_table(summary))
    console.print(terminal.verdict(read.study_of(folder)), highlight=False)
    console.print(f"Report: {folder / 'report.html'}\nModel:  {folder / 'model'}", highlight=False, soft_wrap=True)


@app.command()
@friendly
def refine(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: ModelOption,
    turns: Annotated[int, typer.Option("--turns", "-t", min=1, help="Answers, the direct one included.")] = 4,
    temperature: Temperature = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    request: Annotated[str | None, typer.Option(help=f"What is said to get a better answer; {OWN}")] = None,
    strategy: Strategy = None,
    critique_request: Annotated[str | None, typer.Option(help=f"What is said to get a critique; {OWN}")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Answer a question, refine the answer, and show what each turn changed."""
    from upturn.cli import verbs
    from upturn.types import to_json

    _quiet(True, as_json)
    how = verbs.Asked(strategy, turns, request, critique_request, temperature, max_new_tokens, seed)
    attempt = verbs.refine(question, model, how, show=not as_json)
    if as_json:
        _print_json(to_json(attempt))


@app.command(name="eval")
@friendly
def evaluate(
    model: ModelOption,
    task: TaskOption,
    task_settings: TaskSettings = None,
    turns: Turns = 4,
    strategy: Strategy = None,
    prompts: NumPrompts = 300,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
    data: Data = None,
    dtype: Dtype = "auto",
    output_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Run folder; runs/eval-... when not given.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The turn table of any model on any task."""
    from upturn.cli import verbs
    from upturn.lab import session

    _quiet(quiet, as_json)
    own = verbs.trained_for(model)
    cfg = verbs.measuring(strategy, own, turns, prompts, temperature)
    setting = session.Setting(
        seed, data, dtype, output_dir, task_settings or (), requests=own.requests, layout=own.layout
    )
    folder, summary = session.evaluate(model, task, cfg, setting)
    if as_json:
        _print_json(json.loads(summary.model_dump_json()))
        return
    from upturn.report import terminal

    console = terminal.console()
    console.print(terminal.turn_table(summary))
    console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
@friendly
def diagnose(
    model: ModelOption,
    task: TaskOption,
    task_settings: TaskSettings = None,
    api: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint; --model is then its name there.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model it came from: what did its first turn gain?")] = None,
    turns: Turns = 4,
    strategy: Strategy = None,
    prompts: NumPrompts = 300,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
    data: Data = None,
    dtype: Dtype = "auto",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at the same time, with --api.")] = 16,
    max_retries: Annotated[int, typer.Option(min=0, help="How often a request is repeated, with --api.")] = 6,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for an answer, with --api.")] = 60,
    stream: Annotated[bool, typer.Option(help="Let answers come in pieces: then no piece may take longer.")] = False,
    skip_failed: Annotated[bool, typer.Option(help="Go on without prompts that the endpoint does not answer.")] = False,
    output_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Run folder; runs/diagnose-... when not given.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Can this model refine its own answers? A verdict, the numbers behind it, and a page. Nothing is trained."""
    from upturn.cli import verbs
    from upturn.lab import session
    from upturn.report import read

    _quiet(quiet, as_json)
    how = {"concurrency": concurrency, "max_retries": max_retries, "timeout": timeout, "stream": stream}
    asked = verbs.place(model, api, **how)
    came_from = verbs.place(base, api, **how) if base else None
    own = verbs.trained_for(asked)
    cfg = verbs.measuring(strategy, own, turns, prompts, temperature)
    setting = session.Setting(seed, data, dtype, output_dir, task_settings or (), skip_failed, own.requests, own.layout)
    folder, _ = session.diagnose(asked, task, cfg, setting, came_from)
    study = read.study_of(folder)
    if as_json:
        _print_json(json.loads(study.model_dump_json()))
        return
    verbs.show_diagnosis(folder, study)


@app.command()
@friendly
def report(
    run: Annotated[Path, typer.Argument(help="A run folder, finished or not.")],
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: Json = False,
) -> None:
    """Write the page of a run anew from its files, and print the verdict."""
    from upturn.cli import reports
    from upturn.report import read, terminal

    found, study = read.both(run)
    _print_json(json.loads(study.model_dump_json())) if as_json else typer.echo(terminal.verdict(study))
    path = reports.write_page(found, study, open_page=open_page)  # last: a folder that is only read has a verdict too
    if not as_json:
        typer.echo(f"Report: {path}")


@app.command()
@friendly
def compare(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders; those that differ only in their seed are one arm.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="NAME=RUN,RUN: an arm of these runs. May come again.")] = None,
    against: Annotated[str | None, typer.Option(help="The arm to compare with; the first when not given.")] = None,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("compare.html"),
    as_json: Json = False,
) -> None:
    """Several runs side by side, paired on the same prompts, with intervals, at equal tokens."""
    from upturn.cli import reports

    found = reports.side_by_side(runs or [], arm or [], against, output)
    if as_json:
        _print_json(json.loads(found[1].model_dump_json()))
        return
    reports.show_comparison(*found)


@app.command()
@friendly
def watch(
    run: Annotated[str, typer.Argument(help="A run folder, or the name of a run in runs/.")],
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay when the run has ended; q leaves.")] = False,
) -> None:
    """Look at a run while it goes on, or afterwards."""
    from upturn.cli import watch as view

    view.show(run, once=once, interval=interval, follow=follow)


@app.command(name="list")
@friendly
def list_(
    what: Annotated[
        str | None, typer.Argument(help="tasks, recipes, objectives, strategies, scorers, selection, configs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What there is to choose from."""
    from upturn.cli import verbs

    found = verbs.catalogue(what)
    if as_json:
        _print_json(found)
        return
    for room, entries in found.items():
        typer.secho(room, bold=True)
        width = max(len(name) for name in entries)
        for name, line in entries.items():
            typer.echo(f"  {name:<{width}}  {line}")


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Make language models able to improve their own answers, and prove it."""
    if show:
        from upturn import __version__

        typer.echo(f"upturn {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the console script."""
    # Threads of OpenMP that spin for ever starve every neighbour; threads that sleep too soon wait to be woken in every
    # small step. A millisecond; less where the machine is shared (the Makefile's tests: a tenth).
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    # Imports make a million objects that live to the end: look through them seldom, and not once more when leaving.
    gc.set_threshold(100_000, 20, 20)
    atexit.register(gc.freeze)
    app(prog_name="upturn")


if __name__ == "__main__":
    sys.exit(main())
