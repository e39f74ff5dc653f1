"""The output layer of a training on a CPU: log-probs of targets without ever holding the logits.

Logits are made for some ids of the vocabulary at a time, and again in the backward pass, where they become their own
gradient in place. So each part of the weight gets its gradient at once, over all targets.

Axes: `N` targets, `d` width of the model, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from upturn.models import grad_sums, packed
from upturn.models.native import back, ops

IDS = 4096
"""Ids of the vocabulary per pass. Part of the numerics: policy and reference use the same."""


def usable(model: nn.Module, hidden: Tensor) -> bool:
    """Whether the model's output layer is a plain one without bias, cap or scale, where there are kernels."""
    layer = cast(Any, model).get_output_embeddings()
    config = cast(Any, model).config.get_text_config()
    bent = getattr(config, "final_logit_softcapping", None) or getattr(config, "logit_scale", None)
    if bent or not packed.is_plain(layer) or layer.bias is not None or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    return ops.usable(hidden) and layer.weight.dtype == hidden.dtype


def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of target ids from hidden states, `[N, d], [V, d], [N] -> [N]` fp32."""
    if len(targets) and (greatest := int(targets.max())) >= len(weight):
        raise IndexError(f"target {greatest} is out of a vocabulary of {len(weight)}")
    return cast(Tensor, _LogProbs.apply(hidden, weight, targets))


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        top, total, picked = (torch.full((len(targets),), value) for value in (-1e30, 0.0, 0.0))
        for first, part in _parts(weight):
            back.logits_seen(back.product(hidden, part.t()), first, targets, (top, total, picked))
        log_total = top + total.log()
        ctx.save_for_backward(hidden, weight, targets, log_total)
        ctx.weight = weight
        return picked - log_total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        hidden, weight, targets, log_total = ctx.saved_tensors
        g, g_hidden = g.contiguous(), torch.zeros(hidden.shape)
        parts = _gradients(hidden, weight, targets, (log_total, g), g_hidden)
        add = grad_sums.adder(ctx.weight) if ctx.needs_input_grad[1] else None
        g_weight = None
        if add is not None:
            add(parts)
        else:
            g_weight = torch.cat(list(parts))
        return g_hidden.to(hidden.dtype), g_weight, None


def _gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, known: tuple[Tensor, Tensor], g_hidden: Tensor
) -> Iterator[Tensor]:
    """The weight's gradient, part by part; that of the hidden states is summed on the way. `known`: `[N]` each, the log
    of the sum of exponentials, and the gradient of the log-probs."""
    for first, part in _parts(weight):
        logits = back.product(hidden, part.t())
        back.logits_back_(logits, first, targets, *known)
        back.add_gradient(back.product(logits, part), g_hidden, is_first=first == 0)
        yield back.weight_gradient(logits, hidden)


def _parts(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Parts of the vocabulary with their first id."""
    for place, part in enumerate(weight.split(IDS)):
        yield place * IDS, part
