"""The words and small parts of a report: differences, flows, labels, numbers, tables of the terminal."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from run_folder import LABELS, chain, chains, summary_of

from upturn.evaluation import assemble
from upturn.evaluation.assemble import Measured
from upturn.evaluation.study import Path as Way
from upturn.report import drawing, flow, tables, terminal, turn_tables
from upturn.report.diff import word_diff
from upturn.report.formats import counted, duration, listing, memory, p_value
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
    # 98 of 100 right: Wilson 93.0 to 99.4
    assert "98.0" in text and "93.0–99.4" in text and "+28.0" in text and "−18.0" in text


def test_the_terminal_shows_the_ends_of_the_intervals():
    # 0 of 30: Wilson 0 to z² / (30 + z²) = 11.4; 30 of 30: the mirror image; 15 of 30: 33.2 to 66.8
    rows = [chain(str(place), False, place < 15, True, True) for place in range(30)]
    measured = summary_of(rows).measurements[0].model_copy(update={"label": "iteration 10"})
    summary = summary_of(rows, measurements=(measured,))
    text = shown_in(80, terminal.turn_table(summary))
    first, second = [line.split() for line in text.splitlines() if "0.0 " in line or "11.4" in line]
    assert first == ["iteration", "10", "0.0", "50.0", "100.0", "100.0", "+100.0", "30", "0%"]
    assert second == ["0.0–11.4", "33.2–66.8", "88.6–100", "88.6–100", "100.0", "to", "100.0", "0"]


def test_four_turns_fit_an_ordinary_terminal():
    rng = np.random.default_rng(0)
    rights = rng.random((2000, 4)) < (0.6, 0.5, 0.4, 0.3)
    rows = [chain(str(place), *map(bool, row)) for place, row in enumerate(rights)]
    measured = summary_of(rows).measurements[0].model_copy(update={"label": "iteration 10"})
    text = shown_in(200, terminal.turn_table(summary_of(rows, measurements=(measured,))))
    assert "iteration 10" in text and max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_terminal_too_narrow_for_the_turns_has_a_line_for_each(width: int):
    rows = [chain(str(place), *(place % (turn + 2) > 0 for turn in range(8))) for place in range(60)]
    text = shown_in(width, terminal.turn_table(summary_of(rows)))
    numbers = re.findall(r"\d+\.\d–\d+(?:\.\d)?", shown_in(1000, terminal.turn_table(summary_of(rows))))
    assert len(numbers) == 8 and "…" not in text and max(map(len, text.splitlines())) <= width
    together = "".join(text.split())
    assert all(number in together for number in numbers) and "turn8" in together
    assert bool(re.search(r"turn 8 +\d+\.\d, \d+\.\d–", text)) == (width in (40, 60, 80))


def test_the_terminal_says_that_no_verifier_judged():
    silent = [replace(attempt, scores=(Score(math.nan, False),) * 2) for attempt in chains(2, 20, 78)]
    text = shown_in(120, terminal.turn_table(summary_of(silent)))
    assert "small: no verifier judged these answers" in text and "right answers" not in text
    [row] = [line for line in text.splitlines() if "base" in line]
    assert row.split() == ["base", *"–––––"]  # two turns, gain, flips, copies
    study = assemble.study(summary_of(silent), [Measured("base", 0, silent)])
    assert terminal.verdict(study).startswith("No verifier judged these answers; ")


def test_the_share_of_a_turn_rests_on_the_answers_that_could_be_judged():
    right, wrong, unknown = chains(1, 0, 0) + chains(0, 1, 0) + chains(1, 0, 0)
    silent = replace(unknown, scores=(Score(math.nan, False),) * 2)
    row = summary_of([right, wrong, silent]).measurements[0].turns[1]
    assert (tables.turn(row).text, tables.turn(row).about) == ("50.0%", "n = 2, Wilson")
    assert tables.rests_on([row]) == "n = 2 prompts. 95% intervals: Wilson."


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


def test_a_p_value_that_the_bootstrap_cannot_tell_is_an_upper_end():
    assert (p_value(2 / 10_001, at_most=True), p_value(0.0136, at_most=True)) == ("≤2·10⁻⁴", "≤0.014")


def test_paths_of_chains_that_ended_early_do_not_claim_every_turn():
    whole = [chain("a", True, True), chain("b", False, True)]
    early = [*whole, chain("c", True)]
    notes = [turn_tables.paths(assemble.study(summary_of(rows), [Measured("base", 0, rows)]).models[0]).note
             for rows in (whole, early)]  # fmt: skip
    assert notes == ["n = 2 prompts, all with every turn.", "n = 3 prompts; a path ends where its chain ended."]


def test_memory_and_lists_read_easily():
    assert (memory(640.4), memory(3277)) == ("640 MiB", "3.2 GiB")
    assert (listing([]), listing(["a"]), listing(["a", "b", "c"])) == ("", "a", "a, b and c")


def test_one_of_a_kind_has_no_plural():
    assert [counted(number, "step") for number in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]
