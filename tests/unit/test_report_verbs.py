"""`upturn report` and `upturn compare`: what they print and write, and how runs become arms."""

from __future__ import annotations

import importlib
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import run_folder
from outline import Outline
from run_folder import chains, direct, summary_of
from typer.testing import CliRunner

from upturn.cli import reports
from upturn.cli.main import app
from upturn.errors import RunError
from upturn.evaluation.compare import Comparison
from upturn.evaluation.study import Study
from upturn.report import arms, read
from upturn.report import comparison as pages
from upturn.types import Attempt


def test_report_prints_the_verdict_and_writes_the_page(tmp_path: Path):
    runs = [chains(30, 2, 68)]
    run_folder.write(tmp_path, summary_of(*runs, training=[], stages=[]), runs)
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("It refines: turn 2 is right 28.0 points more often than turn 1")
    assert str(tmp_path / "report.html") in done.stdout and (tmp_path / "report.html").is_file()
    printed = CliRunner().invoke(app, ["report", str(tmp_path), "--json"])
    assert Study.model_validate_json(printed.stdout) == read.study_of(tmp_path)
    lacking = CliRunner().invoke(app, ["report", str(tmp_path / "none")])
    assert lacking.exit_code == 2 and "There is no such folder" in lacking.stderr


def a_run(folder: Path, attempts: list[Attempt], seed: int = 0, rate: float = 0.1) -> Path:
    config = (
        f"recipe: evolve\nseed: {seed}\nrate: {rate}\noutput_dir: {folder}\ntask: {{name: keywords, seed: {seed}}}\n"
    )
    summary = summary_of(attempts, name=folder.name, seed=seed)
    return run_folder.write(folder, summary, [attempts], [direct([[True, False]] * len(attempts))], config)


@pytest.fixture
def arm_runs(tmp_path: Path) -> list[Path]:
    """Two seeds of one config, and one run of another that refines less."""
    good = [a_run(tmp_path / f"good-{seed}", chains(30, 2 + seed, 68 - seed), seed) for seed in (0, 1)]
    return [*good, a_run(tmp_path / "plain", chains(5, 5, 90), rate=0.2)]


def test_runs_that_differ_only_in_their_seed_are_one_arm(arm_runs: list[Path]):
    first, second, plain = arm_runs
    found, notes = reports.arms_of(arm_runs, [])
    assert found == {"good-0": [first, second], "plain": [plain]}
    assert len(notes) == 1 and "differ only in their seed: one arm, good-0" in notes[0]
    named, notes = reports.arms_of([plain], [f"both={first},{second}"])
    assert named == {"both": [first, second], "plain": [plain]} and notes == []
    alone, notes = reports.arms_of([first, second], [])
    assert alone == {"good-0": [first], "good-1": [second]} and "between seeds" in notes[0]


def test_equal_names_and_equal_seeds_stay_apart(tmp_path: Path):
    one, two = (a_run(tmp_path / place / "demo", chains(5, 5, 90)) for place in ("a", "b"))
    assert reports.arms_of([one, two], [])[0] == {"demo": [one], "b/demo": [two]}


@pytest.mark.parametrize(
    ("explicit", "what"),
    [(["x"], "not of the form"), (["x=good-0", "x=plain"], "same name"), (["x=good-0,good-0"], "given twice")],
)
def test_arms_that_make_no_sense_are_named(
    arm_runs: list[Path], explicit: list[str], what: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(arm_runs[0].parent)
    with pytest.raises(RunError, match=what):
        reports.arms_of([], explicit)


def test_compare_writes_a_page_and_prints_tables(arm_runs: list[Path], tmp_path: Path):
    output = tmp_path / "both.html"
    wanted = ["compare", *map(str, arm_runs), "--output", str(output), "--against", "plain"]
    done = CliRunner().invoke(app, wanted, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    for told in ("one arm, good-0", "+27.5", "vote", "bootstrap", str(output)):
        assert told in done.stdout.replace("\n", ""), told
    page = output.read_text()
    outline = Outline(page)
    assert set(outline.used) <= set(outline.ids) and "http" not in page
    assert re.findall(r'<section aria-labelledby="(\w+)"', page) == ["curves", "contrasts", "arms", "how"]
    found = Comparison.model_validate_json(CliRunner().invoke(app, [*wanted, "--json"]).stdout)
    assert [arm.name for arm in found.arms] == ["plain", "good-0"]
    assert {contrast.before for contrast in found.contrasts} == {"plain"}
    wrong = CliRunner().invoke(app, [*wanted[:-1], "nobody"])
    assert wrong.exit_code == 2 and "Choose one of: good-0, plain" in wrong.stderr


def test_holm_counts_only_the_contrasts_that_are_shown(arm_runs: list[Path], tmp_path: Path):
    worse = a_run(tmp_path / "worse", chains(2, 20, 78), rate=0.3)
    _, found, _, _ = reports.side_by_side([*arm_runs, worse], [], None, tmp_path / "page.html")
    assert {(c.before, c.after) for c in found.contrasts} == {("good-0", "plain"), ("good-0", "worse")}
    least = min(found.contrasts, key=lambda contrast: contrast.p_value)
    assert least.p_holm == pytest.approx(len(found.contrasts) * least.p_value)


def test_the_curve_of_an_arm_is_the_mean_of_its_runs(arm_runs: list[Path]):
    loaded = {"good": [reports.last_model(folder) for folder in arm_runs[:2]]}
    (curve,) = arms.curves(loaded)
    # right at first: 2 + 68 and 3 + 67 of 100; at last: 30 + 68 and 30 + 67 of 100
    assert [estimate.value for estimate in curve.accuracy] == pytest.approx([0.70, 0.975])
    assert (curve.fixed.value, curve.broken.value) == pytest.approx((0.30, 0.025))
    assert curve.accuracy[0].how == "bootstrap over seeds and prompts"
    assert curve.tokens == (2, 4)


def page_of(found: dict[str, list[Path]], output: Path) -> str:
    named = [f"{name}={','.join(map(str, runs))}" for name, runs in found.items()]
    page, *_ = reports.side_by_side([], named, None, output)
    return unescape(re.sub("<[^>]*>", "", page.read_text()))


def test_a_page_says_how_far_few_seeds_can_be_trusted(arm_runs: list[Path], tmp_path: Path):
    first, second, plain = arm_runs
    several = page_of({"plain": [plain], "good": [first, second]}, tmp_path / "several.html")
    assert pages.FEW_SEEDS in several and "≤" in several
    assert "share their prompts, runs and prompts are drawn again" in several
    assert "has prompts of its own, runs are drawn again, and then prompts within each drawn run" in several
    assert pages.FEW_SEEDS not in page_of({"plain": [plain], "good": [first]}, tmp_path / "single.html")


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return importlib.import_module(name)


def test_the_table_of_arms_never_tells_a_p_of_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # last turns: 5 of 100 right against 98: 93 flips in one direction
    runs = {"old": chains(5, 95, 0), "new": chains(93, 0, 7), "same": chains(5, 95, 0)}
    folders = {name: [a_run(tmp_path / name, attempts)] for name, attempts in runs.items()}
    rows = script("arms_table", monkeypatch).table(folders).splitlines()
    assert [row.split(" | ")[-1] for row in rows[2:]] == [" |", "<0.001 |", "1.000 |"]


def test_the_table_of_arms_tells_the_smallest_p_as_an_upper_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ways = {"old": chains(0, 9, 0), "a": chains(9, 0, 0), "b": chains(9, 0, 0)}
    folders = {
        name: [a_run(tmp_path / f"{name}-{seed}", attempts, seed) for seed in (0, 1)] for name, attempts in ways.items()
    }
    rows = script("arms_table", monkeypatch).table(folders).splitlines()
    # eight contrasts, all at 2 / 10,001
    assert rows[-1].endswith("| +100.0 (+100.0 to +100.0) | ≤0.002 |")


def test_pooled_tables_have_the_turns_that_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for seed in (0, 1):  # four drafts in two turns
        run_folder.write(tmp_path / str(seed), summary_of(chains(5, 1, 4), turns=4), [chains(5, 1, 4)])
    script("pool", monkeypatch).main([str(tmp_path / "0"), str(tmp_path / "1")])
    head, _, base, *_ = capsys.readouterr().out.splitlines()
    assert head.startswith("| model | turn 1 | turn 2 | gain")
    assert base.startswith("| base | 50.0 | 90.0 | +40.0 (") and base.endswith("| 10 | 2 |  |")


def test_a_run_without_measurements_cannot_be_compared(tmp_path: Path, arm_runs: list[Path]):
    empty = run_folder.write(tmp_path / "empty", summary_of(), [])
    with pytest.raises(RunError, match="Nothing has been measured yet"):
        reports.side_by_side([arm_runs[0], empty], [], None, tmp_path / "page.html")


def refused(arguments: list[str]) -> tuple[str, str]:
    """What a verb that must fail prints, and its message."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    return done.stdout, done.stderr


def test_compare_says_what_to_name(arm_runs: list[Path]):
    assert "No run is named.\n    Name two run folders" in refused(["compare"])[1]
    assert "There is only one arm, plain.\n" in refused(["compare", str(arm_runs[2])])[1]


def test_a_page_that_cannot_be_written_is_told_behind_the_verdict(arm_runs: list[Path]):
    run = arm_runs[2]
    (run / "report.html").mkdir()
    printed, said = refused(["report", str(run)])
    assert printed.startswith("It ") and "Report:" not in printed
    assert said.startswith(f"{run / 'report.html'}\n    The page cannot be written: Is a directory.\n    Move this")
    assert Study.model_validate_json(refused(["report", str(run), "--json"])[0]) == read.study_of(run)
    assert not list(run.glob(".report*")), "half a page is taken away"


@pytest.mark.parametrize(("place", "mend"), [("none", "Make the folder"), ("file", "See that")])
def test_a_comparison_that_cannot_be_written_is_told(arm_runs: list[Path], tmp_path: Path, place: str, mend: str):
    (tmp_path / "file").write_text("")
    _, said = refused(["compare", *map(str, arm_runs), "--output", str(tmp_path / place / "c.html")])
    assert "The page cannot be written: " in said and f"    {mend} " in said


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "drafts/base.jsonl"])
@pytest.mark.parametrize("verb", ["report", "compare"])
def test_a_file_that_may_not_be_read_is_told(
    arm_runs: list[Path], monkeypatch: pytest.MonkeyPatch, verb: str, name: str
):
    open_it = Path.open

    def closed(path: Path, *how: Any, **more: Any) -> Any:
        if path == arm_runs[2] / name:
            raise PermissionError(13, "Permission denied", str(path))
        return open_it(path, *how, **more)

    monkeypatch.setattr(Path, "open", closed)
    runs = arm_runs[2:] if verb == "report" else arm_runs
    said = refused([verb, *map(str, runs)])[1]
    assert said.startswith(f"{arm_runs[2] / name}\n    It cannot be read: ") and "Permission denied" in said


def test_a_line_that_is_no_text_and_a_summary_that_is_none_are_told(arm_runs: list[Path]):
    run = arm_runs[2]
    with (run / "drafts" / "base.jsonl").open("ab") as lines:
        lines.write(b"\xff\xfe\n")
    assert f"{run / 'drafts' / 'base.jsonl'}, line 101\n" in refused(["report", str(run)])[1]
    (run / "summary.json").write_text('{"seed": "x"}')
    said = refused(["report", str(run)])[1]
    assert "upturn: Field required; recipe: Field required; name: Field required; and 5 more." in said
    assert "http" not in said


def test_a_difference_that_only_holm_doubts_is_not_called_none(arm_runs: list[Path], tmp_path: Path):
    _, found, _, _ = reports.side_by_side(arm_runs[1:], [], None, tmp_path / "page.html")
    last = next(c for c in found.contrasts if c.what == "last turn")

    def said(low: float, high: float) -> str:
        difference = last.difference.model_copy(update={"value": 0.175, "low": low, "high": high})
        known = last.model_copy(update={"p_holm": 0.062, "difference": difference})
        (sentence,) = pages.headlines(found.model_copy(update={"contrasts": (known,)}))
        return sentence

    assert "17.5 points more often than good-1 at its last turn, but that is not proven after Holm's" in said(0.05, 0.3)
    assert "cannot be told apart" in said(-0.01, 0.3)


def test_tables_keep_their_numbers_in_a_pipe_and_in_a_narrow_terminal(arm_runs: list[Path], tmp_path: Path):
    wanted = ["compare", *map(str, arm_runs), "--output", str(tmp_path / "page.html")]
    wide = CliRunner().invoke(app, wanted, env={"COLUMNS": ""}).stdout
    narrow = CliRunner().invoke(app, wanted, env={"COLUMNS": "40"}).stdout
    numbers = set(re.findall(r"\d+\.\d", wide))
    assert "…" not in wide + narrow and numbers and numbers == set(re.findall(r"\d+\.\d", narrow))
    assert max(map(len, narrow.replace(str(tmp_path), "").splitlines())) <= 40 < max(map(len, wide.splitlines()))
