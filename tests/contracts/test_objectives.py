"""Laws every objective obeys, and the numbers of the theory. Walks the folder: a new file is tested by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from upturn import registry
from upturn.numerics import sum_by_sample
from upturn.objectives import dpo, evolve, nll, refine
from upturn.objectives._base import Batch, Row
from upturn.training import rows

NAMES = registry.names("objectives")


def batch_of(needs: frozenset[Row], pairs: int, seed: int = 0, reference: bool = True) -> tuple[torch.Tensor, Batch]:
    """Random log-probs of `pairs` pairs with answers of 1 to 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    order = rows.order(needs)
    lengths = torch.randint(1, 5, (pairs * len(order),), generator=generator)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    logprobs = -torch.rand(len(owner), generator=generator, dtype=torch.float64)
    first = torch.arange(pairs) * len(order)
    batch = Batch(
        owner_N=owner,
        num_tokens_S=lengths,
        rows={row: first + place for place, row in enumerate(order)},
        p_P=torch.ones(pairs, dtype=torch.float64),
        reference_S=-torch.rand(len(lengths), generator=generator, dtype=torch.float64) if reference else None,
    )
    return logprobs, batch


def part_of(logprobs: torch.Tensor, batch: Batch, pairs: slice, per_pair: int) -> tuple[torch.Tensor, Batch]:
    """Some pairs of a batch as a batch of their own."""
    samples = slice(pairs.start * per_pair, pairs.stop * per_pair)
    inside = (batch.owner_N >= samples.start) & (batch.owner_N < samples.stop)
    number = pairs.stop - pairs.start
    assert batch.reference_S is not None
    return logprobs[inside], Batch(
        owner_N=batch.owner_N[inside] - samples.start,
        num_tokens_S=batch.num_tokens_S[samples],
        rows={row: where[:number] for row, where in batch.rows.items()},
        p_P=batch.p_P[pairs],
        reference_S=batch.reference_S[samples],
    )


def at_reference(needs: frozenset[Row]) -> tuple[torch.Tensor, Batch]:
    logprobs, batch = batch_of(needs, 1)
    sums = sum_by_sample(logprobs, batch.owner_N, len(batch.num_tokens_S))
    return logprobs, Batch(batch.owner_N, batch.num_tokens_S, batch.rows, batch.p_P, sums)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up(name: str):
    module = registry.find("objectives", name)
    cfg: Any = module.Config()
    needs = module.needs(cfg)
    logprobs, batch = batch_of(needs, 5)
    whole = module.loss(logprobs, batch, cfg)
    parts = [module.loss(*part_of(logprobs, batch, s, len(needs)), cfg) for s in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(parts[0].total + parts[1].total, whole.total)
    assert parts[0].weight + parts[1].weight == whole.weight
    for metric, value in whole.metrics.items():
        torch.testing.assert_close(parts[0].metrics[metric] + parts[1].metrics[metric], value)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_match_finite_differences(name: str):
    module = registry.find("objectives", name)
    cfg: Any = module.Config()
    logprobs, batch = batch_of(module.needs(cfg), 2)
    assert torch.autograd.gradcheck(lambda x: module.loss(x, batch, cfg).total, logprobs.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_row_is_a_named_error(name: str):
    module = registry.find("objectives", name)
    cfg: Any = module.Config()
    logprobs, batch = batch_of(module.needs(cfg), 1)
    bare = Batch(batch.owner_N, batch.num_tokens_S, {}, batch.p_P, batch.reference_S)
    with pytest.raises(ValueError, match=r"answer in the (direct|improve|keep) context"):
        module.loss(logprobs, bare, cfg)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "nll"])
def test_a_missing_reference_is_a_named_error(name: str):
    module = registry.find("objectives", name)
    cfg: Any = module.Config()
    logprobs, batch = batch_of(module.needs(cfg), 1, reference=False)
    with pytest.raises(ValueError, match="reference"):
        module.loss(logprobs, batch, cfg)


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


def test_a_tie_rests_at_zero_margin():
    logprobs, batch = at_reference(refine.needs(refine.Config()))
    tie = Batch(batch.owner_N, batch.num_tokens_S, batch.rows, torch.full((1,), 0.5), batch.reference_S)
    logprobs.requires_grad_()
    total = refine.loss(logprobs, tie, refine.Config()).total
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-12)
    assert logprobs.grad is not None and logprobs.grad.abs().max() < 1e-6


@pytest.mark.parametrize(("sides", "expected"), [("both", (1.0, 1.0)), ("improve", (1.0, 0.0)), ("keep", (0.0, 1.0))])
def test_hard_labels_pull_margins_to_half_over_beta_and_one_side_leaves_the_other(
    sides: Any, expected: tuple[float, float]
):
    # tabular policy: one token per sample, 4 free log-ratios; beta 0.5 -> target 1 / (2 * 0.5) = 1 nat
    order: list[Row] = [("improve", "chosen"), ("improve", "rejected"), ("keep", "chosen"), ("keep", "rejected")]
    batch = Batch(
        torch.arange(4),
        torch.ones(4),
        {row: torch.tensor([i]) for i, row in enumerate(order)},
        torch.ones(1),
        torch.zeros(4),
    )
    gains = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        total = refine.loss(gains, batch, refine.Config(beta=0.5, sides=sides)).total
        (grad,) = torch.autograd.grad(total, gains)
        gains = (gains - 0.5 * grad).detach().requires_grad_()
    assert (gains[0] - gains[1]).item() == pytest.approx(expected[0], abs=1e-6)
    assert (gains[2] - gains[3]).item() == pytest.approx(expected[1], abs=1e-6)


def test_soft_labels_on_a_full_table_reach_the_closed_form():
    # policy over 3 answers given draft 0; minimiser: reference * exp(p(y > draft) / beta) / Z
    beta, wins = 0.5, torch.tensor([0.5, 0.8, 0.3], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    logits = reference.log().clone().requires_grad_()
    for _ in range(3000):
        policy = logits.log_softmax(0)
        total = torch.zeros((), dtype=torch.float64)
        for better in (1, 2):
            pair = torch.stack([policy[better], policy[0]])
            order: list[Row] = [("improve", "chosen"), ("improve", "rejected")]
            batch = Batch(
                torch.arange(2),
                torch.ones(2),
                {row: torch.tensor([i]) for i, row in enumerate(order)},
                wins[better : better + 1],
                torch.stack([reference[better], reference[0]]).log(),
            )
            total = total + refine.loss(pair, batch, refine.Config(beta=beta, sides="improve")).total
        (grad,) = torch.autograd.grad(total, logits)
        logits = (logits - 0.5 * grad).detach().requires_grad_()
    closed = reference * (wins / beta).exp()
    torch.testing.assert_close(logits.softmax(0).detach(), closed / closed.sum(), rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_say_what_equation_needs_and_differences(name: str):
    docstring = registry.find("objectives", name).__doc__ or ""
    for heading in ("What it does", "Equation", "Needs", "Differs"):
        assert heading in docstring
