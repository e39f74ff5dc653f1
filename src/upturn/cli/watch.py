"""`upturn watch`: a run in the terminal, read from its folder alone, so that any run can be watched at any time."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from upturn.evaluation.phrases import counted
from upturn.report.diff import word_diff
from upturn.tracking.replay import Answer, Measured, Replay, Sample, Source, Status, Step

WIDE = 120
"""From so many columns on, the steps stand beside the rest."""
STEPS_WIDTH = 44
SILENT = 60.0
"""Seconds without an event after which a running run is called silent."""
BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 12
"""Columns of a turn curve at most."""
_COLOURS: dict[Status, str] = {"running": "cyan", "finished": "green", "failed": "red"}
_MARKS = {"waiting": ("·", "dim"), "began": ("▶", "cyan"), "done": ("✓", "green"), "cached": ("✓", "dim")}
_CHANGES = {"added": "underline green", "removed": "strike red"}


def show(run: str, *, once: bool, interval: float, follow: bool) -> None:
    """Print a run, again and again while it goes on. Raises RunError where there is none."""
    source, console = Source(_folder(run)), Console()
    replay = source.read()
    if not once and sys.stdout.isatty() and (follow or _goes_on(replay)):
        with suppress(KeyboardInterrupt):
            _live(source, console, interval, follow)
        replay = source.read()
    console.print(frame(replay, time.time(), console.width, coloured=console.is_terminal))


def _folder(run: str) -> Path:
    """A run folder, also by the bare name of a run in runs/."""
    folder = Path(run)
    return Path("runs") / run if not folder.is_dir() and (Path("runs") / run).is_dir() else folder


def _goes_on(replay: Replay) -> bool:
    return replay.status() in ("running", "unknown")


def _live(source: Source, console: Console, interval: float, follow: bool) -> None:
    """Show the run until it ends or q is pressed."""
    with _keyboard() as quit_within, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            replay = source.read()
            width, height = console.size
            live.update(frame(replay, time.time(), width, coloured=True, height=height), refresh=True)
            if not (follow or _goes_on(replay)) or quit_within(interval):
                return


@contextmanager
def _keyboard() -> Iterator[Callable[[float], bool]]:
    """Gives a function that waits for some seconds, or less long when a key is pressed; true for q."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield lambda seconds: bool(time.sleep(seconds))
        return
    import termios
    import tty

    keys = sys.stdin.fileno()
    before = termios.tcgetattr(keys)

    def quit_within(seconds: float) -> bool:
        return bool(select.select([keys], [], [], seconds)[0]) and os.read(keys, 1) in (b"q", b"Q")

    try:
        tty.setcbreak(keys)
        yield quit_within
    finally:
        termios.tcsetattr(keys, termios.TCSADRAIN, before)


def frame(replay: Replay, now: float, width: int, *, coloured: bool, height: int | None = None) -> RenderableType:
    """One picture of a run, `width` columns wide; what matters most stands first, since a terminal cuts the end."""
    wide = width >= WIDE
    room = width - STEPS_WIDTH - 3 if wide else width
    few = 24 if wide else 12
    if height is not None:
        few = max(3, min(few, height - (6 if wide else _lines_beside_steps(replay))))
    steps = [_steps(replay, now, few, STEPS_WIDTH if wide else room)] if replay.steps else []
    parts: list[RenderableType] = []
    if replay.progress:
        parts.append(_progress(replay, room))
    if replay.measured:
        parts.append(_turns(list(replay.measured.values()), room))
    if replay.losses:
        parts.append(_loss(replay, room))
    if not wide:
        parts += steps
    if replay.sample:
        parts.append(_sample(replay.sample, room, coloured))
    body = _spaced(parts or [Text("Nothing has been told yet.", style="dim")])
    if wide and steps:
        columns = Table.grid(padding=(0, 3, 0, 0))
        columns.add_column(width=STEPS_WIDTH)
        columns.add_column(width=room)
        columns.add_row(steps[0], body)
        body = columns
    return _spaced([_header(replay, now, width), body])


def _lines_beside_steps(replay: Replay) -> int:
    """Lines of a narrow frame that are not steps: the header, what else there is, and the two that stand for many."""
    turns = len(replay.measured) + 2 if replay.measured else 0
    sample = min(len(replay.sample.answers), 4) + 2 if replay.sample else 0
    return 3 + 4 * bool(replay.progress) + turns + 3 * bool(replay.losses) + sample + 3


def _spaced(parts: Sequence[RenderableType]) -> RenderableType:
    return Group(*(Padding(part, (0, 0, 0 if part is parts[-1] else 1, 0)) for part in parts))


def _grid(width: int) -> Table:
    """Two columns, the second at the right edge."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.width = width
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_column(justify="right", no_wrap=True)
    return grid


def _header(replay: Replay, now: float, width: int) -> RenderableType:
    start, status = replay.start, replay.status()
    grid = _grid(width)
    past = sum(step.state in ("done", "cached") for step in replay.steps)
    of_all = f"{past} of " if "steps" in start else ""
    steps = f" · {of_all}{counted(len(replay.steps) if of_all else past, 'step')}"
    title = Text.assemble((start.get("name", "run"), "bold"), f" · {start.get('recipe', '')}")
    grid.add_row(title, Text(_standing(replay, now), style=_COLOURS.get(status, "yellow")))
    host = "" if replay.here else f" on {start.get('host')}"
    process = f"pid {start['pid']}{host}" if "pid" in start else ""
    model = str(start.get("model", ""))
    model = Path(model).name if Path(model).is_absolute() else model
    grid.add_row(f"{model} on {start.get('task', '')}{steps}", Text(process, style="dim"))
    lines: list[RenderableType] = [grid]
    if replay.end and replay.end.message and status == "failed":
        lines.append(Text(replay.end.message, style="red"))
    if status in ("killed", "stopped", "failed"):
        lines.append(Text("The same command again goes on where it stopped.", style="dim"))
    return Group(*lines)


def _standing(replay: Replay, now: float) -> str:
    """'running for 12:30' and the like."""
    status, began = replay.status(), replay.start.get("time")
    if status == "unknown":
        return "not finished; it keeps no events"
    if began is None:
        return status
    if status == "running":
        silent = f", silent for {clock(now - replay.last_time)}" if now - replay.last_time > SILENT else ""
        return f"running for {clock(now - began)}{silent}"
    return f"{status} after {clock((replay.end.time if replay.end else replay.last_time) - began)}"


def clock(seconds: float) -> str:
    """'0:07', '2:13', '1:02:13'."""
    minutes, left = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}" if minutes >= 60 else f"{minutes}:{left:02}"


def _progress(replay: Replay, width: int) -> RenderableType:
    now, rate = replay.progress[-1], replay.rate
    head, bar, facts = _grid(width), Table.grid(), []
    head.add_row(Text(now.label, style="bold"), f"{now.done:,}/{now.total:,} {now.unit}")
    bar.add_row(ProgressBar(total=max(now.total, 1), completed=now.done, width=width, complete_style="cyan"))
    if replay.status() == "running" and rate > 0:
        digits = 0 if rate >= 10 else 1 if rate >= 1 else 2
        facts += [f"{rate:,.{digits}f} {now.unit}/s", f"{clock((now.total - now.done) / rate)} left"]
    return Group(head, bar, Text(" · ".join([*facts, *filter(None, [now.extra])])))


def _turns(measured: Sequence[Measured], width: int) -> RenderableType:
    turns = sorted({turn for model in measured for turn in model.accuracy})
    gains = [_gain(model) for model in measured]
    names = min(16, max(len("right in %"), *(len(model.label) for model in measured)))
    others = names + 2 + max(5, min(CURVE, len(turns))) + 2 + max(len("gain in points"), *map(len, gains))
    room = max(2, (width - others) // 8)
    shown = turns if len(turns) <= room else [*turns[: room - 1], turns[-1]]
    shares = [share for model in measured for share in model.accuracy.values()]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False, pad_edge=False)
    table.add_column("right in %", no_wrap=True, overflow="ellipsis", style="bold", max_width=names)
    for turn in shown:
        table.add_column(f"turn {turn}", justify="right", no_wrap=True, min_width=6)
    table.add_column("curve", no_wrap=True, style="cyan")
    table.add_column("gain in points", no_wrap=True)
    for model, gain in zip(measured, gains, strict=True):
        row = [f"{100 * model.accuracy[turn]:.1f}" if turn in model.accuracy else "–" for turn in shown]
        curve = sparkline(list(model.accuracy.values()), CURVE, min(shares), max(shares))
        table.add_row(model.label, *row, curve, gain)
    return table


def _gain(model: Measured) -> Text:
    if model.gain is None:
        return Text("–")
    points, low, high = model.gain
    sign = "+" if points >= 0.05 else ""
    text = f"{sign}{points:.1f} ({low:.1f} to {high:.1f})".replace("-0.0", "0.0").replace("-", "−")
    return Text(text, style="green" if low > 0 else "red" if high < 0 else "")


def sparkline(values: Sequence[float], width: int, low: float | None = None, high: float | None = None) -> str:
    """Values as at most `width` blocks, each the mean of its share of them."""
    count = min(width, len(values))
    cuts = [len(values) * place // count for place in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means, default=0) if low is None else low, max(means, default=0) if high is None else high
    if high <= low:
        return BLOCKS[0] * count
    return "".join(BLOCKS[min(7, int(8 * (mean - low) / (high - low)))] for mean in means)


def _loss(replay: Replay, width: int) -> RenderableType:
    label, losses = list(replay.losses.items())[-1]
    values = [losses[step] for step in sorted(losses)]
    line = sparkline(values, min(60, width - 20))
    head = Text(f"loss of {label}, {counted(len(values), 'step')}", style="dim")
    return Group(head, Text.assemble(f"{values[0]:.4f} ", (line, "cyan"), f" {values[-1]:.4f}"))


def _steps(replay: Replay, now: float, few: int, width: int) -> RenderableType:
    """The steps around the present one; those before and after in a line each."""
    steps, broken = replay.steps, not _goes_on(replay)
    present = next((place for place, step in enumerate(steps) if step.state in ("waiting", "began")), len(steps))
    first = max(0, min(present - few // 2, len(steps) - few))
    grid = _grid(width)
    if before := steps[:first]:
        grid.add_row(
            Text(f"✓ {counted(len(before), 'step')} before", style="dim"), _time(sum(step.seconds for step in before))
        )
    for step in steps[first : first + few]:
        grid.add_row(*_step(step, now, broken))
    if after := steps[first + few :]:
        grid.add_row(Text(f"· {len(after)} more", style="dim"), "")
    return grid


def _time(seconds: float) -> str:
    return clock(seconds) if seconds >= 0.5 else ""


def _step(step: Step, now: float, broken: bool) -> tuple[Text, Text]:
    mark, style = ("✗", "yellow") if broken and step.state == "began" else _MARKS.get(step.state, ("?", ""))
    name = Text.assemble((f"{mark} ", style), (step.name, "dim" if step.state in ("waiting", "cached") else ""))
    match step.state:
        case "began":
            return name, Text("broken off" if broken else clock(now - step.began))
        case "cached":
            return name, Text("done before", style="dim")
    return name, Text(_time(step.seconds))


def _sample(sample: Sample, width: int, coloured: bool) -> RenderableType:
    """An attempt with what each turn changed; without colours a diff reads like one text."""
    head = Text(f"a sample of {sample.label}: {' '.join(sample.prompt.split())}", style="dim")
    head.truncate(2 * width, overflow="ellipsis")
    answers = sample.answers if len(sample.answers) <= 4 else (*sample.answers[:3], sample.answers[-1])
    grid = Table.grid(padding=(0, 1, 0, 0))
    old = ""
    for answer in answers:
        new = " ".join(answer.text.split())
        grid.add_row(_verdict(answer), _changed(old, new, width, coloured))
        old = new
    return Group(head, grid)


def _verdict(answer: Answer) -> Text:
    mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: (" ", "")}[answer.right]
    return Text.assemble((f"{answer.turn} ", "bold"), (mark, style))


def _changed(old: str, new: str, width: int, coloured: bool) -> Text:
    if old == new:
        return Text("unchanged" if new else "(empty)", style="dim")
    pieces = word_diff(old, new) if coloured and old else [("same", new)]
    text = Text.assemble(*((piece, _CHANGES.get(change, "")) for change, piece in pieces))
    text.truncate(3 * (width - 6), overflow="ellipsis")
    return text
