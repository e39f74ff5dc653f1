import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upturn._model import Strict
from upturn.errors import RunError
from upturn.evaluation import stats
from upturn.evaluation import summary as summaries
from upturn.evaluation.summary import Summary, TrainingRow, measure
from upturn.evaluation.turns import (
    LEAST_FLIPS,
    gain,
    judged,
    majority,
    pass_at_k,
    pass_chance,
    pooled_gain,
    transitions,
    turn_table,
    vote,
)
from upturn.types import Attempt, Draft, Prompt, Score

QUALITY: Any = {"label_precision": 0.9, "chosen_earlier": 0.2}
DOCS = Path(__file__).parents[2] / "docs" / "summary.md"


def draft(index: int, turn: int, parents: tuple[int, ...], text: str, tokens: int = 3) -> Draft:
    return Draft(index, turn, parents, text, (7,) * tokens, (-0.5,) * tokens, "stop", 10 * turn, 10 * turn - 10)


def chain(id: str, *right: bool) -> Attempt:
    """Turn t is right or wrong as told; every text differs from the one before it."""
    drafts = tuple(draft(t, t + 1, (t - 1,) if t else (), f"answer {t}") for t in range(len(right)))
    return Attempt(Prompt(id, "question"), drafts, tuple(Score(float(r), r) for r in right))


def chains(better: int, worse: int, stayed_right: int, stayed_wrong: int) -> list[Attempt]:
    flips = [(False, True)] * better + [(True, False)] * worse
    flips += [(True, True)] * stayed_right + [(False, False)] * stayed_wrong
    return [chain(str(place), *flip) for place, flip in enumerate(flips)]


def parallel(*answers: tuple[str, bool]) -> Attempt:
    drafts = tuple(draft(place, 1, (), text) for place, (text, _) in enumerate(answers))
    scores = tuple(Score(float(right), right, answer=text.strip()) for text, right in answers)
    return Attempt(Prompt("p", "question"), drafts, scores)


def test_kept_answers_are_no_copies():
    kept = replace(draft(1, 2, (0,), "same"), kept=True)
    copied, right = draft(1, 2, (0,), "same"), (Score(1.0, True), Score(1.0, True))
    first = draft(0, 1, (), "same")
    attempts = [Attempt(Prompt(name, "?"), (first, second), right) for name, second in (("k", kept), ("c", copied))]
    assert turn_table(attempts)[1].copied == 1
    assert turn_table(attempts[:1])[1].copied is None


def test_turn_table_worked_by_hand():
    copy = Attempt(
        Prompt("c", "question"),
        (draft(0, 1, (), "same", tokens=2), draft(1, 2, (0,), "same", tokens=5)),
        (Score(1.0, True), Score(math.nan, False)),
    )
    first, second = turn_table([chain("a", False, True), chain("b", False, True), copy])
    assert (first.turn, first.n, first.accuracy, first.tokens) == (1, 3, 1 / 3, 3 + 3 + 2)
    assert (first.prompt_tokens, first.cached_tokens, first.copied) == (30, 0, None)
    # the draft without a judgement is left out
    assert (first.unjudged, second.n, second.unjudged, second.accuracy) == (0, 3, 1, 1.0)
    assert (second.tokens, second.copied) == (3 + 3 + 5, 1 / 3)
    assert (second.prompt_tokens, second.cached_tokens) == (60, 30)
    assert (first.mean_score, second.mean_score) == (1 / 3, 1.0)


def test_wilson_interval_worked_by_hand():
    # z = 1.96, p = 0.2, n = 10: centre (0.2 + z²/20) / (1 + z²/10) = 0.2832,
    # half width z * sqrt(0.2*0.8/10 + z²/400) / (1 + z²/10) = 0.2265
    row = turn_table([chain(str(place), place < 2) for place in range(10)])[0]
    assert (row.low, row.high) == pytest.approx((0.0567, 0.5098), abs=1e-4)


def test_drafts_that_were_cut_are_counted():
    cut = Draft(0, 1, (), "half an ans", (1,), (0.0,), "length", 4, 0)
    assert turn_table([Attempt(Prompt("a", "q"), (cut,), (Score(0.0, False),))])[0].truncated == 1


def test_the_first_draft_of_a_turn_is_its_answer_and_all_of_them_cost_tokens():
    row = turn_table([parallel(("1", False), ("2", True), ("3", True))])[0]
    assert (row.n, row.drafts, row.accuracy, row.tokens) == (1, 3, 0.0, 9)


def test_mcnemar_worked_by_hand():
    # 12 better, 1 worse: 2 * (C(13,0) + C(13,1)) / 2^13 = 28 / 8192; detectable 280 * sqrt(13) / 40
    row = transitions(chains(12, 1, 20, 7))[0]
    assert (row.first, row.last, row.n) == (1, 2, 40)
    assert (row.wrong_to_right, row.right_to_wrong, row.stayed_right, row.stayed_wrong) == (12, 1, 20, 7)
    assert row.p_value == pytest.approx(28 / 8192)
    assert row.detectable == pytest.approx(25.239, abs=1e-3)


def test_too_few_flips_detect_nothing():
    # 2 * 2^-5 = 0.0625, 2 * 2^-6 = 0.03125
    assert LEAST_FLIPS == 6 and stats.mcnemar(5, 0) > 0.05 > stats.mcnemar(6, 0)
    few = [transitions(chains(better, worse, 290, 0))[0] for better, worse in [(0, 0), (3, 0), (3, 2)]]
    assert [row.detectable for row in few] == [None, None, None]
    assert transitions(chains(4, 2, 294, 0))[0].detectable == pytest.approx(280 * 6**0.5 / 300)


def lost(attempt: Attempt, *turns: int) -> Attempt:
    """As if the verifier could not judge these turns."""
    scores = [(turn in turns, score) for turn, score in enumerate(attempt.scores, 1)]
    return replace(attempt, scores=tuple(replace(s, value=math.nan, right=False) if gone else s for gone, s in scores))


def test_an_answer_that_could_not_be_judged_is_not_wrong():
    # turn 1 right in all of 20; turn 2 judged in the first two only
    attempts = [lost(chain(str(place), True, True), *((2,) if place > 1 else ())) for place in range(20)]
    [row] = transitions(attempts)
    assert (row.n, row.stayed_right, row.right_to_wrong, row.p_value) == (2, 2, 0, 1)
    found = gain(attempts, 1, 2)
    assert (found.points, found.n) == (0, 2)
    assert [(turn.accuracy, turn.unjudged) for turn in turn_table(attempts)] == [(1, 0), (1, 18)]
    assert transitions(attempts[2:]) == []
    with pytest.raises(ValueError, match="judged at both"):
        gain(attempts[2:], 1, 2)


def test_votes_and_chances_leave_out_what_could_not_be_judged():
    one = parallel(("7", True), ("7", True), ("5", False))
    assert math.isnan(vote(lost(one, 1).scores))  # the first draft that gave the winner
    assert (vote(lost(one, 2, 3).scores), vote(one.scores)) == (1, 1)
    row = majority([one, lost(one, 1, 2, 3)])
    assert (row.n, row.accuracy, row.oracle) == (1, 1, 1)
    assert pass_chance(lost(one, 1), 1) == 1 / 2  # one right of two judged
    assert math.isnan(pass_chance(lost(one, 1), 3)) and pass_at_k([one, lost(one, 1)], 3) == 1


def test_a_chain_that_ended_early_keeps_its_answer():
    attempts = [chain("a", True), chain("b", False, True), chain("c", False, False, True)]
    rows = {(row.first, row.last): row for row in transitions(attempts)}
    assert [(row.n, row.wrong_to_right, row.stayed_right) for row in rows.values()] == [(3, 1, 1), (3, 2, 1), (3, 1, 2)]
    assert gain(attempts, 1, 3).points == pytest.approx(200 / 3)


def test_mcnemar_agrees_with_statsmodels():
    oracle = pytest.importorskip("statsmodels.stats.contingency_tables").mcnemar
    for better, worse in [(0, 0), (3, 0), (5, 5), (40, 22)]:
        expected = oracle([[4, worse], [better, 6]], exact=True).pvalue
        assert transitions(chains(better, worse, 4, 6))[0].p_value == pytest.approx(expected)


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=30))
def test_accuracy_changes_by_wrong_to_right_minus_right_to_wrong(rows: list[list[bool]]):
    attempts = [chain(str(place), *row) for place, row in enumerate(rows)]
    accuracy = {row.turn: row.accuracy for row in turn_table(attempts)}
    flips = transitions(attempts)
    assert [(flip.first, flip.last) for flip in flips] == [(1, 2), (1, 3), (2, 3)]
    for flip in flips:
        delta = (flip.wrong_to_right - flip.right_to_wrong) / flip.n
        assert accuracy[flip.last] - accuracy[flip.first] == pytest.approx(delta)
        assert flip.n == flip.wrong_to_right + flip.right_to_wrong + flip.stayed_right + flip.stayed_wrong


def test_gain_is_near_the_normal_interval_and_the_same_twice():
    # 100 prompts, 30 better, 10 worse: mean 0.2, variance 0.4 - 0.04, standard error 0.06, 95 % 8.24 to 31.76
    attempts = chains(30, 10, 30, 30)
    found = gain(attempts, 1, 2)
    assert found.points == pytest.approx(20)
    assert (found.low, found.high) == pytest.approx((8.24, 31.76), abs=1)
    assert gain(attempts, 1, 2) == found
    assert gain(attempts, 1, 2, seed=1) != found


def test_attempts_at_one_prompt_are_resampled_together():
    # Four equal attempts at each prompt hold no more than one: the interval must not shrink by half.
    once = chains(30, 10, 30, 30)
    found, expected = gain(once * 4, 1, 2), gain(once, 1, 2)
    assert (found.points, found.low, found.high) == (expected.points, expected.low, expected.high)
    assert found.n == 100


def test_the_interval_of_the_gain_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for place in range(300):  # truth: 0.25 better, 0.10 worse, so +15 points
        better, worse, stayed = rng.multinomial(80, [0.25, 0.10, 0.65])
        found = gain(chains(better, worse, stayed, 0), 1, 2, seed=place)
        held += found.low <= 15 <= found.high
    assert 0.92 <= held / 300 <= 0.98


def test_pooled_gain_is_the_mean_over_runs_and_knows_that_runs_differ():
    same = [chains(30, 10, 30, 30)] * 3
    apart = [chains(10, 10, 40, 40), chains(30, 10, 30, 30), chains(50, 10, 20, 20)]
    assert pooled_gain(same, 1, 2).points == pytest.approx(20)
    narrow, wide = pooled_gain(same, 1, 2), pooled_gain(apart, 1, 2)
    assert wide.points == pytest.approx((0 + 20 + 40) / 3)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    # equal runs on the same prompts are one run: the doubt about the prompts stays
    alone = gain(same[0], 1, 2)
    assert narrow.high - narrow.low == pytest.approx(alone.high - alone.low, abs=1)


def test_a_gain_without_prompts_is_refused():
    with pytest.raises(ValueError, match="no prompt judged at both turn 1 and turn 2"):
        gain([chain("a", True)], 1, 2)


def test_majority_worked_by_hand():
    votes = [
        parallel(("5", False), ("7", True), ("7 ", True), ("", False)),  # 7 wins 2 to 1
        parallel(("", False), ("", False), ("5", False), ("7", True)),  # a tie goes to the earlier 5
        parallel(("", False), ("", False), ("", False), ("", False)),  # nobody votes: wrong
    ]
    row = majority(votes)
    assert (row.votes, row.n, row.accuracy, row.oracle, row.tokens) == (4, 3, 1 / 3, 2 / 3, 36)
    assert row.low < 1 / 3 < row.high


def test_pass_at_k_worked_by_hand():
    # 4 drafts, 1 right: pass@2 = 1 - C(3,2)/C(4,2) = 1/2; 2 right: 1 - 1/6; mean 2/3
    one = parallel(("a", True), ("b", False), ("c", False), ("d", False))
    two = parallel(("a", True), ("b", False), ("c", True), ("d", False))
    assert pass_at_k([one, two], 2) == pytest.approx(2 / 3)
    assert pass_at_k([one, two], 1) == pytest.approx(3 / 8)
    assert pass_at_k([one, two], 4) == 1.0
    with pytest.raises(ValueError, match="it has 4 drafts"):
        pass_at_k([one], 5)


def test_a_summary_survives_the_disk(tmp_path: Path):
    training = TrainingRow(
        label="sft", iteration=0, pairs=3, steps=2, tokens=90, seconds=1.5, dropped={}, final_loss=0.7, **QUALITY
    )
    summary = Summary(
        upturn="0.1.0",
        recipe="evolve",
        name="test",
        model="tiny",
        task="keywords",
        seed=0,
        status="finished",
        turns=2,
        measurements=(measure("base", 0, chains(3, 1, 4, 2)),),
        training=(training,),
    )
    summary.write(tmp_path / "summary.json")
    assert Summary.read(tmp_path / "summary.json") == summary
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(RunError, match="not a summary"):
        Summary.read(tmp_path / "summary.json")


def test_attempts_that_all_stop_after_one_turn_have_no_gain():
    assert measure("base", 0, [chain("a", True)]).gain is None


def unjudged(attempt: Attempt) -> Attempt:
    return replace(attempt, scores=(Score(math.nan, False, "no verifier"),) * len(attempt.drafts))


def test_without_a_verifier_nothing_is_right_or_wrong():
    attempts = [unjudged(attempt) for attempt in chains(3, 1, 4, 2)]
    assert judged([*attempts, chain("z", False, False)])  # a wrong answer is a judgement
    assert not judged(attempts) and not judged([])
    votes = majority([unjudged(parallel(("5", True), ("5", True)))])
    found = measure("base", 0, attempts, vote=votes)
    assert (found.gain, found.flips, found.transitions, found.majority) == (None, None, (), None)
    assert [(row.n, row.tokens, row.mean_score) for row in found.turns] == [(10, 30, None)] * 2
    assert measure("base", 0, [*attempts, chain("z", False, False)], vote=votes).majority == votes


def test_every_field_of_the_summary_is_documented():
    named = set(re.findall(r"`(\w+)`", DOCS.read_text()))
    models = [m for m in vars(summaries).values() if isinstance(m, type) and issubclass(m, Strict)]
    fields = [(model.__name__, name) for model in models for name in model.model_fields]
    assert len(fields) > 40
    assert [field for field in fields if field[1] not in named] == []
