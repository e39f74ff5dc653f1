"""The page of a run: whole, readable for everybody, with all that the run found and nothing that it did not."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import run_folder
from hypothesis import given
from hypothesis import strategies as st
from outline import Outline
from run_folder import HOSTILE, LABELS, chain, chains, summary_of

from upturn.errors import RunError
from upturn.evaluation.summary import Summary, drafts_file
from upturn.report import drafts, read
from upturn.report.page import write_page
from upturn.strategies import critique_refine
from upturn.types import Attempt, Draft, Kind, Prompt, Score, answers, to_json


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder.whole(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_page(run).read_text()


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


def silent(attempts: Sequence[Attempt]) -> list[Attempt]:
    """As a task without a verifier judges them."""
    return [replace(a, scores=(Score(math.nan, False, "no verifier"),) * len(a.drafts)) for a in attempts]


def test_a_page_says_that_no_verifier_judged(tmp_path: Path):
    runs = [silent(chains(2, 20, 78)), silent(chains(30, 2, 68))]
    answers = silent(run_folder.direct([[True, False]] * 100))
    run_folder.write(tmp_path, summary_of(*runs, vote=answers), runs, [answers] * 2)
    for label, attempts in zip(LABELS, runs, strict=False):
        judged = [json.dumps(to_json(attempt)) for attempt in run_folder.rewarded(attempts)]
        (tmp_path / drafts_file(label, reward=True)).write_text("\n".join(judged))
    page = write_page(tmp_path).read_text()
    Outline(page)
    seen = unescape(re.sub("<[^>]*>", "", page))
    # the scorer gives a draft its index: 0 at the first turn, 1 at the last
    told = "No verifier judged these answers. Only the reward says how turns compare: its mean is 0 at the first turn"
    assert f"{told} and 1 at the last." in seen
    wanted = ["turns", "drift", "pairs", "drafts", "stages", "how", "config"]
    assert re.findall(r'<section[^>]* aria-labelledby="(\w+)"', page) == wanted
    # accuracies of 0 of 100 would have intervals from 0.0 on
    for false in ("0.0 to", "gamed", "Unclear", "✗", "✓", "wrong → right", "stayed wrong", "precise"):
        assert false not in seen, false
    drafts_seen = articles(page)
    assert drafts_seen and {last for _, last in drafts_seen} == {"no verifier · 2 tokens"}
    assert page.count("– not judged") == len(drafts_seen) and 'aria-label="not judged, not judged"' in page
    assert "60 of 100" in seen


def test_a_page_without_rewards_or_verifier_compares_nothing(tmp_path: Path):
    page = page_of(tmp_path, *silent(chains(2, 20, 78)))
    assert "Without one, and without rewards, turns cannot be compared." in page


def test_a_draft_without_a_judgement_among_others_is_not_called_wrong(tmp_path: Path):
    [half] = chains(1, 0, 0)
    page = page_of(tmp_path, replace(half, scores=(Score(math.nan, False), Score(1.0, True))))
    assert re.findall(r'class="verdict">(.*?)<', page) == ["– not judged", "✓ right"]
    assert 'data-kind="" data-path="nr"' in page
    # it takes no place of another, and is among all of them
    unknown = replace(half, scores=(Score(math.nan, False), Score(1.0, True)))
    [row] = drafts.shelf([("base", [unknown, *chains(9, 0, 0)])], "keywords").tally.rows
    assert [cell.text for cell in row][1:] == ["9 of 9", "0 of 0", "0 of 0", "0 of 0", "10 of 10"]


def test_a_kind_compares_the_answers_of_the_first_and_the_last_turn():
    made, wrong, right = chain("a", True, True, True, True), Score(0.0, False), Score(1.0, True)

    def kind(turns: Sequence[int], scores: Sequence[Score]) -> str:
        several = tuple(replace(draft, turn=turn) for draft, turn in zip(made.drafts, turns, strict=True))
        return drafts.kind_of(replace(made, drafts=several, scores=tuple(scores)))

    # a star is judged by the first of its refinements, two chains by the first one
    assert kind([1, 2, 2, 2], [wrong, wrong, right, right]) == "missed"
    assert kind([1, 2, 2, 2], [wrong, right, wrong, wrong]) == "fixed"
    assert kind([1, 1, 2, 2], [wrong, right, wrong, right]) == "missed"
    assert kind([1, 1, 2, 2], [right, wrong, right, wrong]) == "kept"


def test_a_page_tells_the_turns_that_were_measured(tmp_path: Path):
    runs = [chains(5, 5, 90)]
    page = write_page(run_folder.write(tmp_path, summary_of(*runs, turns=4), runs)).read_text()
    assert "<dt>turns</dt><dd>2</dd>" in page


def test_a_page_says_that_tokens_are_unknown(tmp_path: Path):
    def uncounted(attempts: Sequence[Attempt]) -> list[Attempt]:
        bare = {"token_ids": (), "sampler_logprobs": (), "prompt_tokens": 0, "cached_tokens": 0}
        return [replace(a, drafts=tuple(replace(draft, **bare) for draft in a.drafts)) for a in attempts]

    run, answers = uncounted(chains(30, 2, 68)), uncounted(run_folder.direct([[True, False]] * 100))
    run_folder.write(tmp_path, summary_of(run, vote=answers), [run], [answers])
    page = write_page(tmp_path).read_text()
    assert "How many tokens these answers took is unknown" in page
    assert "at as many tokens" not in page and "At the tokens of the whole chain" not in page
    assert 'aria-labelledby="cost-wide-title' not in page
    cost = page.split('<section aria-labelledby="cost">')[1].split("</section>")[0]
    assert "per prompt" not in cost  # no column of tokens, and the accuracies are still there
    assert "Every way to use answers" in cost and "vote" in cost and "fresh answer" in cost


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


def test_the_summary_is_read_as_it_was_written(run: Path):
    assert read.read(run).summary == Summary.read(run / "summary.json")
    assert json.loads((run / "summary.json").read_text())["measurements"][2]["label"] == "iteration 1"
    assert any(attempt.drafts[0].text.startswith(HOSTILE) for attempt in read.read(run).measured[2].chain)
