import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from upturn.errors import RunError
from upturn.evaluation.summary import Stage, Summary, TrainingRow, drafts_file, measure
from upturn.evaluation.turns import majority
from upturn.report import terminal
from upturn.report.diff import word_diff
from upturn.report.page import duration, p_value, write_page
from upturn.report.verdict import verdict
from upturn.types import Attempt, Draft, Prompt, Score, to_json

LABELS = ("base", "sft", "iteration 1")


def chain(id: str, *right: bool, text: str = "an answer") -> Attempt:
    """Turn t is right or wrong as told; every draft says which turn it is."""
    drafts = tuple(
        Draft(t, t + 1, (t - 1,) if t else (), f"{text}, turn {t + 1}", (7, 7), (-1.0, -1.0), "stop", 9, 3)
        for t in range(len(right))
    )
    return Attempt(Prompt(id, f"question {id}"), drafts, tuple(Score(float(r), r) for r in right))


def chains(better: int, worse: int, stayed: int, text: str = "an answer") -> list[Attempt]:
    flips = [(False, True)] * better + [(True, False)] * worse + [(True, True)] * stayed
    return [chain(str(place), *flip, text=text) for place, flip in enumerate(flips)]


def summary_of(*runs: list[Attempt], vote: list[Attempt] | None = None) -> Summary:
    votes = majority(vote, lambda prompt, answer: answer) if vote else None
    measured = [
        measure(label, max(place - 1, 0), attempts, vote=votes)
        for place, (label, attempts) in enumerate(zip(LABELS, runs, strict=False))
    ]
    return Summary(
        upturn="0.1.0",
        recipe="evolve",
        name="small",
        model="tiny",
        task="keywords",
        seed=0,
        status="finished",
        turns=2,
        measurements=tuple(measured),
        training=(
            TrainingRow(
                label="sft",
                iteration=0,
                pairs=12,
                steps=3,
                tokens=90,
                seconds=75,
                dropped={"<tie>": 4},
                final_loss=0.7,
            ),
        ),
        stages=(Stage(name="measure base", seconds=2, cached=True),),
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    runs = [chains(2, 20, 78), chains(5, 5, 90), chains(30, 2, 68, text="<script>alert(1)</script>")]
    summary_of(*runs, vote=runs[2]).write(tmp_path / "summary.json")
    (tmp_path / "config.yaml").write_text("recipe: evolve\nnote: <b>bold</b>\n")
    (tmp_path / "drafts").mkdir()
    for label, attempts in zip(LABELS, runs, strict=True):
        lines = "".join(json.dumps(to_json(attempt)) + "\n" for attempt in attempts)
        (tmp_path / drafts_file(label)).write_text(lines)
    return tmp_path


def test_the_page_needs_nothing_from_outside(run_dir: Path):
    page = write_page(run_dir).read_text()
    assert "http:" not in page and "https:" not in page
    targets = re.findall(r'(?:src=|href=|url\()"?([^")]*)', page)
    assert targets and {target for target in targets if not target.startswith("#")} == {"data:,"}
    assert "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^")]+)', page)
    assert used and set(used) <= set(ids)


def test_the_page_shows_text_from_outside_as_text(run_dir: Path):
    page = write_page(run_dir).read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "note: &lt;b&gt;bold&lt;/b&gt;" in page and "&lt;tie&gt; 4" in page


def test_the_page_names_every_model_and_shows_its_drafts(run_dir: Path):
    page = write_page(run_dir).read_text()
    for label in LABELS:
        assert f"{label}: 30 of 100 prompts" in page
    assert page.index("iteration 1: 30 of") < page.index("sft: 30 of") < page.index("base: 30 of")
    assert "<del>1</del> <ins>2</ins>" in page


def test_the_sample_is_balanced_and_the_lacking_kinds_are_filled(run_dir: Path):
    page = write_page(run_dir).read_text()
    last = page[page.index("iteration 1: 30 of") : page.index("sft: 30 of")]
    counts = {kind: last.count(f'"sample {kind}"') for kind in ("fixed", "broken", "kept", "missed")}
    assert counts == {"fixed": 23, "broken": 2, "kept": 5, "missed": 0}


def test_the_page_is_the_same_twice_and_leaves_nothing_else(run_dir: Path):
    before = {path.name for path in run_dir.iterdir()}
    first = write_page(run_dir).read_bytes()
    assert write_page(run_dir).read_bytes() == first
    assert {path.name for path in run_dir.iterdir()} == before | {"report.html"}
    assert len(first) < 1_000_000


def test_long_drafts_do_not_make_a_long_page(tmp_path: Path):
    attempts = chains(30, 10, 10, text="many words " * 2000)
    summary_of(attempts).write(tmp_path / "summary.json")
    (tmp_path / "drafts").mkdir()
    lines = "".join(json.dumps(to_json(attempt)) + "\n" for attempt in attempts)
    (tmp_path / drafts_file("base")).write_text(lines)
    page = write_page(tmp_path)
    assert page.stat().st_size < 1_000_000
    assert "more characters" in page.read_text()


def test_a_run_without_drafts_config_or_measurements_has_a_page(tmp_path: Path):
    summary_of().write(tmp_path / "summary.json")
    assert "Nothing has been measured yet." in write_page(tmp_path).read_text()
    summary_of([chain("a", True), chain("b", False)]).write(tmp_path / "summary.json")
    assert "The first turn is right 50.0% of the time" in write_page(tmp_path).read_text()


def test_a_broken_line_of_drafts_is_named(run_dir: Path):
    with (run_dir / drafts_file("sft")).open("a") as lines:
        lines.write('{"prompt": \n')
    with pytest.raises(RunError, match=r"sft\.jsonl, line 101"):
        write_page(run_dir)
    with pytest.raises(RunError, match="no such file"):
        write_page(run_dir / "drafts")


def test_the_verdict_says_what_the_interval_allows():
    good = verdict(summary_of(chains(2, 20, 78), chains(0, 0, 100), chains(30, 2, 68)))
    # 30 better, 2 worse of 100: +28 points; before training 2 - 20: -18 points
    assert good.startswith("After 1 iteration, a second turn is right 28.0 points more often than the first (")
    assert "Before training, refining lost 18.0 points (interval −" in good
    assert "The first turn went from 98.0% to 70.0%." in good
    unclear = verdict(summary_of(chains(6, 4, 90)))
    assert unclear.startswith("A second turn is not clearly better or worse than the first: +2.0 points (95% int")
    worse = verdict(summary_of(chains(1, 21, 78)))
    assert worse.startswith("A second turn is right 20.0 points less often than the first (95% interval −")
    stopped = summary_of(chains(6, 4, 90)).model_copy(update={"status": "running"})
    assert verdict(stopped).startswith("So far: a second turn")


def test_the_verdict_compares_with_the_vote_and_its_tokens():
    runs = chains(30, 2, 68)
    told = verdict(summary_of(runs, vote=runs[:50]))
    assert "A vote of 2 direct answers, with 50% fewer tokens, is right" in told
    assert "turn 2 is right 98.0%." in told


def test_word_diff_worked_by_hand():
    assert word_diff("the old cat sat", "the cat sat\ndown") == [
        ("same", "the "),
        ("removed", "old"),
        ("gap", " "),
        ("same", "cat sat\n"),
        ("added", "down"),
    ]
    assert word_diff("one two", "one") == [("same", "one"), ("gap", " "), ("removed", "two"), ("gap", " ")]
    assert word_diff("same", "same") == [("same", "same")]


@given(st.text(alphabet="ab 世\n", max_size=30), st.text(alphabet="ab 世\n", max_size=30))
def test_same_and_added_words_are_the_new_text_and_removed_ones_were_in_the_old(old: str, new: str):
    pieces = word_diff(old, new)
    assert "".join(text for change, text in pieces if change in ("same", "added")) == new
    assert all(text in old for change, text in pieces if change == "removed")
    assert not any(text == "" for _, text in pieces)


def test_the_terminal_shows_the_turns_of_every_model():
    summary = summary_of(chains(2, 20, 78), chains(0, 0, 100), chains(30, 2, 68))
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(terminal.turn_table(summary))
    text = capture.get()
    for label in LABELS:
        assert label in text
    # 98 of 100 right: Wilson 93.0 to 99.4, half of it 3.2
    assert "98.0" in text and "±3.2" in text and "+28.0" in text and "−18.0" in text
    assert max(len(line) for line in text.splitlines()) <= 80  # an ordinary terminal shows it whole


def test_the_terminal_diff_does_not_depend_on_colour():
    text = terminal.diff("a b", "a c")
    assert text.plain == "a b c"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans if span.style}
    assert "strike" in styles["b"] and "underline" in styles["c"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (59.99, "1 min 00 s"), (312.4, "5 min 12 s"), (7500, "2 h 05 min")],
)
def test_durations_read_easily(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(("p", "text"), [(0.031, "0.031"), (1.0, "1.000"), (2.4e-11, "2·10⁻¹¹")])
def test_small_p_values_read_easily(p: float, text: str):
    assert p_value(p) == text
