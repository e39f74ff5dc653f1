"""Fixed points on pairs, exactly: on a table every objective goes where its paper says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, permutations
from types import ModuleType
from typing import Any

import pytest
import torch
from tables import ANSWERS, REFERENCE_A, REWARD_A, WINS_AA, normalised, one_row, same, whole_table
from torch import Tensor

from upturn.objectives import dpo, evolve, refine, srpo
from upturn.objectives._base import Row, gains
from upturn.training import tabular
from upturn.training.tabular import DIRECT, Draw, Preference, TabularPolicy


def bradley_terry() -> Tensor:
    """`p(a > b)` from rewards."""
    return torch.sigmoid(REWARD_A[:, None] - REWARD_A[None])


def settle(policy: TabularPolicy, objective: ModuleType, cfg: Any, pairs: Sequence[tuple[float, Preference]]) -> None:
    """Minimise over weighted pairs."""

    def loss() -> Tensor:
        views = [(weight, tabular.of_pairs(policy, [pair], objective.needs(cfg))) for weight, pair in pairs]
        return tabular.expected(objective, cfg, views)

    tabular.minimise(policy, loss)


def soft_pairs(wins: Tensor) -> list[tuple[float, Preference]]:
    return [(1.0, Preference(a, b, float(wins[a, b]))) for a, b in combinations(ANSWERS, 2)]


def test_dpo_with_bradley_terry_labels_tilts_the_reference_by_the_reward():
    policy = one_row()
    settle(policy, dpo, dpo.Config(beta=0.5), soft_pairs(bradley_terry()))
    same(policy.probs()[DIRECT], normalised(REFERENCE_A * (REWARD_A / 0.5).exp()))


def test_label_smoothing_shrinks_the_margins_that_dpo_asks_for():
    # p = 0.9 and a tenth flipped: 0.9 * 0.9 + 0.1 * 0.1 = 0.82
    policy = one_row()
    settle(policy, dpo, dpo.Config(beta=0.5, label_smoothing=0.1), [(1.0, Preference(0, 1, 0.9))])
    gain_A = (policy.probs()[DIRECT] / REFERENCE_A).log()
    assert float(gain_A[0] - gain_A[1]) == pytest.approx(math.log(0.82 / 0.18) / 0.5, abs=1e-6)


def test_ipo_tilts_the_reference_by_the_win_rate_over_all_answers():
    # hard labels as they fall: each order of a pair with its probability
    policy, wins = one_row(), WINS_AA
    pairs = [(float(wins[a, b]), Preference(a, b)) for a, b in permutations(ANSWERS, 2)]
    settle(policy, dpo, dpo.Config(beta=0.5, loss_type="ipo"), pairs)
    same(policy.probs()[DIRECT], normalised(REFERENCE_A * (wins.mean(1) / 0.5).exp()))


def improver(wins: Tensor, start_CA: Tensor, beta: float) -> Tensor:
    """Given draft y1: reference exp(p(y2 > y1) / beta), not normalised, `[A, A]`."""
    return start_CA[1:] * (wins.T / beta).exp()


def test_the_refinement_loss_reaches_its_closed_form_and_leaves_direct_answers_alone():
    policy, wins = whole_table(), WINS_AA
    settle(policy, refine, refine.Config(beta=0.5), soft_pairs(wins))
    same(policy.probs()[1:], normalised(improver(wins, policy.start_CA, 0.5)))
    same(policy.probs()[DIRECT], policy.start_CA[DIRECT], atol=1e-15)


@pytest.mark.parametrize(("sides", "expected"), [("both", (1.0, 1.0)), ("improve", (1.0, 0.0)), ("keep", (0.0, 1.0))])
def test_hard_labels_pull_margins_to_half_over_beta_and_one_side_leaves_the_other(
    sides: Any, expected: tuple[float, float]
):
    policy = whole_table()
    settle(policy, refine, refine.Config(beta=0.5, sides=sides), [(1.0, Preference(2, 0))])
    gain_CA = (policy.probs() / policy.start_CA).log()
    for context, margin in zip((tabular.shown(0), tabular.shown(2)), expected, strict=True):
        assert float(gain_CA[context, 2] - gain_CA[context, 0]) == pytest.approx(margin, abs=1e-7)


def test_evolve_reaches_both_closed_forms_at_once():
    policy, wins = whole_table(), bradley_terry()
    cfg = evolve.Config(alpha=0.6, dpo=dpo.Config(beta=0.5), refine=refine.Config(beta=0.4))
    settle(policy, evolve, cfg, soft_pairs(wins))
    same(policy.probs()[DIRECT], normalised(policy.start_CA[DIRECT] * (REWARD_A / 0.5).exp()))
    same(policy.probs()[1:], normalised(improver(wins, policy.start_CA, 0.4)))


def test_srpo_reaches_the_saddle_point_of_its_game():
    policy, wins = whole_table(), WINS_AA
    settle(policy, srpo, srpo.Config(beta=0.5, alpha=0.3), soft_pairs(wins))
    best = improver(wins, policy.start_CA, 0.5)
    same(policy.probs()[1:], normalised(best))
    same(policy.probs()[DIRECT], normalised(policy.start_CA[DIRECT] / best.sum(-1)))


@pytest.mark.parametrize(("alpha", "joint", "improving"), [(0.0, 1 / 0.3, None), (1.0, None, 0.5 / 0.3)])
def test_hard_labels_pull_srpo_to_one_over_beta(alpha: float, joint: float | None, improving: float | None):
    policy = whole_table()
    settle(policy, srpo, srpo.Config(beta=0.3, alpha=alpha), [(1.0, Preference(2, 0))])
    gain_CA = (policy.probs() / policy.start_CA).log()
    given_loser, given_winner = gain_CA[tabular.shown(0)], gain_CA[tabular.shown(2)]
    direct = float(gain_CA[DIRECT, 2] - gain_CA[DIRECT, 0])
    if joint is None:
        assert float(given_loser[2] - given_loser[0]) == pytest.approx(improving, abs=1e-6)
        assert direct == pytest.approx(0, abs=1e-12)
    else:
        assert float(given_loser[2] - given_winner[0]) + direct == pytest.approx(joint, abs=1e-6)


# the table itself -----------------------------------------------------------------------------------------------------


def test_a_table_starts_as_its_own_reference_and_old_policy():
    policy = whole_table()
    logprobs, batch = tabular.of_groups(policy, [[Draw(DIRECT, 1, 1.0)], [Draw(tabular.shown(1), 2, -1.0, turn=2)]])
    assert batch.old_N is not None and batch.turn_S is not None and batch.group_S is not None
    same(gains(logprobs, batch).detach(), logprobs.detach() * 0, atol=1e-15)
    same(logprobs.detach(), batch.old_N, atol=1e-15)
    assert batch.turn_S.tolist() == [1, 2] and batch.group_S.tolist() == [0, 1]
    same(logprobs.detach(), policy.start_CA[[0, 2], [1, 2]].log())


def test_the_rows_of_a_pair_stand_in_their_contexts():
    expected: dict[Row, tuple[int, int]] = {
        ("improve", "chosen"): (1, 2),
        ("keep", "rejected"): (3, 0),
        ("direct", "chosen"): (0, 2),
    }
    policy = whole_table()
    logprobs, batch = tabular.of_pairs(policy, [Preference(2, 0)], frozenset(expected))
    for row, (context, answer) in expected.items():
        same(logprobs[batch.rows[row]][0].detach().exp(), policy.start_CA[context, answer])


def test_every_group_is_a_distribution():
    cases = list(tabular.every_group(REFERENCE_A, 3))
    assert len(cases) == 27
    assert sum(chance for chance, _ in cases) == pytest.approx(1)
    assert dict((answers, chance) for chance, answers in cases)[0, 1, 1] == pytest.approx(0.5 * 0.2 * 0.2)
