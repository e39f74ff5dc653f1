"""The verdict knows copies, churn, refinement and better first answers apart; the advisor follows its rules."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scripted
from scripted import Habit

from upturn.config import plugin
from upturn.evaluation.advice import advice
from upturn.evaluation.assemble import Measured, model_study, study
from upturn.evaluation.stats import Estimate
from upturn.evaluation.study import ModelStudy, PassAt, Progress, Verdict
from upturn.evaluation.summary import Summary, TrainingRow, measure
from upturn.evaluation.verdicts import MIN_FLIPS, verdict
from upturn.lab.bench import Bench
from upturn.lab.lab import Attempts, Options
from upturn.lab.store import Store
from upturn.types import Attempt, to_json

SEEDS = range(20)


def judged(model: Measured, base: Measured | None = None) -> Verdict:
    """The verdict on a model; of its base only the name and the first turns are used."""
    before = [model_study(Measured(base.label, 0, base.chain[:1]))] if base else []
    found = verdict([*before, model_study(model, base)])
    assert found
    return found


def alone(seed: int, habit: Habit, controls: bool) -> Verdict:
    chains, siblings = scripted.model(seed, habit, scripted.difficulties(seed))
    return judged(Measured("model", 0, chains, siblings if controls else ()))


def counted(w2r: int = 0, r2w: int = 0, right: int = 0, wrong: int = 0, copied: bool = False) -> list[Attempt]:
    """Chains of two turns with so many flips; what did not flip may be copied."""
    rows = [("wr", False)] * w2r + [("rw", False)] * r2w + [("rr", copied)] * right + [("ww", copied)] * wrong
    return [
        scripted.chain(str(place), pattern, ["draft", "draft" if same else "another"])
        for place, (pattern, same) in enumerate(rows)
    ]


# 300 scripted prompts, four turns


@pytest.mark.parametrize("controls", [True, False], ids=["with fresh answers", "chains alone"])
@pytest.mark.parametrize("habit", ["copies", "churns", "refines", "harms"])
def test_a_habit_is_known_in_twenty_of_twenty_seeds(habit: Habit, controls: bool):
    assert [alone(seed, habit, controls).kind for seed in SEEDS] == [habit] * len(SEEDS)


@pytest.mark.parametrize("habit", ["copies", "churns"])
def test_a_better_first_turn_is_no_refinement(habit: Habit):
    found = []
    for seed in SEEDS:
        base, _ = scripted.model(seed, "churns", scripted.difficulties(seed))
        chains, siblings = scripted.model(seed + 100, habit, scripted.difficulties(seed, easier=0.2))
        found.append(judged(Measured("iteration 1", 1, chains, siblings), Measured("base", 0, base)).kind)
    assert found == ["answers"] * len(SEEDS)


def test_the_sentence_of_a_refiner():
    chains, siblings = scripted.model(0, "refines", scripted.difficulties(0), num_parallel=8)
    model = model_study(Measured("model", 0, chains, siblings))
    found = verdict([model])
    assert found and model.gain and model.control
    gain = f"{model.gain.points:.1f} points more often than turn 1"
    within = f"(95% interval {model.gain.low:.1f} to {model.gain.high:.1f}, 300 prompts)"
    null = f"fresh answers would give {model.control.points:+.1f}".replace("-", "−")
    assert found.sentence.startswith(f"It refines: turn 4 is right {gain} {within}; {null}; a vote of direct answers")
    assert "with as many tokens" in found.sentence


# the rules, one by one


def test_few_flips_prove_nothing():
    assert MIN_FLIPS == 9  # 2 * 2^-9 = 0.0039
    assert judged(Measured("m", 0, counted(w2r=5, r2w=3, right=10, wrong=10))).kind == "unclear"
    assert "only 8 of 28 prompts changed sides" in judged(Measured("m", 0, counted(5, 3, 10, 10))).sentence


def test_five_flips_are_no_hint():
    # the bootstrap of 4 or 5 flips in one direction leaves 0 out, which no exact test confirms
    for flips in (4, 5):
        chains = counted(w2r=flips, right=150, wrong=150 - flips)
        found = model_study(Measured("m", 0, chains))
        assert found.gain and found.gain.low > 0
        assert "hint" not in judged(Measured("m", 0, chains)).sentence
        assert f"only {flips} of 300 prompts changed sides" in judged(Measured("m", 0, chains)).sentence
    assert "a hint and no proof (p = 0.031" in judged(Measured("m", 0, counted(w2r=6, right=150, wrong=144))).sentence


@pytest.mark.parametrize(("flips", "n", "kind"), [(1, 1, "unclear"), (6, 300, "unclear"), (8, 300, "unclear"),
                                                  (9, 300, "answers")])  # fmt: skip
def test_a_better_first_turn_is_tested(flips: int, n: int, kind: str):
    # turn 1 of so many prompts went from wrong to right, of none back: p = 2 * 2^-flips
    base = [scripted.chain(str(place), "ww") for place in range(n)]
    chains = [scripted.chain(str(place), "rr" if place < flips else "ww") for place in range(n)]
    found = model_study(Measured("m", 1, chains), Measured("base", 0, base))
    assert found.direct_p == pytest.approx(min(1, 2 * 0.5**flips)) and found.base == "base"
    assert judged(Measured("m", 1, chains), Measured("base", 0, base)).kind == kind


def test_nothing_that_could_be_judged_is_no_harm():
    # turn 1 right, turn 2 judged in one of 20
    chains = counted(right=20)
    silent = [replace(a, scores=(a.scores[0], replace(a.scores[1], value=math.nan, right=False))) for a in chains[1:]]
    siblings = [scripted.parallel(attempt.prompt.id, "rr") for attempt in chains]
    found = model_study(Measured("m", 0, [chains[0], *silent], siblings))
    assert found.gain and found.excess and found.control
    assert (found.gain.points, found.gain.n, found.excess.value, found.excess.n) == (0, 1, 0, 1)
    assert (found.control.points, found.control.n) == (0, 20)
    assert judged(Measured("m", 0, [chains[0], *silent], siblings)).kind == "unclear"


def test_a_hint_is_no_proof():
    # 40 against 22 of 300: p = 0.030, an interval above 0
    found = judged(Measured("m", 0, counted(40, 22, 220, 18)))
    assert found.kind == "unclear"
    assert "p = 0.030" in found.sentence and "6.0 points more often" in found.sentence


def test_nine_flips_of_nine_are_proof():
    assert judged(Measured("m", 0, counted(w2r=9, right=20, wrong=20))).kind == "refines"
    assert judged(Measured("m", 0, counted(r2w=9, right=20, wrong=20))).kind == "harms"


def test_copies_that_flip_a_little_are_copies():
    assert judged(Measured("m", 0, counted(w2r=3, r2w=1, right=60, wrong=36, copied=True))).kind == "copies"


def test_an_unlucky_first_turn_is_not_refinement():
    chains = counted(w2r=60, r2w=30, right=110, wrong=100)
    lucky = [scripted.parallel(attempt.prompt.id, "rrww") for attempt in chains[:290]]
    lucky += [scripted.parallel(attempt.prompt.id, "rrrr") for attempt in chains[290:]]
    # turn 1 right in 140, turn 2 in 170, fresh answers in 155 of 300
    found = judged(Measured("m", 0, chains, lucky))
    assert found.kind == "unclear"
    assert "but against the mean of its other direct answers by +5.0 points" in found.sentence
    assert judged(Measured("m", 0, chains)).kind == "refines"


def test_a_vote_has_no_price_where_tokens_are_unknown():
    chains, siblings = scripted.model(0, "refines", scripted.difficulties(0), num_parallel=8)
    priced, free = ([uncounted(a) if free else a for a in chains] for free in (False, True))
    assert "a vote of" in judged(Measured("m", 0, priced, siblings)).sentence
    found = judged(Measured("m", 0, free, [uncounted(attempt) for attempt in siblings]))
    assert found.kind == "refines" and "a vote of" not in found.sentence


def uncounted(attempt: Attempt) -> Attempt:
    """As of an endpoint that tells neither ids nor their number."""
    bare = tuple(replace(draft, token_ids=(), sampler_logprobs=()) for draft in attempt.drafts)
    return replace(attempt, drafts=bare)


def test_models_that_answer_once_or_never():
    found = judged(Measured("m", 0, [scripted.chain("a", "r")]))
    assert (found.kind, found.sentence) == ("unclear", "Unclear: there is no later turn to compare with (1 prompts).")
    assert verdict([]) is None


# advice


def estimate(value: float, width: float = 0.02) -> Estimate:
    return Estimate(value=value, low=value - width, high=value + width, n=300, how="bootstrap over prompts")


def after(
    last: float, *, width: float = 0.02, reward: float | None = None, pass_large: float = 0.0, **drift: float
) -> list[ModelStudy]:
    """Two measured models, the second of which changed by so much."""
    chains = counted(20, 10, 50, 20)
    models = [model_study(Measured(label, place, chains)) for place, label in enumerate(["iteration 1", "iteration 2"])]
    change = Progress(
        before="iteration 1",
        direct=estimate(0.0),
        last=estimate(last, width),
        gain=estimate(last, width),
        pass_large=PassAt(k=8, share=estimate(pass_large)),
        reward=None if reward is None else estimate(reward),
    )
    update = {"progress": change, "drift": models[1].drift.model_copy(update=drift)}
    models[0] = models[0].model_copy(
        update={"drift": models[0].drift.model_copy(update={"kl_previous": 0.1, "entropy": 0.6})}
    )
    return [models[0], models[1].model_copy(update=update)]


def trained(*pairs: int, label_precision: float = 0.9) -> list[TrainingRow]:
    quality: dict[str, Any] = {"label_precision": label_precision, "chosen_earlier": 0.1, "final_loss": 0.5}
    rows = enumerate(pairs, start=1)
    return [
        TrainingRow(label=f"iteration {i}", iteration=i, pairs=n, steps=1, tokens=1, seconds=1, dropped={}, **quality)
        for i, n in rows
    ]


def go_on(models: Sequence[ModelStudy], training: Sequence[TrainingRow]) -> tuple[str, str]:
    found = advice(models, training)
    assert found
    return found.go_on, " ".join(found.reasons)


@pytest.mark.parametrize(
    ("last", "width", "expected"),
    [(0.05, 0.02, "yes"), (-0.05, 0.02, "no"), (0.01, 0.04, "unclear"), (0.0, 0.01, "no")],
)
def test_the_last_turn_decides(last: float, width: float, expected: str):
    found, reasons = go_on(after(last, width=width), trained(400, 380))
    assert found == expected
    assert f"{100 * last:.1f} points".replace("-", "−") in reasons and "against iteration 1" in reasons


WARNINGS: list[tuple[dict[str, float], list[int], str]] = [
    ({"pass_large": -0.05}, [400, 380], "Coverage fell: pass@8 −5.0 points"),
    ({"identical": 0.6}, [400, 380], "60.0% of pairs of direct answers are identical"),
    ({"entropy": 0.2}, [400, 380], "Entropy collapsed: 0.20 nats per token after 0.60"),
    ({"kl_previous": 0.3}, [400, 380], "moved 0.300 nats per token, after 0.100"),
    ({}, [400, 150], "Pairs are running out: 150 after 400"),
]


@pytest.mark.parametrize(("settings", "pairs", "sentence"), WARNINGS)
def test_a_warning_turns_a_doubt_into_a_no(settings: dict[str, float], pairs: list[int], sentence: str):
    found, reasons = go_on(after(0.01, width=0.04, **settings), trained(*pairs))
    assert found == "no"
    assert sentence in reasons
    assert go_on(after(0.05, **settings), trained(*pairs))[0] == "yes"


def test_two_warnings_turn_a_yes_into_a_doubt():
    noisy = trained(400, 150, label_precision=0.4)
    found, reasons = go_on(after(0.05), noisy)
    assert found == "unclear"
    assert "Only 40.0% of the pairs" in reasons


def test_a_gamed_scorer_is_a_no():
    found, reasons = go_on(after(-0.01, reward=0.3), trained(400, 380))
    assert found == "no"
    assert "rates the last turn higher by +0.30 (+0.28 to +0.32)" in reasons
    assert "by the verifier it gained +1.0 points at most: it is being gamed" in reasons
    assert "gamed" not in go_on(after(0.05, reward=0.3), trained(400, 380))[1]


@pytest.mark.parametrize(("last", "width", "gamed"), [(0.0, 0.019, True), (-0.01, 0.04, False), (0.01, 0.005, False)])
def test_a_scorer_is_gamed_where_no_worthwhile_gain_is_left(last: float, width: float, gamed: bool):
    # an interval up to +1.9, to +3, and one of a small gain, +0.5 to +1.5
    assert ("gamed" in go_on(after(last, width=width, reward=0.3), trained(400, 380))[1]) == gamed


def test_the_smallest_change_that_would_be_seen():
    # 2.8 standard errors; the half width of an interval is 1.96
    assert "a change of 5.7 points is seen four times in five" in go_on(after(0.01, width=0.04), [])[1]
    models = after(0.01, width=0.04)
    assert models[1].progress
    for told in ({"n": 29}, {"low": 0.0, "high": 0.0}):
        last = models[1].progress.last.model_copy(update=told)
        model = models[1].model_copy(update={"progress": models[1].progress.model_copy(update={"last": last})})
        assert "four times in five" not in go_on([models[0], model], [])[1]


def test_one_model_gives_no_advice():
    assert advice([model_study(Measured("base", 0, counted(1, 1)))], []) is None


# the whole run


def test_a_study_knows_base_and_predecessor():
    summary = Summary(
        upturn="0", recipe="evolve", name="run", model="tiny", task="carry", seed=3, status="finished", turns=2
    )
    summary = summary.model_copy(update={"training": tuple(trained(400, 380))})
    runs = [counted(10, 10, 40, 40), counted(20, 5, 55, 20), counted(25, 5, 60, 10)]
    labels = ["base", "iteration 1", "iteration 2"]
    found = study(summary, [Measured(label, place, runs[place]) for place, label in enumerate(labels)])
    base, one, two = found.models
    assert (base.direct_gain, base.progress) == (None, None)
    assert one.direct_gain and two.direct_gain and one.progress and two.progress
    # first turns right: 50, 60, 65; last turns right: 50, 75, 85
    assert (one.direct_gain.points, two.direct_gain.points) == (pytest.approx(10), pytest.approx(15))
    assert (one.progress.before, two.progress.before) == ("base", "iteration 1")
    assert (two.progress.last.value, two.progress.gain.value) == (pytest.approx(0.10), pytest.approx(0.05))
    assert found.verdict and found.verdict.kind == "refines"
    assert found.advice and (found.name, found.seed) == ("run", 3)
    assert study(summary, []).verdict is None


def test_a_corrector_is_compared_behind_the_same_upstream_model():
    # it copies whatever it is shown, before and after; upstream 2 is right 10 times of 100, the other 60 times
    behind = {"small": counted(right=10, wrong=90, copied=True), "large": counted(right=60, wrong=40, copied=True)}
    rows = [
        (f"{label} behind {name}", place, name) for place, label in enumerate(["base", "corrector"]) for name in behind
    ]
    summary = Summary(
        upturn="0", recipe="aligner", name="run", model="tiny", task="carry", seed=0, status="finished", turns=2,
        training=tuple(trained(400)),
        measurements=tuple(
            measure(label, place, behind[name]).model_copy(update={"upstream": name}) for label, place, name in rows
        ),
    )  # fmt: skip
    found = study(summary, [Measured(label, place, behind[name]) for label, place, name in rows])
    assert [model.base for model in found.models] == [None, None, "base behind small", "base behind large"]
    last = found.models[-1]
    assert last.direct_gain and last.progress and found.verdict and found.advice
    assert (last.direct_gain.points, last.direct_p, last.progress.before) == (0, 1, "base behind large")
    assert found.verdict.kind == "copies"
    assert "against base behind large" in " ".join(found.advice.reasons)


@pytest.mark.parametrize(("verifier", "precision"), [("none", None), ("match", 0.0)])
def test_pairs_that_no_verifier_judged_have_no_precision(verifier: str, precision: float | None, tmp_path: Path):
    rows = [{"id": str(place), "prompt": f"Which {place}?", "answer": "yes"} for place in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"name": "data", "data": str(tmp_path / "data.jsonl"), "verifier": verifier}
    summary = Summary(upturn="0", recipe="x", name="x", model="x", task="data", seed=0, status="running", turns=2)
    bench = Bench(tmp_path, Store(tmp_path / "store"), plugin("tasks", data), Options(), 0, summary)
    # rewarded, and by the verifier wrong, or not judged at all
    asked = [replace(scripted.chain(prompt.id, "ww"), prompt=prompt) for prompt in bench.prompts("train", 0, 2)]
    scored = [scripted.rewarded(attempt, 0.1, 0.9) for attempt in asked]
    (tmp_path / "drafts.jsonl").write_text("".join(json.dumps(to_json(attempt)) + "\n" for attempt in scored))
    made = Attempts("key", tmp_path / "drafts.jsonl", 2)
    chosen = bench.select(made, plugin("selection", "best_vs_worst"), "iteration 1")
    assert (chosen.count, chosen.label_precision) == (2, precision)


def test_a_run_that_no_verifier_judged_has_no_verdict_no_advice_and_no_precision():
    summary = Summary(
        upturn="0", recipe="srpo", name="run", model="tiny", task="data", seed=0, status="finished", turns=2,
        training=tuple(trained(400, 150, label_precision=0.0)),
    )  # fmt: skip
    chains = counted(20, 10, 50, 20)
    silent = [scripted.rewarded(attempt, math.nan, math.nan) for attempt in chains]
    # each model is rewarded by one more than the one before, which looks like a gamed scorer
    rewards = {k: [scripted.rewarded(attempt, k, k + 1) for attempt in chains] for k in (1, 2)}
    measured = [Measured(f"iteration {k}", k, silent, chain_rewards=rewards[k]) for k in (1, 2)]
    found = study(summary, measured)
    assert (found.verdict, found.advice) == (None, None)
    assert [row.label_precision for row in found.training] == [None, None]
    assert [row.label_precision for row in summary.training] == [0.0, 0.0]
    judged = study(summary, [replace(one, chain=chains) for one in measured])
    assert judged.advice and "is being gamed" in " ".join(judged.advice.reasons)
    assert judged.training == summary.training
