"""The shared arithmetic: streamed log-probs equal the plain ones, sums land in their samples."""

from __future__ import annotations

import torch

from upturn import numerics


def test_streamed_logprobs_and_gradients_equal_the_plain_ones():
    torch.manual_seed(0)
    hidden = torch.randn(1300, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 30, (1300,))
    streamed = numerics.token_logprobs(hidden, targets, lambda h: h @ weight.T)
    plain = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(streamed, plain)
    for ours, theirs in zip(
        torch.autograd.grad(streamed.square().sum(), (hidden, weight)),
        torch.autograd.grad(plain.square().sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_sums_land_in_their_samples_in_full_precision():
    values = torch.tensor([1.0, 2.0, 0.001], dtype=torch.bfloat16)
    sums = numerics.sum_by_sample(values, torch.tensor([1, 1, 0]), 3)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, torch.tensor([0.001, 3.0, 0.0]), rtol=1e-2, atol=1e-5)
