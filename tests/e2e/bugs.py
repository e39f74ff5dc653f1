"""The classic bugs of preference training and policy gradients, each with the test that must catch it."""

from __future__ import annotations

from dataclasses import dataclass

CONTRACTS = "tests/contracts/test_objectives.py"
GROUPS = "tests/unit/test_group_objectives.py"
TABLE, TABLE_GROUPS = "tests/unit/test_tabular.py", "tests/unit/test_tabular_groups.py"
ROWS = "tests/unit/test_rows.py"


@dataclass(frozen=True)
class Bug:
    """A piece of text in a file of the package, what stands there instead, and the test that must fail."""

    file: str
    right: str
    wrong: str
    caught_by: str


PAIRS = {
    "chosen and rejected swapped": Bug(
        "objectives/_base.py",
        'values_S[_row(batch, context, "chosen")] - values_S[_row(batch, context, "rejected")]',
        'values_S[_row(batch, context, "rejected")] - values_S[_row(batch, context, "chosen")]',
        f"{CONTRACTS}::test_dpo_on_one_pair_worked_by_hand",
    ),
    "mean for sum over pairs": Bug(
        "objectives/dpo.py", "Loss(loss_P.sum(),", "Loss(loss_P.mean(),", f"{CONTRACTS}::test_micro_batches_add_up"
    ),
    "mean for sum over tokens": Bug(
        "objectives/_base.py",
        "return sum_by_sample(logprobs_N, batch.owner_N, len(batch.num_tokens_S)) - batch.reference_S",
        "return sum_by_sample(logprobs_N, batch.owner_N, len(batch.num_tokens_S)) / batch.num_tokens_S"
        " - batch.reference_S",
        f"{CONTRACTS}::test_dpo_on_one_pair_worked_by_hand",
    ),
    "prompt not masked": Bug(
        "training/rows.py",
        "Sample(chat.context(question, shown), chat.target(answer))",
        "Sample((), chat.context(question, shown) + chat.target(answer))",
        f"{ROWS}::test_only_the_last_answer_is_a_target_and_contexts_hold_the_sampled_ids",
    ),
    "no reference": Bug(
        "objectives/_base.py",
        "len(batch.num_tokens_S)) - batch.reference_S",
        "len(batch.num_tokens_S))",
        f"{CONTRACTS}::test_losses_where_the_policy_is_the_reference",
    ),
    "beta outside the square": Bug(
        "objectives/refine.py",
        "loss_P = (batch.p_P - 0.5 - margin_P) ** 2",
        "loss_P = cfg.beta * (batch.p_P - 0.5 - margin_P / cfg.beta) ** 2",
        f"{CONTRACTS}::test_refine_on_one_pair_worked_by_hand",
    ),
    "beta outside the sigmoid": Bug(
        "objectives/dpo.py",
        "loss_P = -label_P * F.logsigmoid(scaled_P) - (1 - label_P) * F.logsigmoid(-scaled_P)",
        "loss_P = -cfg.beta * (label_P * F.logsigmoid(margin_P) + (1 - label_P) * F.logsigmoid(-margin_P))",
        f"{CONTRACTS}::test_dpo_on_one_pair_worked_by_hand",
    ),
}

CRITIQUES = {
    "critique of the other draft": Bug(
        "training/rows.py",
        "return (answer, _critique(pair, side))",
        'return (answer, _critique(pair, "chosen"))',
        f"{ROWS}::TestCritiques::test_each_draft_is_shown_with_what_is_said_of_it",
    ),
    "critique learnt behind the request to refine": Bug(
        "training/rows.py",
        'chat.context(question, (answer,), kind="critique")',
        "chat.context(question, (answer,))",
        f"{ROWS}::TestCritiques::test_training_and_sampling_have_the_same_contexts",
    ),
    "only right drafts criticised": Bug(
        "objectives/nll.py",
        '"critique": SIDES',
        '"critique": ("chosen",)',
        f"{CONTRACTS}::test_nll_learns_both_critiques",
    ),
    "refining without the critique": Bug(
        "training/rows.py",
        "return (answer, _critique(pair, side)) if critiques else (answer,)",
        "return (answer,)",
        f"{ROWS}::TestCritiques::test_each_draft_is_shown_with_what_is_said_of_it",
    ),
    "kept answers shown the critique again": Bug(
        "strategies/critique_refine.py",
        "shown = kept[-1:]",
        "shown = [answer, critique]",
        "tests/contracts/test_strategies.py::TestCritiqueRefine"
        "::test_where_nothing_is_wrong_the_answer_is_kept_for_all_turns_left",
    ),
}

SRPO = {
    "srpo: improve for keep": Bug(
        "objectives/srpo.py",
        '_row(batch, "keep", "rejected")',
        '_row(batch, "improve", "rejected")',
        f"{TABLE}::test_srpo_reaches_the_saddle_point_of_its_game",
    ),
    "srpo: half the target": Bug(
        "objectives/srpo.py",
        "(2 * batch.p_P - 1 - cfg.beta",
        "(batch.p_P - 0.5 - cfg.beta",
        f"{CONTRACTS}::test_srpo_on_one_pair_worked_by_hand",
    ),
    "srpo: sign of the direct margin": Bug(
        "objectives/srpo.py",
        "cfg.beta * (across_P + direct_P)) ** 2",
        "cfg.beta * (across_P - direct_P)) ** 2",
        f"{TABLE}::test_srpo_reaches_the_saddle_point_of_its_game",
    ),
    "srpo: alpha on the other part": Bug(
        "objectives/srpo.py",
        "(1 - cfg.alpha) * joint_P",
        "cfg.alpha * joint_P",
        f"{CONTRACTS}::test_srpo_on_one_pair_worked_by_hand",
    ),
    "srpo: improver with a beta of its own": Bug(
        "objectives/srpo.py",
        "refine.Config(beta=cfg.beta)",
        "refine.Config()",
        f"{TABLE}::test_hard_labels_pull_srpo_to_one_over_beta",
    ),
    "srpo: mean for sum over pairs": Bug(
        "objectives/srpo.py",
        "(1 - cfg.alpha) * joint_P.sum()",
        "(1 - cfg.alpha) * joint_P.mean()",
        f"{CONTRACTS}::test_micro_batches_add_up",
    ),
}

SFT = {
    "sft: sign": Bug(
        "objectives/sft.py", "Loss(-logps_S.sum(),", "Loss(logps_S.sum(),", f"{GROUPS}::test_sft_worked_by_hand"
    ),
    "sft: mean for sum over drafts": Bug(
        "objectives/sft.py", "Loss(-logps_S.sum(),", "Loss(-logps_S.mean(),", f"{CONTRACTS}::test_micro_batches_add_up"
    ),
    "sft: mean for sum over tokens": Bug(
        "objectives/sft.py",
        "sum_by_sample(logprobs_N, batch.owner_N, len(value_S))",
        "sum_by_sample(logprobs_N, batch.owner_N, len(value_S)) / batch.num_tokens_S",
        f"{GROUPS}::test_sft_worked_by_hand",
    ),
    "sft: all drafts alike": Bug(
        "objectives/sft.py",
        "logps_S = value_S * sum",
        "logps_S = sum",
        f"{TABLE_GROUPS}::test_sft_reaches_the_empirical_distribution",
    ),
    "sft: divided by all tokens": Bug(
        "objectives/sft.py",
        "float((value_S * batch.num_tokens_S).sum())",
        "float(batch.num_tokens_S.sum())",
        f"{GROUPS}::test_sft_worked_by_hand",
    ),
}

POLICY_GRADIENT = {
    "policy_gradient: ratio upside down": Bug(
        "objectives/policy_gradient.py",
        "(logprobs_N - batch.old_N).exp()",
        "(batch.old_N - logprobs_N).exp()",
        f"{GROUPS}::test_at_the_start_the_gradient_is_that_of_reinforce",
    ),
    "policy_gradient: max for min": Bug(
        "objectives/policy_gradient.py",
        "-plain_N.minimum(",
        "-plain_N.maximum(",
        f"{GROUPS}::test_clipped_tokens_have_no_gradient_and_bad_tokens_that_rose_do",
    ),
    "policy_gradient: clip without the pessimist": Bug(
        "objectives/policy_gradient.py",
        "-plain_N.minimum(ratio_N.clamp(low, high) * advantage_N)",
        "-(ratio_N.clamp(low, high) * advantage_N)",
        f"{GROUPS}::test_clipped_tokens_have_no_gradient_and_bad_tokens_that_rose_do",
    ),
    "policy_gradient: k3 the other way round": Bug(
        "objectives/policy_gradient.py",
        "batch.reference_N - logprobs_N",
        "logprobs_N - batch.reference_N",
        f"{GROUPS}::test_the_kl_term_by_turn_worked_by_hand",
    ),
    "policy_gradient: k3 without gradient": Bug(
        "objectives/policy_gradient.py",
        "kl_N = _k3(logprobs_N, batch)",
        "kl_N = _k3(logprobs_N, batch).detach()",
        f"{TABLE_GROUPS}::test_policy_gradient_with_kl_tilts_the_reference_by_the_reward",
    ),
    "policy_gradient: k3 without its ratio": Bug(
        "objectives/policy_gradient.py",
        "ratio_N * kl_N if cfg.use_bias_correction_kl else kl_N",
        "kl_N",
        f"{TABLE_GROUPS}::test_without_the_ratio_k3_rests_elsewhere",
    ),
    "policy_gradient: turns from 0": Bug(
        "objectives/policy_gradient.py",
        "(batch.turn_S - 1)",
        "batch.turn_S",
        f"{GROUPS}::test_the_kl_term_by_turn_worked_by_hand",
    ),
    "policy_gradient: mean for sum over tokens": Bug(
        "objectives/policy_gradient.py",
        'mean=cfg.loss_agg == "sequence_mean"',
        "mean=True",
        f"{GROUPS}::test_policy_gradient_worked_by_hand",
    ),
}

KTO = {
    "kto: zero point with gradient": Bug(
        "objectives/kto.py",
        "gain_S.detach()[~judged_S]",
        "gain_S[~judged_S]",
        f"{GROUPS}::test_the_zero_point_of_kto_has_no_gradient",
    ),
    "kto: zero point below 0": Bug(
        "objectives/kto.py", "gains.mean().clamp(min=0)", "gains.mean()", f"{GROUPS}::test_kto_worked_by_hand"
    ),
    "kto: zero point of the judged drafts": Bug(
        "objectives/kto.py", "[~judged_S]", "[judged_S]", f"{GROUPS}::test_kto_worked_by_hand"
    ),
    "kto: undesirable drafts lifted": Bug(
        "objectives/kto.py",
        "above = side * (gain - zero)",
        "above = gain - zero",
        f"{TABLE_GROUPS}::test_kto_orders_answers_by_how_often_they_are_desirable",
    ),
    "kto: weights swapped": Bug(
        "objectives/kto.py",
        "torch.where(side > 0,",
        "torch.where(side < 0,",
        f"{TABLE_GROUPS}::test_kto_rests_where_desirable_and_undesirable_drafts_weigh_the_same",
    ),
    "kto: mismatched drafts counted": Bug(
        "objectives/kto.py",
        "Loss(losses.sum(), float(len(side))",
        "Loss(losses.sum(), float(len(value_S))",
        f"{GROUPS}::test_kto_worked_by_hand",
    ),
}

SPPO = {
    "sppo: no 1/2 before the square": Bug(
        "objectives/sppo.py", "0.5 * (gain_S", "(gain_S", f"{GROUPS}::test_sppo_worked_by_hand"
    ),
    "sppo: win rates not centred": Bug(
        "objectives/sppo.py",
        "cfg.eta * (win_S - 0.5)) ** 2",
        "cfg.eta * win_S) ** 2",
        f"{TABLE_GROUPS}::test_a_whole_training_of_sppo_is_nearly_a_step_of_multiplicative_weights",
    ),
    "sppo: sign of the target": Bug(
        "objectives/sppo.py",
        "gain_S - cfg.eta",
        "gain_S + cfg.eta",
        f"{TABLE_GROUPS}::test_the_average_policy_of_sppo_wins_the_circular_game",
    ),
    "sppo: eta outside the square": Bug(
        "objectives/sppo.py",
        "0.5 * (gain_S - cfg.eta * (win_S - 0.5)) ** 2",
        "0.5 * cfg.eta * (gain_S / cfg.eta - (win_S - 0.5)) ** 2",
        f"{GROUPS}::test_sppo_worked_by_hand",
    ),
    "sppo: mean for sum over drafts": Bug(
        "objectives/sppo.py", "Loss(loss_S.sum(),", "Loss(loss_S.mean(),", f"{CONTRACTS}::test_micro_batches_add_up"
    ),
}

BUGS = PAIRS | CRITIQUES | SRPO | SFT | POLICY_GRADIENT | KTO | SPPO
