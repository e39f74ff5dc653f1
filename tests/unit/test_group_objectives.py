"""Objectives on groups of drafts, worked by hand, and at the first step of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import log
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from upturn.models import chat, load, policy
from upturn.numerics import sum_by_sample
from upturn.objectives import kto, policy_gradient, sft, sppo
from upturn.objectives._base import Batch
from upturn.training import plan, rows, train
from upturn.types import Attempt, Draft, Group, Prompt, Requests

LN2 = log(2)


def drafts(lengths: Sequence[int], values: Sequence[float], **more: Any) -> Batch:
    """One group of drafts. `more`: turns, and per token the log-probs `reference` and `old`."""
    tokens, count = torch.tensor(lengths), len(lengths)
    owner = torch.repeat_interleave(torch.arange(count), tokens)
    reference, old = (torch.tensor(more[name]) if name in more else None for name in ("reference", "old"))
    return Batch(
        owner_N=owner,
        num_tokens_S=tokens,
        rows={},
        p_P=torch.zeros(0),
        reference_S=None if reference is None else sum_by_sample(reference, owner, count),
        reference_N=reference,
        old_N=old,
        value_S=torch.tensor(values),
        turn_S=torch.tensor(more.get("turns", [1] * count)),
        group_S=torch.zeros(count, dtype=torch.long),
    )


def value(module: ModuleType, logprobs: Sequence[float], batch: Batch, **settings: Any) -> float:
    """Total of a loss."""
    return module.loss(torch.tensor(logprobs), batch, module.Config(**settings)).total.item()


def slope(module: ModuleType, logprobs: Sequence[float], batch: Batch, **settings: Any) -> list[float]:
    """Derivative of the total by each token's log-prob."""
    leaf = torch.tensor(logprobs, requires_grad=True)
    (found,) = torch.autograd.grad(module.loss(leaf, batch, module.Config(**settings)).total, leaf)
    return found.tolist()


# sft ------------------------------------------------------------------------------------------------------------------


def test_sft_worked_by_hand():
    # two tokens (-1, -2) of weight 1, one token -4 of weight 0.5, one of weight 0: (3 + 2) / (2 + 0.5)
    batch = drafts([2, 1, 1], [1.0, 0.5, 0.0], turns=[1, 2, 2])
    loss = sft.loss(torch.tensor([-1.0, -2.0, -4.0, -9.0]), batch, sft.Config())
    assert loss.total.item() == pytest.approx(5)
    assert loss.weight == pytest.approx(2.5)
    assert loss.metrics["direct/logps/chosen"].item() == pytest.approx(-3)
    assert loss.metrics["refined/logps/chosen"].item() == pytest.approx(-2)
    assert slope(sft, [-1.0, -2.0, -4.0, -9.0], batch) == pytest.approx([-1, -1, -0.5, 0])


def test_sft_refuses_a_weight_below_zero():
    with pytest.raises(ValueError, match="weights of 0 and more"):
        sft.loss(torch.tensor([-1.0]), drafts([1], [-0.5]), sft.Config())


# policy gradient ------------------------------------------------------------------------------------------------------

POLICY = [log(0.5), log(0.6), log(0.3)]
OLD = [log(0.4), log(0.6), log(0.6)]  # ratios 1.25, 1, 0.5
REFERENCE = [log(0.25), log(0.6), log(0.6)]  # k3: ln 2 - 1/2, 0, 1 - ln 2


def two_drafts(turns: Sequence[int] = (1, 2)) -> Batch:
    """Two tokens with advantage 2, and one with advantage -1."""
    return drafts([2, 1], [2.0, -1.0], turns=turns, old=OLD, reference=REFERENCE)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, -(2.4 + 2) + 0.8),  # 1.25 is cut to 1.2; 0.5 is cut to 0.8
        ({"clip_high": 0.3}, -(2.5 + 2) + 0.8),
        ({"clip": 0.6}, -(2.5 + 2) + 0.5),
        ({"clip": None}, -(2.5 + 2) + 0.5),
        ({"loss_agg": "sequence_mean"}, -(2.4 + 2) / 2 + 0.8),
        ({"loss_agg": "sequence_sum"}, -(2.4 + 2) + 0.8),
    ],
)
def test_policy_gradient_worked_by_hand(settings: dict[str, Any], expected: float):
    assert value(policy_gradient, POLICY, two_drafts(), **settings) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss_agg", "weight", "clipped", "kl", "advantages"),
    [
        ("token", 3, (1, 1, 2), (LN2 - 0.5) + (1 - LN2), 2 + 2 - 1),
        ("sequence_mean", 2, (1, 0.5, 1.5), (LN2 - 0.5) / 2 + (1 - LN2), 2 - 1),
        ("sequence_sum", 2, (1, 0.5, 1.5), (LN2 - 0.5) / 2 + (1 - LN2), 2 - 1),
    ],
)
def test_policy_gradient_counts_tokens_or_drafts(
    loss_agg: Any, weight: float, clipped: tuple[float, float, float], kl: float, advantages: float
):
    cfg = policy_gradient.Config(loss_agg=loss_agg, kl=0.1)
    loss = policy_gradient.loss(torch.tensor(POLICY), two_drafts(), cfg)
    assert loss.weight == weight
    found = {name: metric.item() for name, metric in loss.metrics.items()}
    assert found == pytest.approx(
        {f"clip_ratio/{name}_mean": share for name, share in zip(("low", "high", "region"), clipped, strict=True)}
        | {"kl": kl, "advantages": advantages}
    )


@pytest.mark.parametrize(
    ("settings", "turns", "expected"),
    [
        ({"kl": 0.1, "use_bias_correction_kl": False}, (1, 2), 0.1 * (LN2 - 0.5) + 0.1 * (1 - LN2)),
        ({"kl": (0.1, 0.3), "use_bias_correction_kl": False}, (1, 2), 0.1 * (LN2 - 0.5) + 0.3 * (1 - LN2)),
        ({"kl": (0.1, 0.3), "use_bias_correction_kl": False}, (2, 5), 0.3 * (LN2 - 0.5) + 0.3 * (1 - LN2)),
        ({"kl": (0.1, 0.0), "use_bias_correction_kl": False}, (1, 2), 0.1 * (LN2 - 0.5)),
        ({"kl": (0.1, 0.3)}, (1, 2), 0.1 * 1.25 * (LN2 - 0.5) + 0.3 * 0.5 * (1 - LN2)),
        ({"kl": 0.2, "loss_agg": "sequence_mean"}, (1, 2), 0.2 * 1.25 * (LN2 - 0.5) / 2 + 0.2 * 0.5 * (1 - LN2)),
    ],
)
def test_the_kl_term_by_turn_worked_by_hand(settings: dict[str, Any], turns: tuple[int, int], expected: float):
    without = value(policy_gradient, POLICY, two_drafts(turns), **(settings | {"kl": 0.0}))
    assert value(policy_gradient, POLICY, two_drafts(turns), **settings) - without == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("clip", [0.2, None])
def test_at_the_start_the_gradient_is_that_of_reinforce(clip: float | None):
    batch = drafts([2, 1], [2.0, -1.0], old=POLICY)
    assert slope(policy_gradient, POLICY, batch, clip=clip, loss_agg="sequence_sum") == pytest.approx([-2, -2, 1])


def test_clipped_tokens_have_no_gradient_and_bad_tokens_that_rose_do():
    batch = drafts([1, 1, 1, 1], [1.0, 1.0, -1.0, -1.0], old=[0.0] * 4)
    up, down = log(1.5), log(0.5)
    assert slope(policy_gradient, [up, down, up, down], batch) == pytest.approx([0, -0.5, 1.5, 0])


def test_the_reference_is_asked_for_only_where_a_turn_has_a_kl_term():
    asked = [policy_gradient.uses_reference(policy_gradient.Config(kl=kl)) for kl in (0.0, (0.0, 0.0), (0.0, 0.1), 0.1)]
    assert asked == [False, False, True, True]


@pytest.mark.parametrize("settings", [{"kl": -0.1}, {"kl": ()}, {"kl": (0.1, -1)}, {"clip": None, "clip_high": 0.3}])
def test_settings_without_sense_are_refused(settings: dict[str, Any]):
    with pytest.raises(ValidationError):
        policy_gradient.Config(**settings)


# kto ------------------------------------------------------------------------------------------------------------------


def kto_drafts(mismatched: Sequence[float]) -> tuple[list[float], Batch]:
    """A desirable draft that gains 2, an undesirable one that gains 0, and mismatched ones with these gains."""
    batch = drafts(
        [1] * (2 + len(mismatched)), [1.0, -1.0, *[0.0] * len(mismatched)], reference=[-5.0] * (2 + len(mismatched))
    )
    return [-3.0, -5.0, *(gain - 5 for gain in mismatched)], batch


def missed(distance: float) -> float:
    """1 - sigma(distance)."""
    return 1 / (1 + math.exp(distance))


@pytest.mark.parametrize(("mismatched", "zero"), [((1.0, 0.0), 0.5), ((1.0, -3.0), 0.0), ((), 0.0)])
def test_kto_worked_by_hand(mismatched: tuple[float, ...], zero: float):
    # beta 0.5: the desirable draft stands 2 - z0 above the zero point, the undesirable one z0 below it
    logprobs, batch = kto_drafts(mismatched)
    cfg = kto.Config(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    loss = kto.loss(torch.tensor(logprobs), batch, cfg)
    assert loss.total.item() == pytest.approx(2 * missed(0.5 * (2 - zero)) + 3 * missed(0.5 * zero))
    assert loss.weight == 2
    assert loss.metrics["kl"].item() == pytest.approx(2 * zero)
    assert loss.metrics["rewards/margins"].item() == pytest.approx(0.5 * ((2 - zero) + zero))


def test_the_zero_point_of_kto_has_no_gradient():
    # of 1 - sigma(t) by t: -sigma(t) sigma(-t), with t = 0.5 (2 - 0.5) and 0.5 (0.5 - 0)
    logprobs, batch = kto_drafts((1.0, 0.0))
    up, down = (-0.5 * missed(t) * missed(-t) for t in (0.75, 0.25))
    assert slope(kto, logprobs, batch, beta=0.5) == pytest.approx([up, -down, 0, 0])


@pytest.mark.parametrize(("other", "agree"), [((0.5, 0.5), True), ((4.0, 4.0), False)])
def test_micro_batches_of_kto_add_up_where_their_zero_points_agree(other: tuple[float, float], agree: bool):
    # one part's zero point is 0.5, the other's 0.5 or 4; the whole has their mean
    (first, a), (second, b) = kto_drafts((1.0, 0.0)), kto_drafts(other)
    values = [value for part in (a, b) if part.value_S is not None for value in part.value_S.tolist()]
    whole = drafts([1] * 8, values, reference=[-5.0] * 8)
    parts = value(kto, first, a, beta=2.0) + value(kto, second, b, beta=2.0)
    assert (abs(value(kto, first + second, whole, beta=2.0) - parts) < 1e-6) == agree


def test_the_same_drafts_twice_are_twice_the_loss_of_kto():
    logprobs, batch = kto_drafts((1.0, 0.0))
    twice = drafts([1] * 8, [1.0, -1.0, 0.0, 0.0] * 2, reference=[-5.0] * 8)
    assert value(kto, logprobs * 2, twice) == pytest.approx(2 * value(kto, logprobs, batch))


def test_kto_refuses_other_values():
    with pytest.raises(ValueError, match="desirable"):
        kto.loss(torch.tensor([-1.0]), drafts([1], [0.5], reference=[-1.0]), kto.Config())


# sppo -----------------------------------------------------------------------------------------------------------------


def test_sppo_worked_by_hand():
    # eta 4: gain 1.5 against 4 (0.75 - 0.5) = 1, gain -1 against 4 (0 - 0.5) = -2: 1/2 (0.25 + 1)
    batch = drafts([2, 1], [0.75, 0.0], reference=[-2.0, -1.5, -1.0])
    logprobs = [-1.0, -1.0, -2.0]
    loss = sppo.loss(torch.tensor(logprobs), batch, sppo.Config(eta=4))
    assert loss.total.item() == pytest.approx(0.625)
    assert loss.weight == 2
    assert loss.metrics["rewards/errors"].item() == pytest.approx((0.375 - 0.25) + (0.5 - 0.25))
    assert loss.metrics["rewards/accuracies"].item() == 2
    assert slope(sppo, logprobs, batch, eta=4) == pytest.approx([0.5, 0.5, 1])


def test_sppo_with_hard_labels_is_half_the_sum_of_squares():
    # TRL's `sppo_hard`, with beta = 1/eta: (w - 1/(2 beta))^2 + (l + 1/(2 beta))^2
    beta, winner, loser = 0.1, 1.5, -0.5
    batch = drafts([1, 1], [1.0, 0.0], reference=[-3.0, -3.0])
    squares = (winner - 0.5 / beta) ** 2 + (loser + 0.5 / beta) ** 2
    assert value(sppo, [winner - 3, loser - 3], batch, eta=1 / beta) == pytest.approx(squares / 2)


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_sppo_refuses_what_is_no_win_rate(rate: float):
    with pytest.raises(ValueError, match="win rates"):
        sppo.loss(torch.tensor([-1.0]), drafts([1], [rate], reference=[-1.0]), sppo.Config())


# a real training ------------------------------------------------------------------------------------------------------


def group(words: Any, prompt: str, values: Sequence[float | None]) -> Group:
    """Three drafts of a chain."""
    ids = [(*words(text, add_special_tokens=False)["input_ids"], 2) for text in ("yes", "no", "abba")]
    chain = tuple(
        Draft(i, i + 1, tuple(range(i)), "", tokens, (0.0,) * len(tokens), "stop", 5, 0) for i, tokens in enumerate(ids)
    )
    return Group(Attempt(Prompt(prompt, f"sum {prompt}"), chain), tuple(values))


def logps(loaded: load.Loaded, talk: chat.Chat, example: Group) -> Tensor:
    """Summed log-probs of the drafts that have a value."""
    packed = rows.pack([rows.samples_of(example, (), talk)], (), [example])
    with torch.no_grad():
        found_N = policy.tree_logprobs(loaded.model, packed.tree)
    return sum_by_sample(found_N, packed.batch.owner_N, len(packed.batch.num_tokens_S))


@pytest.mark.parametrize(
    ("module", "cfg", "values", "start"),
    [
        (sft, sft.Config(), (0.0, None, 2.0), None),
        (policy_gradient, policy_gradient.Config(kl=(0.1, 0.0), loss_agg="sequence_mean"), (-1.0, None, 3.0), -1.0),
        (kto, kto.Config(beta=1.0), (-1.0, 0.0, 1.0), 0.5),
        (sppo, sppo.Config(eta=4.0), (0.25, None, 1.0), 0.5 * (1 + 4) / 2),
    ],
)
def test_a_training_starts_at_the_theory_and_lifts_the_better_draft(
    tiny_model: Path,
    tmp_path: Path,
    module: ModuleType,
    cfg: Any,
    values: tuple[float | None, ...],
    start: float | None,
):
    loaded = load.load(str(tiny_model), "float32", device="cpu")
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))
    examples = [group(loaded.tokenizer, name, values) for name in ("a", "b", "c", "d")]
    before = [logps(loaded, talk, example) for example in examples]
    how = plan.Config(learning_rate=1e-3, train_batch_size=4, num_train_epochs=8, save_seconds=1e9, max_tree_tokens=80)
    seen: list[dict[str, Any]] = []
    train.run(loaded.model, train.Job(module, cfg, examples, talk, how, 0, "test", tmp_path), seen.append)
    assert start is None or seen[0]["loss"] == pytest.approx(start, abs=1e-5)
    assert seen[-1]["loss"] < seen[0]["loss"]
    for example, earlier in zip(examples, before, strict=True):
        rise = logps(loaded, talk, example) - earlier
        assert rise[-1] > max(0, rise[0])
