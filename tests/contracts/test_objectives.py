"""Laws every objective obeys, and the numbers of the theory. Walks the folder: a new file is tested by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from upturn import registry
from upturn.numerics import sum_by_sample
from upturn.objectives import dpo, evolve, nll, refine, srpo
from upturn.objectives._base import Batch, Row
from upturn.training import rows

NAMES = registry.names("objectives")
VALUES = {"kto": (-1.0, 1.0), "sppo": (0.0, 0.25, 1.0), "policy_gradient": (-1.5, 0.0, 2.0)}
"""What the drafts of a group may be worth; kto is without mismatched drafts, since its z0 is that of a micro-batch."""
DRAFTS = 3
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("policy_gradient", {"kl": (0.2, 0.0), "loss_agg": "sequence_mean"}),
    ("policy_gradient", {"clip": None, "kl": 0.3, "loss_agg": "sequence_sum", "use_bias_correction_kl": False}),
    ("kto", {"desirable_weight": 1.5, "beta": 2.0}),
    ("evolve", {"nll_weight": 0.5, "nll": nll.Config(critique=0.5)}),
]
View = tuple[torch.Tensor, Batch]


def view_of(name: str, cfg: Any, count: int) -> View:
    """Random pairs, or groups of 3 drafts, as the objective reads them."""
    needs = registry.find("objectives", name).needs(cfg)
    return groups_of(count, VALUES.get(name, (0.5, 1.0))) if needs is None else batch_of(needs, count)


def samples_per_example(batch: Batch) -> int:
    return len(batch.rows) or DRAFTS


def batch_of(needs: frozenset[Row], pairs: int) -> View:
    """Random log-probs of `pairs` pairs with answers of 1 to 4 tokens."""
    order = rows.order(needs)
    first = torch.arange(pairs) * len(order)
    logprobs, batch = random_samples(pairs * len(order))
    where = {row: first + place for place, row in enumerate(order)}
    return logprobs, replace(batch, rows=where, p_P=torch.ones(pairs, dtype=torch.float64))


def groups_of(groups: int, values: Sequence[float]) -> View:
    """Random log-probs of `groups` groups of drafts."""
    logprobs, batch = random_samples(groups * DRAFTS)
    number = torch.arange(groups * DRAFTS)
    worth = torch.tensor([values[(i * i + i // 2) % len(values)] for i in number.tolist()], dtype=torch.float64)
    return logprobs, replace(batch, value_S=worth, turn_S=1 + number % DRAFTS, group_S=number // DRAFTS)


def random_samples(count: int) -> View:
    """Log-probs of samples of 1 to 4 tokens under the policy, the reference and the old policy."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 5, (count,), generator=generator)
    owner = torch.repeat_interleave(torch.arange(count), lengths)
    policy, reference, old = -torch.rand(3, len(owner), generator=generator, dtype=torch.float64)
    sums = sum_by_sample(reference, owner, count)
    batch = Batch(owner, lengths, {}, torch.zeros(0), reference_S=sums, reference_N=reference, old_N=old)
    return policy, batch


def pick(view: View, examples: Sequence[int]) -> View:
    """Some examples of a view, in this order, as a view of their own."""
    logprobs, batch = view
    per = samples_per_example(batch)
    samples = torch.tensor([example * per + place for example in examples for place in range(per)])
    tokens = torch.cat([(batch.owner_N == sample).nonzero()[:, 0] for sample in samples])
    lengths = batch.num_tokens_S[samples]
    owner = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    by_token = {name: found[tokens] for name in ("reference_N", "old_N") if (found := getattr(batch, name)) is not None}
    names = ("reference_S", "value_S", "turn_S", "group_S")
    by_sample = {name: found[samples] for name in names if (found := getattr(batch, name)) is not None}
    where = {row: torch.arange(len(examples)) * per + int(old[0]) % per for row, old in batch.rows.items()}
    p = batch.p_P[torch.tensor(examples)] if batch.rows else batch.p_P
    return logprobs[tokens], Batch(owner, lengths, where, p, **by_token, **by_sample)


def at_reference(needs: frozenset[Row]) -> View:
    logprobs, batch = batch_of(needs, 1)
    return logprobs, replace(batch, reference_S=sum_by_sample(logprobs, batch.owner_N, len(batch.num_tokens_S)))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_micro_batches_add_up(name: str, settings: dict[str, Any]):
    module = registry.find("objectives", name)
    cfg: Any = module.Config(**settings)
    view = view_of(name, cfg, 5)
    whole = module.loss(*view, cfg)
    parts = [module.loss(*pick(view, examples), cfg) for examples in ((0, 1), (2, 3, 4))]
    torch.testing.assert_close(parts[0].total + parts[1].total, whole.total)
    assert parts[0].weight + parts[1].weight == whole.weight
    for metric, value in whole.metrics.items():
        torch.testing.assert_close(parts[0].metrics[metric] + parts[1].metrics[metric], value, msg=metric)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_order_of_examples_does_not_matter(name: str, settings: dict[str, Any]):
    module = registry.find("objectives", name)
    cfg: Any = module.Config(**settings)
    view = view_of(name, cfg, 4)
    here, there = module.loss(*view, cfg), module.loss(*pick(view, (2, 0, 3, 1)), cfg)
    torch.testing.assert_close(here.total, there.total)
    assert here.weight == there.weight


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_gradients_match_finite_differences(name: str, settings: dict[str, Any]):
    module = registry.find("objectives", name)
    cfg: Any = module.Config(**settings)
    logprobs, batch = view_of(name, cfg, 2)
    assert torch.autograd.gradcheck(lambda x: module.loss(x, batch, cfg).total, logprobs.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_row_or_value_is_a_named_error(name: str):
    module = registry.find("objectives", name)
    cfg: Any = module.Config()
    logprobs, batch = view_of(name, cfg, 1)
    with pytest.raises(ValueError, match=r"answer in the (direct|improve|keep) context|groups of drafts"):
        module.loss(logprobs, replace(batch, rows={}, value_S=None), cfg)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_missing_logprobs_of_other_models_are_a_named_error(name: str, settings: dict[str, Any]):
    module = registry.find("objectives", name)
    cfg: Any = module.Config(**settings)
    logprobs, batch = view_of(name, cfg, 1)
    without_reference, without_old = replace(batch, reference_S=None, reference_N=None), replace(batch, old_N=None)
    for bare, wanted, word in (
        (without_reference, module.uses_reference(cfg), "reference"),
        (without_old, getattr(module, "USES_OLD", False), "old"),
    ):
        if not wanted:
            module.loss(logprobs, bare, cfg)
            continue
        with pytest.raises(ValueError, match=word):
            module.loss(logprobs, bare, cfg)


@pytest.mark.parametrize(
    ("module", "cfg", "expected"),
    [
        (dpo, dpo.Config(), math.log(2)),
        (dpo, dpo.Config(loss_type="ipo", beta=0.5), 1.0),
        (refine, refine.Config(), 0.5),
        (refine, refine.Config(sides="improve"), 0.25),
        (refine, refine.Config(sides="keep"), 0.25),
        (refine, refine.Config(loss_type="logistic"), 2 * math.log(2)),
        (evolve, evolve.Config(alpha=0.8), 0.2 * math.log(2) + 0.8 * 0.5),  # 0.5386
        (srpo, srpo.Config(alpha=0.3), 0.7 * 1 + 0.3 * 0.5),
    ],
)
def test_losses_where_the_policy_is_the_reference(module: Any, cfg: Any, expected: float):
    loss = module.loss(*at_reference(module.needs(cfg)), cfg)
    assert loss.total.item() / loss.weight == pytest.approx(expected, abs=1e-6)


def test_dpo_on_one_pair_worked_by_hand():
    # chosen: -1 - 2 = -3 against -5 gains 2; rejected: -4 against -3 loses 1; margin 3, beta 0.5 -> -log sigma(1.5)
    batch = Batch(
        owner_N=torch.tensor([0, 0, 1]),
        num_tokens_S=torch.tensor([2, 1]),
        rows={("direct", "chosen"): torch.tensor([0]), ("direct", "rejected"): torch.tensor([1])},
        p_P=torch.ones(1),
        reference_S=torch.tensor([-5.0, -3.0]),
    )
    logprobs = torch.tensor([-1.0, -2.0, -4.0])
    assert dpo.loss(logprobs, batch, dpo.Config(beta=0.5)).total.item() == pytest.approx(math.log1p(math.exp(-1.5)))
    # label smoothing 0.1: 0.9 log(1 + e^-1.5) + 0.1 log(1 + e^1.5)
    smooth = 0.9 * math.log1p(math.exp(-1.5)) + 0.1 * math.log1p(math.exp(1.5))
    assert dpo.loss(logprobs, batch, dpo.Config(beta=0.5, label_smoothing=0.1)).total.item() == pytest.approx(smooth)
    # ipo: (3 - 1 / (2 * 0.5))^2 = 4
    assert dpo.loss(logprobs, batch, dpo.Config(beta=0.5, loss_type="ipo")).total.item() == pytest.approx(4.0)
    # rpo: minus alpha * (-3 / 2 tokens)
    plus = dpo.loss(logprobs, batch, dpo.Config(beta=0.5, rpo_alpha=2.0)).total.item()
    assert plus == pytest.approx(math.log1p(math.exp(-1.5)) + 2 * 1.5)


def refine_batch(p: float = 1.0) -> tuple[torch.Tensor, Batch]:
    """Gains: improve chosen +3, rejected -1 (margin 4); keep chosen +1, rejected +2 (margin -1)."""
    order: list[Row] = [("improve", "chosen"), ("improve", "rejected"), ("keep", "chosen"), ("keep", "rejected")]
    batch = Batch(
        owner_N=torch.tensor([0, 0, 1, 2, 3]),
        num_tokens_S=torch.tensor([2, 1, 1, 1]),
        rows={row: torch.tensor([i]) for i, row in enumerate(order)},
        p_P=torch.tensor([p]),
        reference_S=torch.tensor([-5.0, -2.0, -4.0, -6.0]),
    )
    return torch.tensor([-1.0, -1.0, -3.0, -3.0, -4.0]), batch


def test_refine_on_one_pair_worked_by_hand():
    # beta 0.25: improve (0.5 - 1)^2 = 0.25, keep (0.5 + 0.25)^2 = 0.5625
    logprobs, batch = refine_batch()
    cfg = refine.Config(beta=0.25)
    assert refine.loss(logprobs, batch, cfg).total.item() == pytest.approx(0.8125)
    one = refine.loss(logprobs, batch, refine.Config(beta=0.25, sides="improve")).total.item()
    assert one == pytest.approx(0.25)
    # soft label 0.7: (0.2 - 1)^2 + (0.2 + 0.25)^2
    assert refine.loss(*refine_batch(0.7), cfg).total.item() == pytest.approx(0.64 + 0.2025)
    logistic = refine.loss(logprobs, batch, refine.Config(beta=0.25, loss_type="logistic")).total.item()
    assert logistic == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(0.25)))


def test_the_loss_of_sherlock_is_four_times_the_two_sided_loss():
    logprobs, batch = refine_batch()
    b, improve, keep = 0.25, 4.0, -1.0
    sherlock = (1 - 2 * b * improve) ** 2 + (1 - 2 * b * keep) ** 2
    assert sherlock == pytest.approx(4 * refine.loss(logprobs, batch, refine.Config(beta=b)).total.item())


def test_srpo_on_one_pair_worked_by_hand():
    # gains across: improve chosen 3 - keep rejected 2; direct: chosen 2, rejected 4; joint margin 1 - 2 = -1
    logprobs, batch = refine_batch()
    direct: dict[Row, torch.Tensor] = {
        ("direct", "chosen"): torch.tensor([4]),
        ("direct", "rejected"): torch.tensor([5]),
    }
    both = replace(
        batch,
        owner_N=torch.cat([batch.owner_N, torch.tensor([4, 5, 5])]),
        num_tokens_S=torch.tensor([2, 1, 1, 1, 1, 2]),
        rows=batch.rows | direct,
        reference_S=torch.tensor([-5.0, -2.0, -4.0, -6.0, -3.0, -6.0]),
    )
    logprobs = torch.cat([logprobs, torch.tensor([-1.0, -0.5, -1.5])])
    joint = srpo.loss(logprobs, both, srpo.Config(beta=0.25, alpha=0.0)).total.item()
    assert joint == pytest.approx((1 + 0.25) ** 2)
    mixed = srpo.loss(logprobs, both, srpo.Config(beta=0.25, alpha=0.4)).total.item()
    assert mixed == pytest.approx(0.6 * 1.5625 + 0.4 * 0.8125)
    # soft label 0.7: 2p - 1 = 0.4
    soft = srpo.loss(logprobs, replace(both, p_P=torch.tensor([0.7])), srpo.Config(beta=0.25, alpha=0.0)).total.item()
    assert soft == pytest.approx((0.4 + 0.25) ** 2)
    only = srpo.loss(*refine_batch(), srpo.Config(beta=0.25, alpha=1.0)).total.item()
    assert only == pytest.approx(refine.loss(*refine_batch(), refine.Config(beta=0.25)).total.item())


def test_a_tie_rests_at_zero_margin():
    logprobs, batch = at_reference(refine.needs(refine.Config()))
    tie = replace(batch, p_P=torch.full((1,), 0.5))
    logprobs.requires_grad_()
    total = refine.loss(logprobs, tie, refine.Config()).total
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-12)
    assert logprobs.grad is not None and logprobs.grad.abs().max() < 1e-6


def test_alpha_zero_is_dpo_and_alpha_one_is_the_refinement_loss():
    needs = dpo.needs(dpo.Config()) | refine.needs(refine.Config())
    logprobs, batch = batch_of(needs, 3)
    none = evolve.loss(logprobs, batch, evolve.Config(alpha=0)).total
    full = evolve.loss(logprobs, batch, evolve.Config(alpha=1)).total
    torch.testing.assert_close(none, dpo.loss(logprobs, batch, dpo.Config()).total)
    torch.testing.assert_close(full, refine.loss(logprobs, batch, refine.Config()).total)
    assert evolve.needs(evolve.Config(alpha=0)) == dpo.needs(dpo.Config())
    assert evolve.needs(evolve.Config(alpha=1)) == refine.needs(refine.Config())


def test_nll_is_a_token_mean_over_the_weighted_contexts():
    # direct answer of 2 tokens (-1, -2), the same answer refined (-4) with weight 0.5: (3 + 0.5 * 4) / (2 + 0.5)
    batch = Batch(
        owner_N=torch.tensor([0, 0, 1]),
        num_tokens_S=torch.tensor([2, 1]),
        rows={("direct", "chosen"): torch.tensor([0]), ("improve", "chosen"): torch.tensor([1])},
        p_P=torch.ones(1),
    )
    loss = nll.loss(torch.tensor([-1.0, -2.0, -4.0]), batch, nll.Config(improve=0.5))
    assert loss.total.item() / loss.weight == pytest.approx(5 / 2.5)


def test_every_pair_weighs_the_same_in_the_nll_of_evolve():
    # chosen answers of 2 tokens (-1, -2) and of 1 (-4): means of 1.5 and 4, where a mean over all tokens is 7 / 3
    batch = Batch(
        owner_N=torch.tensor([0, 0, 1, 2]),
        num_tokens_S=torch.tensor([2, 1, 1]),
        rows={("direct", "chosen"): torch.tensor([0, 1]), ("direct", "rejected"): torch.tensor([2, 2])},
        p_P=torch.ones(2),
        reference_S=torch.tensor([-3.0, -4.0, -5.0]),
    )
    cfg = evolve.Config(alpha=0, nll_weight=0.5, nll=nll.Config(improve=0))
    loss = evolve.loss(torch.tensor([-1.0, -2.0, -4.0, -5.0]), batch, cfg)
    assert loss.total.item() == pytest.approx(2 * math.log(2) + 0.5 * (1.5 + 4))
    assert loss.metrics["nll/loss"].item() == pytest.approx(5.5)


def test_an_nll_that_learns_nothing_is_refused():
    with pytest.raises(ValidationError, match="every weight is 0"):
        nll.Config(direct=0, improve=0)


def test_critiques_are_learnt_or_not_but_never_left_out_in_silence():
    with pytest.raises(ValidationError, match="nll_weight"):
        evolve.Config(nll=nll.Config(critique=0.5))
    assert ("critique", "chosen") in evolve.needs(evolve.Config(nll=nll.Config(critique=0.5), nll_weight=0.1))


def test_nll_learns_both_critiques():
    # the answer (-4) and critiques of 1 and 2 tokens (-1; -2, -3), weights 1 and 0.5: (4 + 0.5 * 6) / (1 + 0.5 * 3)
    cfg = nll.Config(direct=0, critique=0.5)
    assert nll.needs(cfg) == {("improve", "chosen"), ("critique", "chosen"), ("critique", "rejected")}
    batch = Batch(
        owner_N=torch.tensor([0, 1, 2, 2]),
        num_tokens_S=torch.tensor([1, 1, 2]),
        rows={row: torch.tensor([place]) for place, row in enumerate(rows.order(nll.needs(cfg)))},
        p_P=torch.ones(1),
    )
    loss = nll.loss(torch.tensor([-4.0, -1.0, -2.0, -3.0]), batch, cfg)
    assert loss.total.item() / loss.weight == pytest.approx(7 / 2.5)
    assert loss.metrics["critique/logps/rejected"].item() == -5


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_say_what_equation_needs_and_differences(name: str):
    docstring = registry.find("objectives", name).__doc__ or ""
    for heading in ("What it does", "Equation", "Needs", "Differs"):
        assert heading in docstring
