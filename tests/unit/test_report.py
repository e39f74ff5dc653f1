from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import run_folder
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from run_folder import HOSTILE, LABELS, chain, chains, direct, summary_of
from typer.testing import CliRunner

from upturn.cli import reports
from upturn.cli.main import app
from upturn.errors import RunError
from upturn.evaluation.compare import Comparison
from upturn.evaluation.study import Path as Way
from upturn.evaluation.study import Study
from upturn.evaluation.summary import Summary, drafts_file
from upturn.report import arms, drafts, drawing, flow, read, terminal
from upturn.report.diff import word_diff
from upturn.report.formats import duration, listing, memory, p_value
from upturn.report.page import write_page
from upturn.strategies import critique_refine
from upturn.types import Attempt, Draft, Kind, Prompt, Score, answers


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder.whole(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_page(run).read_text()


class Outline(HTMLParser):
    """Tags, ids and references of a page; unbalanced tags are an error."""

    VOID = frozenset({"meta", "link", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.used: list[str] = []
        self.targets: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        for name, value in attrs:
            words = (value or "").split()
            self.ids += words if name == "id" else []
            self.used += words if name == "aria-labelledby" else []
            self.targets += words if name in ("src", "href", "xlink:href") else []

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()


def test_the_page_is_whole_and_needs_nothing_from_outside(page: str):
    outline = Outline(page)
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert {target for target in outline.targets if not target.startswith("#")} == {"data:,"}
    assert len(outline.ids) == len(set(outline.ids))
    anchors = [target[1:] for target in outline.targets if target.startswith("#")]
    inside = re.findall(r"url\(#([^)]+)\)", page)
    assert anchors and inside and outline.used
    assert {*anchors, *inside, *outline.used} <= set(outline.ids)
    assert outline.tags.count("script") == 1


def test_every_colour_of_a_figure_is_in_the_style_sheet(page: str):
    used = set(re.findall(r"var\(--([\w-]+)\)", page))
    light, dark = page.split("@media screen and (prefers-color-scheme: dark)", 1)
    assert used <= set(re.findall(r"--([\w-]+):", light))
    same_in_both = {"sans", "serif", "mono"}
    assert set(re.findall(r"--([\w-]+):", light)) - same_in_both <= set(re.findall(r"--([\w-]+):", dark))
    assert "#fe00" not in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_have_contrast(page: str, scheme: str):
    light, dark = page.split("@media screen and (prefers-color-scheme: dark)", 1)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#\w{6})", dark))
    for name in ("ink", "muted", "accent", "right-text", "wrong-text"):
        for ground in ("paper", "raised"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    assert contrast(colours["ink"], colours["right-wash"]) >= 4.5
    assert contrast(colours["wrong-text"], colours["wrong-wash"]) >= 4.5
    lines = [
        name for name in colours if name.startswith("series") or name in ("right", "wrong", "vote", "best", "fresh")
    ]
    assert len(lines) == 13
    for name in lines:
        assert contrast(colours[name], colours["paper"]) >= 3, name


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, section 1.4.3: (lighter + 0.05) / (darker + 0.05) of the relative luminances."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_figure_has_a_name_a_description_and_a_size_for_the_phone(page: str):
    figures = re.findall(r'<svg role="img" aria-labelledby="(\S+)-title \1-desc"', page)
    wide = {name.removesuffix("-wide") for name in figures if name.endswith("-wide")}
    assert wide == {"turns", "flow", "cost", "pass", "drift", "loss"}
    assert {name.removesuffix("-narrow") for name in figures if name.endswith("-narrow")} == wide
    # 20 + 78 of 100 are right at the first turn of the base, 2 + 78 at its last
    assert "base: turn 1 98.0%, turn 2 80.0%" in page
    assert "iteration 1: turn 1 to 2: 31 fixed, 2 broken" in page


def test_the_page_shows_the_verdict_and_every_panel(run: Path, page: str):
    study = read.study_of(run)
    assert study.verdict and study.verdict.kind == "refines"
    assert study.verdict.sentence.split(";")[0] in re.sub("<[^>]*>", "", page)
    shown = re.findall(r'<section[^>]* aria-labelledby="(\w+)"', page)
    wanted = "turns advice transitions tests cost ceilings drift pairs drafts stages how config"
    assert shown == wanted.split()
    for told in ("Holm", "detectable", "n = 100 prompts. 95% intervals:", "when a draft repeats", "640 MiB", "75.0%"):
        assert told in page, told


def test_text_from_outside_is_text(page: str):
    assert "<script>alert" not in page and "<!--" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "note: &lt;b&gt;bold&lt;/b&gt;" in page and "&lt;tie&gt;" in page
    assert "bell ␇, escape ␛[31m, nul ␀," in page and "half �" in page
    assert "שלום עולם, 世界こんにちは" in page and "{{ 7 * 7 }}" in page


def test_drafts_are_a_balanced_choice_and_the_page_says_of_how_many(run: Path, page: str):
    last = [shown for shown in re.findall(r'data-model="iteration 1" data-kind="(\w+)"', page)]
    # 31 were fixed and 2 broken; nobody stayed wrong, so the others fill the places up to 60
    assert {kind: last.count(kind) for kind in drafts.KINDS} == {"fixed": 31, "broken": 2, "kept": 27, "missed": 0}
    shelf = drafts.shelf([(one.label, one.chain) for one in read.read(run).measured], "keywords")
    assert shelf.labels == list(reversed(LABELS))
    assert [cell.text for cell in shelf.tally.rows[0]][1:] == ["31 of 31", "2 of 2", "27 of 67", "0 of 0", "60 of 100"]
    assert "<del>1</del> <ins>2</ins>" in page


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=200))
def test_a_choice_is_as_large_as_can_be_and_leaves_no_kind_out(flips: list[tuple[bool, bool]]):
    attempts = [chain(str(place), *flip) for place, flip in enumerate(flips)]
    chosen = drafts.balanced(attempts)
    assert len(chosen) == min(drafts.MOST, len(attempts))
    assert len({attempt.prompt.id for attempt in chosen}) == len(chosen)
    for kind in drafts.KINDS:
        whole = sum(drafts.kind_of(attempt) == kind for attempt in attempts)
        assert sum(drafts.kind_of(attempt) == kind for attempt in chosen) >= min(
            whole, drafts.MOST // len(drafts.KINDS)
        )


def test_long_drafts_are_cut_and_many_do_not_make_a_long_page(tmp_path: Path):
    runs = [chains(40, 40, 20, text='"many" <words> ' * 400)] * 3
    run_folder.write(tmp_path, summary_of(*runs), runs)
    page = write_page(tmp_path)
    assert 1_000_000 < page.stat().st_size < 5_000_000
    text = page.read_text()
    assert "more characters" in text
    shown = [text.count(f'data-model="{label}"') for label in LABELS]
    assert min(shown) > 0 and max(shown) - min(shown) <= 1


def criticised(*critiques: str, kept: Sequence[int] = ()) -> Attempt:
    """A chain whose later drafts followed these critiques; at the turns in `kept` nothing was asked of the model."""
    plain = chain("criticised", *[True] * (len(critiques) + 1))
    drafts = list(plain.drafts)
    for place, critique in enumerate(critiques, 1):
        tokens = len(critique.split())
        if place + 1 in kept:
            text = drafts[place - 1].text
            drafts[place] = replace(drafts[place], text=text, kept=True, num_tokens_told=tokens, prompt_tokens=0)
        drafts[place] = replace(drafts[place], critique=critique)
    return replace(plain, drafts=tuple(drafts))


def page_of(folder: Path, *attempts: Attempt) -> str:
    run_folder.write(folder, summary_of(list(attempts), training=[], stages=[]), [list(attempts)])
    page = write_page(folder).read_text()
    Outline(page)
    return page


def articles(page: str) -> list[tuple[str, str]]:
    """(critique, last line) of each draft on a page, as a reader sees them."""
    found = re.findall(r"<article.*?</article>", page, re.DOTALL)
    return [(_seen("critique", article), _seen("about", article)) for article in found]


def _seen(name: str, article: str) -> str:
    found = re.search(f'<p class="{name}">(.*?)</p>', article, re.DOTALL)
    return unescape(re.sub("<[^>]*>", "", found[1])) if found else ""


def test_a_critique_stands_above_the_draft_that_followed_it(tmp_path: Path):
    page = page_of(tmp_path, criticised("Too long.\nAdd a word.", "No changes needed.", "", kept=(3, 4)))
    assert articles(page) == [
        ("", "score 1 · 2 tokens"),
        ("critique: Too long.\nAdd a word.", "score 1 · 2 tokens with the critique"),
        ("critique: No changes needed.", "score 1 · kept · 3 tokens with the critique"),
        ("", "score 1 · kept · 0 tokens"),
    ]
    second = page.split("<article")[2]
    assert re.findall(r'<p class="(\w+)"', second) == ["critique", "text", "about"]
    assert "critique of the one before" in page


def test_what_the_strategy_keeps_is_told_as_kept():
    said = iter(["a", "Longer.", "a b", "No changes needed."])

    async def sample(prompt: Prompt, shown: Sequence[Draft], request: str = "", kind: Kind = "answer") -> Draft:
        turn = 1 + sum(draft.kind == "answer" for draft in shown) - (kind == "critique")
        parents, text = tuple(draft.index for draft in shown), next(said)
        index = max(parents, default=-1) + 1
        return Draft(index, turn, parents, text, (7,) * len(text.split()), (), "stop", 9, 0, None, kind, request)

    prompt = Prompt("a", "question")
    made = asyncio.run(critique_refine.generate(prompt, sample, critique_refine.Config(turns=4)))
    [attempt] = answers([Attempt(prompt, tuple(made))])
    scored = replace(attempt, scores=(Score(1.0, True),) * 4)
    [shown] = drafts.shelf([("base", [scored])], "keywords").shown
    assert [(str(draft.critique), *draft.about[1:]) for draft in shown.drafts] == [
        ("", "1 tokens"),
        ("Longer.", "3 tokens with the critique"),
        ("No changes needed.", "kept", "3 tokens with the critique"),
        ("", "kept", "0 tokens"),
    ]


def test_a_critique_is_text_and_is_cut_like_a_draft(tmp_path: Path):
    page = page_of(tmp_path, criticised(HOSTILE), criticised("x" * (drafts.LONGEST + 7)))
    assert "<script>alert" not in page and "<!--" not in page
    shown = [critique for critique, _ in articles(page) if critique]
    assert shown[0] == f"critique: {drafts.visible(HOSTILE)}"
    assert shown[1] == f"critique: {'x' * drafts.LONGEST} … and 7 more characters"


def test_long_critiques_do_not_make_a_long_page(tmp_path: Path):
    page = page_of(tmp_path, *[criticised(*['"' * drafts.LONGEST] * 5)] * 60)
    # a quotation mark is five bytes on the page: all sixty would be 4.5 million
    assert 1_000_000 < len(page) < drafts.BYTES + 300_000


def test_drafts_without_critiques_say_nothing_of_them(page: str):
    assert 'class="critique"' not in page and "critique of the one before" not in page


def test_an_endpoint_that_counts_no_tokens_kept_nothing():
    plain = chain("a", True, True)
    uncounted = tuple(replace(draft, text="same", prompt_tokens=0, token_ids=()) for draft in plain.drafts)
    [attempt] = drafts.shelf([("base", [replace(plain, drafts=uncounted)])], "keywords").shown
    assert attempt.drafts[1].about == ("score 1", "unchanged", "0 tokens")


def test_the_page_is_the_same_twice_and_leaves_nothing_else(run: Path, page: str):
    before = {path.name for path in run.iterdir()}
    assert write_page(run).read_text() == page
    assert {path.name for path in run.iterdir()} == before


def test_panels_without_data_are_left_out(tmp_path: Path):
    nothing = summary_of(training=[], stages=[], status="running")
    page = write_page(run_folder.write(tmp_path / "new", nothing, [], config="")).read_text()
    assert "Nothing has been measured yet." in page and "running" in page
    assert re.findall(r'<section[^>]* aria-labelledby="(\w+)"', page) == ["how"]
    runs = [[chain("a", True), chain("b", False)]]
    single = run_folder.write(tmp_path / "one", summary_of(*runs, training=[], stages=[], turns=1), runs)
    (single / "metrics.jsonl").unlink()
    page = write_page(single).read_text()
    assert re.findall(r'<section[^>]* aria-labelledby="(\w+)"', page) == ["turns", "drift", "drafts", "how", "config"]
    Outline(page)


def test_many_models_and_turns_have_a_page(tmp_path: Path):
    ways = [[place % (turn + 2) == 0 for turn in range(9)] for place in range(30)]
    attempts = [chain(str(place), *way) for place, way in enumerate(ways)]
    summary = summary_of(attempts, turns=9)
    many = [summary.measurements[0].model_copy(update={"label": f"iteration {k}", "iteration": k}) for k in range(8)]
    run_folder.write(tmp_path, summary.model_copy(update={"measurements": tuple(many)}), [attempts] * 8)
    Outline(write_page(tmp_path).read_text())


def test_missing_and_broken_files_are_named(tmp_path: Path):
    run_folder.whole(tmp_path)
    (tmp_path / drafts_file("base")).unlink()
    (tmp_path / drafts_file("sft")).unlink()
    with pytest.raises(RunError, match=r"base\.jsonl, .*sft\.jsonl"):
        write_page(tmp_path)
    run_folder.whole(tmp_path)
    with (tmp_path / drafts_file("sft")).open("a") as lines:
        lines.write('{"prompt": \n')
    with pytest.raises(RunError, match=r"sft\.jsonl, line 101"):
        write_page(tmp_path)
    with pytest.raises(RunError, match="no such file"):
        write_page(tmp_path / "drafts")
    with pytest.raises(RunError, match="no such folder"):
        write_page(tmp_path / "other")


def test_a_run_in_progress_is_read_up_to_its_last_whole_step(tmp_path: Path):
    run_folder.whole(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write(
            '{"label": "sft", "step": 4, "loss": null}\n{"label": "iteration 1", "step": 1, "loss": 0.5}\n{"lab'
        )
    assert read.read(tmp_path).losses == (("sft", (1.0, 0.5, 1 / 3)), ("iteration 1", (0.5,)))


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


# report and compare, the verbs


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


def test_a_run_without_measurements_cannot_be_compared(tmp_path: Path, arm_runs: list[Path]):
    empty = run_folder.write(tmp_path / "empty", summary_of(), [])
    with pytest.raises(RunError, match="Nothing has been measured yet"):
        reports.side_by_side([arm_runs[0], empty], [], None, tmp_path / "page.html")


def test_the_summary_is_read_as_it_was_written(run: Path):
    assert read.read(run).summary == Summary.read(run / "summary.json")
    assert json.loads((run / "summary.json").read_text())["measurements"][2]["label"] == "iteration 1"
    assert any(attempt.drafts[0].text.startswith(HOSTILE) for attempt in read.read(run).measured[2].chain)
