"""The words and small parts of a report: differences, flows, labels, numbers, tables of the terminal."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from run_folder import LABELS, chains, summary_of

from upturn.evaluation import assemble
from upturn.evaluation.assemble import Measured
from upturn.evaluation.study import Path as Way
from upturn.report import drawing, flow, terminal
from upturn.report.diff import word_diff
from upturn.report.formats import duration, listing, memory, p_value
from upturn.types import Score


def test_the_flow_counts_prompts_between_turns():
    ways = [Way(pattern="wrr", count=5), Way(pattern="rwr", count=2), Way(pattern="w", count=1)]
    # the last chain ended early and keeps its wrong answer
    assert [dict(step) for step in flow.steps(ways)] == [{"wr": 5, "rw": 2, "ww": 1}, {"rr": 5, "wr": 2, "ww": 1}]


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.01, 0.3))
def test_labels_are_pushed_apart_and_keep_their_order(values: list[float], gap: float):
    moved = drawing.apart(values, gap)
    for place, value in enumerate(values):
        for other, next_value in enumerate(values):
            if value < next_value:
                assert moved[other] - moved[place] > 0.9 * gap


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


def shown_in(width: int, *what: object) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(*what)
    return capture.get()


def test_the_terminal_shows_the_turns_of_every_model():
    summary = summary_of(chains(2, 20, 78), chains(0, 0, 100), chains(30, 2, 68))
    text = shown_in(120, terminal.turn_table(summary))
    for label in LABELS:
        assert label in text
    # 98 of 100 right: Wilson 93.0 to 99.4, half of it 3.2
    assert "98.0" in text and "±3.2" in text and "+28.0" in text and "−18.0" in text
    assert max(len(line) for line in text.splitlines()) <= 80  # an ordinary terminal shows it whole


def test_the_terminal_says_that_no_verifier_judged():
    silent = [replace(attempt, scores=(Score(math.nan, False),) * 2) for attempt in chains(2, 20, 78)]
    text = shown_in(120, terminal.turn_table(summary_of(silent)))
    assert "small: no verifier judged these answers" in text and "right answers" not in text
    [row] = [line for line in text.splitlines() if "base" in line]
    assert row.split() == ["base", *"––––––"]  # two turns, gain, flips, copies
    study = assemble.study(summary_of(silent), [Measured("base", 0, silent)])
    assert terminal.verdict(study).startswith("No verifier judged these answers; ")


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


@pytest.mark.parametrize(("p", "text"), [(0.031, "0.031"), (1.0, "1.000"), (2.4e-11, "2·10⁻¹¹"), (0.0, "<10⁻⁹⁹")])
def test_small_p_values_read_easily(p: float, text: str):
    assert p_value(p) == text


def test_memory_and_lists_read_easily():
    assert (memory(640.4), memory(3277)) == ("640 MiB", "3.2 GiB")
    assert (listing([]), listing(["a"]), listing(["a", "b", "c"])) == ("", "a", "a, b and c")
