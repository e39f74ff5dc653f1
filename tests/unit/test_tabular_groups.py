"""Fixed points on groups, exactly: expectations over every group that could be drawn."""

from __future__ import annotations

from collections.abc import Callable
from math import exp
from typing import Any

import pytest
import torch
from scipy.optimize import root_scalar
from tables import ANSWERS, REFERENCE_A, REWARD_A, WINS_AA, normalised, one_row, same
from torch import Tensor

from upturn.objectives import kto, policy_gradient, sft, sppo
from upturn.training import tabular
from upturn.training.tabular import DIRECT, Draw, TabularPolicy


def gradient(policy: TabularPolicy, total: Tensor) -> Tensor:
    """By the logits of the direct context."""
    (found,) = torch.autograd.grad(total, policy.logits_CA)
    return found[DIRECT]


def test_sft_reaches_the_empirical_distribution():
    policy, counts = one_row(), [3.0, 1.0, 0.5]
    group = [Draw(DIRECT, answer, value=counts[answer]) for answer in ANSWERS]
    tabular.minimise(policy, lambda: sft.loss(*tabular.of_groups(policy, [group]), sft.Config()).total)
    same(policy.probs()[DIRECT], normalised(torch.tensor(counts, dtype=torch.float64)))


def expected_loss(policy: TabularPolicy, cfg: policy_gradient.Config, old_A: Tensor) -> Tensor:
    """Of one draw from the old policy, whose advantage is its reward."""
    cases = [
        (
            float(old_A[answer]),
            tabular.of_groups(policy, [[Draw(DIRECT, answer, reward)]], REFERENCE_A[None], old_A[None]),
        )
        for answer, reward in enumerate(REWARD_A.tolist())
    ]
    return tabular.expected(policy_gradient, cfg, cases)


def test_policy_gradient_with_kl_tilts_the_reference_by_the_reward():
    # drafts of any old policy will do: the ratio makes up for it
    policy, old_A = one_row(), torch.tensor([0.2, 0.6, 0.2], dtype=torch.float64)
    cfg = policy_gradient.Config(clip=None, kl=0.5)
    tabular.minimise(policy, lambda: expected_loss(policy, cfg, old_A))
    same(policy.probs()[DIRECT], normalised(REFERENCE_A * (REWARD_A / 0.5).exp()))


def test_without_the_ratio_k3_rests_elsewhere():
    # at rest policy (r - V) = kl (policy - reference): kl reference / (kl + V - r), with V such that it sums to 1
    kl = 0.5

    def at_rest(v: float) -> Tensor:
        return kl * REFERENCE_A / (kl + v - REWARD_A)

    plain = at_rest(root_scalar(lambda v: float(at_rest(v).sum()) - 1, bracket=(0.51, 5.0), xtol=1e-15).root)
    tilted = normalised(REFERENCE_A * (REWARD_A / kl).exp())
    assert float((plain - tilted).abs().max()) > 0.02
    for corrected, rest in ((False, plain), (True, tilted)):
        cfg = policy_gradient.Config(clip=None, kl=kl, use_bias_correction_kl=corrected)
        for now in (plain, tilted):
            push = gradient(policy := one_row(now), expected_loss(policy, cfg, now))
            assert bool(push.abs().max() < 1e-12) == (now is rest)


CLOSE_A = torch.tensor([1.0, 0.0, 0.9], dtype=torch.float64)
Estimator = Callable[[Tensor], Tensor]
"""Rewards of a group -> its advantages."""


def leave_one_out(rewards: Tensor) -> Tensor:
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)


def less_the_mean(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean()


def standardised(rewards: Tensor) -> Tensor:
    return less_the_mean(rewards) / (rewards.std() + 1e-4)


def expected_gradient(advantages: Estimator, size: int) -> Tensor:
    """Mean gradient of the loss over every group of this size, per draft."""
    policy = one_row()

    def cases() -> Any:
        for chance, answers in tabular.every_group(REFERENCE_A, size):
            worth = advantages(CLOSE_A[list(answers)]).tolist()
            yield chance, tabular.of_groups(policy, [[Draw(DIRECT, a, w) for a, w in zip(answers, worth, strict=True)]])

    return gradient(policy, tabular.expected(policy_gradient, policy_gradient.Config(), cases())) / size


@pytest.mark.parametrize("size", [2, 3])
def test_rloo_is_unbiased_and_grpo_is_not(size: int):
    exact = -REFERENCE_A * (CLOSE_A - REFERENCE_A @ CLOSE_A)  # of minus the expected reward, by the logits
    same(expected_gradient(leave_one_out, size), exact, atol=1e-12)
    same(expected_gradient(less_the_mean, size), exact * (size - 1) / size, atol=1e-12)
    by_std = expected_gradient(standardised, size)
    assert exact[2] < -0.03 and by_std[2] > 0.03  # an answer above the average: one lifts it, the other lowers it


def kto_loss(policy: TabularPolicy, desirable_A: Tensor, cfg: kto.Config) -> Tensor:
    """Each answer desirable with its probability, in a batch with three mismatched drafts."""
    mismatched = [Draw(DIRECT, answer, value=0.0) for answer in ANSWERS]
    cases = [
        (chance, tabular.of_groups(policy, [[Draw(DIRECT, answer, value=side), *mismatched]]))
        for answer in ANSWERS
        for side, chance in ((1.0, float(desirable_A[answer])), (-1.0, 1 - float(desirable_A[answer])))
    ]
    return tabular.expected(kto, cfg, cases)


def test_kto_orders_answers_by_how_often_they_are_desirable():
    policy, desirable_A, cfg = one_row(), torch.tensor([0.1, 0.9, 0.6], dtype=torch.float64), kto.Config(beta=0.5)
    for _ in range(50):
        push = torch.autograd.grad(kto_loss(policy, desirable_A, cfg), policy.logits_CA)[0]
        policy.logits_CA.data -= push
    gain_A = (policy.probs() / policy.start_CA).log()[DIRECT]
    assert gain_A.argsort().tolist() == desirable_A.argsort().tolist() == [0, 2, 1]
    assert gain_A[0] < -1 and gain_A[1] > 0.3


def test_kto_rests_where_desirable_and_undesirable_drafts_weigh_the_same():
    # a share d of desirable drafts is a tie where d desirable_weight = (1 - d) undesirable_weight
    cfg, tie = kto.Config(beta=0.5, desirable_weight=1.0, undesirable_weight=3.0), torch.full((3,), 0.75)
    same(gradient(policy := one_row(), kto_loss(policy, tie, cfg)), torch.zeros(3, dtype=torch.float64), atol=1e-15)
    more = torch.tensor([0.75, 0.80, 0.70])
    push = gradient(policy := one_row(), kto_loss(policy, more, cfg))
    assert push[1] < 0 < push[2]


# the game -------------------------------------------------------------------------------------------------------------

START_A = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def sppo_step(probs_A: Tensor, eta: float) -> Tensor:
    """A step along the natural gradient, each answer as often as it is drawn."""
    policy = one_row(probs_A)
    logprobs, batch = tabular.of_groups(policy, [every_answer(probs_A)])
    (by_draft,) = torch.autograd.grad(
        sppo.loss(logprobs, batch, sppo.Config(eta=eta)).total, logprobs, retain_graph=True
    )
    (push,) = torch.autograd.grad(logprobs, policy.logits_CA, by_draft * probs_A)
    return (policy.logits_CA.detach()[DIRECT] - push[DIRECT] / probs_A).softmax(-1)


def every_answer(probs_A: Tensor) -> list[Draw]:
    """With its win rate against the policy."""
    return [Draw(DIRECT, answer, rate) for answer, rate in enumerate((WINS_AA @ probs_A).tolist())]


def multiplicative_weights(rounds: int, eta: float) -> list[tuple[float, ...]]:
    """Every policy of the game."""
    probs, played, wins = tuple(START_A.tolist()), [], WINS_AA.tolist()
    for _ in range(rounds):
        a, b, c = probs
        raised = [p * exp(eta * (x * a + y * b + z * c)) for p, (x, y, z) in zip(probs, wins, strict=True)]
        total = sum(raised)
        probs = tuple(r / total for r in raised)
        played.append(probs)
    return played


def test_the_average_policy_of_sppo_wins_the_circular_game():
    played = multiplicative_weights(200_000, 0.01)
    average = torch.tensor(played, dtype=torch.float64).mean(0)
    same(average, torch.tensor([0.29995, 0.29983, 0.40022], dtype=torch.float64), atol=5e-6)
    assert float((average @ WINS_AA).min()) == pytest.approx(0.49991, abs=5e-6)
    probs_A = START_A
    for policy in played[:200]:  # the same game, played by the objective
        probs_A = sppo_step(probs_A, eta=0.01)
        assert probs_A.tolist() == pytest.approx(policy, abs=1e-12)


def test_a_whole_training_of_sppo_is_nearly_a_step_of_multiplicative_weights():
    # the minimum of the loss itself, not one step towards it: the rest is of second order in eta
    def error(eta: float) -> float:
        policy, group = one_row(START_A), every_answer(START_A)
        tabular.minimise(policy, lambda: sppo.loss(*tabular.of_groups(policy, [group]), sppo.Config(eta=eta)).total)
        step = normalised(START_A * (eta * WINS_AA @ START_A).exp())
        return float((policy.probs()[DIRECT] - step).abs().max())

    assert error(0.2) < 1e-3
    assert error(0.1) == pytest.approx(error(0.2) / 4, rel=0.2)
