"""The output layer of a training: log-probs of targets, with no more logits held than there is room for.

Logits are made for some ids of the vocabulary at a time. In the backward pass they become their own gradient in place,
so each part of the weight gets its gradient at once, over all targets. They wait for it where memory allows, and are
made again where it does not: the same bits, for a third more products. What is done to a part is done by kernels on a
CPU, and compiled on CUDA (`_compiled_logits`).

Axes: `N` targets, `d` width of the model, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from upturn.models import _compiled_logits, _memory, grad_sums, packed
from upturn.models.native import back, ops

IDS = 4096
"""Ids of the vocabulary per pass on a CPU. Part of the numerics: policy and reference use the same."""


def bent(model: nn.Module, logits: Tensor) -> Tensor:
    """Logits as the model's own forward leaves them: soft-capped (Gemma), multiplied (Cohere), divided (Granite)."""
    cap, scale = _bend(model)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return logits if scale == 1 else logits * scale


def _bend(model: nn.Module) -> tuple[float | None, float]:
    """Cap and scale of the logits."""
    config = cast(Any, model).config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return getattr(config, "final_logit_softcapping", None), scale


def usable(model: nn.Module, hidden: Tensor) -> bool:
    """Whether the model's output layer is a plain one without bias, cap or scale, on a device that has these passes."""
    layer = cast(Any, model).get_output_embeddings()
    cap, scale = _bend(model)
    if (
        cap
        or scale != 1
        or not packed.is_plain(layer)
        or layer.bias is not None
        or layer._forward_hooks
        or layer._forward_pre_hooks
    ):
        return False
    has_passes = hidden.dtype in _compiled_logits.TYPES if hidden.is_cuda else ops.usable(hidden)
    return has_passes and layer.weight.dtype == hidden.dtype


def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of target ids from hidden states, `[N, d], [V, d], [N] -> [N]` fp32.

    A target out of the vocabulary is an IndexError on a CPU; on CUDA, where nobody waits to look, it has NaN.
    """
    if not hidden.is_cuda and len(targets) and (greatest := int(targets.max())) >= len(weight):
        raise IndexError(f"target {greatest} is out of a vocabulary of {len(weight)}")
    if hidden.is_cuda and not len(targets):
        return hidden.float().sum(1)  # nothing, and its gradient
    size = len(targets) * len(weight) * hidden.element_size()
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keeps = learns and _memory.may_keep(size, hidden.device)
    return cast(Tensor, _LogProbs.apply(hidden, weight, targets, keeps))


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, keeps: bool) -> Tensor:
        passes = _passes(hidden)
        start = (-1e30, 0.0, 0.0 if passes is back else torch.nan)
        top, total, picked = (torch.full((len(targets),), value, device=hidden.device) for value in start)
        ctx.kept = list[Tensor]()
        for first, part in _parts(weight, _ids(passes, len(targets))):
            logits = passes.product(hidden, part.t())
            passes.logits_seen(logits, first, targets, (top, total, picked))
            if keeps:
                ctx.kept.append(logits)
        log_total = top + total.log()
        ctx.save_for_backward(hidden, weight, targets, log_total)
        ctx.weight = weight
        return picked - log_total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        hidden, weight, targets, log_total = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, []
        g, g_hidden = g.contiguous(), torch.zeros(hidden.shape, device=hidden.device)
        parts = _gradients(hidden, weight, targets, (log_total, g), kept, g_hidden)
        add = grad_sums.adder(ctx.weight) if ctx.needs_input_grad[1] else None
        g_weight = None
        if add is not None:
            add(parts)
        else:
            g_weight = torch.cat(list(parts))
        return g_hidden.to(hidden.dtype), g_weight, None, None


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    known: tuple[Tensor, Tensor],
    kept: list[Tensor],
    g_hidden: Tensor,
) -> Iterator[Tensor]:
    """The weight's gradient, part by part; that of the hidden states is summed on the way. `known`: `[N]` each, the log
    of the sum of exponentials, and the gradient of the log-probs. What is `kept` is used up."""
    passes = _passes(hidden)
    for first, part in _parts(weight, _ids(passes, len(targets))):
        logits = kept.pop(0) if kept else passes.product(hidden, part.t())
        passes.logits_back_(logits, first, targets, *known)
        passes.add_gradient(passes.product(logits, part), g_hidden, is_first=first == 0)
        yield passes.weight_gradient(logits, hidden)


def _passes(hidden: Tensor) -> ModuleType:
    """Where the passes over logits stand, for the device."""
    return _compiled_logits if hidden.is_cuda else back


def _ids(passes: ModuleType, targets: int) -> int:
    return IDS if passes is back else _compiled_logits.ids_of(targets)


def _parts(weight: Tensor, ids: int) -> Iterator[tuple[int, Tensor]]:
    """Parts of the vocabulary with their first id."""
    for place, part in enumerate(weight.split(ids)):
        yield place * ids, part
