"""AdamW over fp32 master weights: bf16 weights alone would lose small updates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.adamw import adamw

from upturn.models import grad_sums
from upturn.models.native import back
from upturn.training import plan
from upturn.training._masters import Master, master_of

EPS = 1e-8
TOGETHER = 2**26
"""Numbers that torch updates at once, or more where one weight has more: 256 MiB of gradients in fp32."""
SHORT_BETA1 = 0.95
"""Up to this one the first moment of a bf16 weight is bf16, too. A step moves it by a twentieth of what is new or more,
so rounding loses changes of less than eight parts in a hundred, four at 0.9 (DeepSeek-V3, arXiv:2412.19437, keeps both
moments so). The second one moves by a thousandth, which bf16 would never keep."""


class MasterAdamW:
    """Owns the fp32 copies, collects gradients, and writes updates back to the model.

    The gradient of a step's only backward pass stays in the type of its weight, as everywhere in torch; those of
    several passes are summed in fp32. Where kernels sum them the first one goes into its sum at once: put there later,
    it would leave a hole in memory between the sums, too small for anything that is long alive.
    """

    def __init__(self, model: nn.Module, cfg: plan.Config) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.weights = [p for _, p in named]
        self.masters: list[Master] = [master_of(weight) for weight in self.weights]
        self.exp_avg = [torch.zeros_like(own.weight, dtype=_first_dtype(own, cfg)) for own in self.masters]
        self.exp_avg_sq = [torch.zeros_like(weight, dtype=torch.float32) for weight in self.weights]
        self.cfg = cfg
        self.num_updates = 0
        self.grads: dict[int, Tensor] = {}
        """By place: the gradient of this step, or the fp32 sum of several."""
        self._is_only = False
        self._earlier: set[int] = set()
        """Places whose gradient began before the backward pass that runs."""

    def backward(self, loss: Tensor, *, is_only: bool = False) -> None:
        """Back-propagate; each gradient joins those before it as soon as it is there. `is_only`: the step has no other
        pass."""
        self._is_only, self._earlier = is_only, set(self.grads)
        hooks = [w.register_post_accumulate_grad_hook(partial(self._take, i)) for i, w in enumerate(self.weights)]
        try:
            with grad_sums.into({weight: partial(self._add, place) for place, weight in enumerate(self.weights)}):
                loss.backward()
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self, place: int, weight: Tensor) -> None:
        """Take over a whole gradient, or add it to those before it. There is none where it was added in parts: that of
        an output layer of its own."""
        grad, weight.grad = weight.grad, None
        if grad is None:
            return
        if place not in self.grads and grad.is_contiguous() and not self._sums_at_once(place):
            self.grads[place] = grad.detach()
        else:
            self._add(place, [grad])

    def _add(self, place: int, parts: grad_sums.Parts) -> None:
        """Add a gradient, cut along its first axis, to those before it."""
        native, total = self.masters[place].native, self.grads.get(place)
        is_first = total is None
        if total is None:
            kind = torch.float32 if self._sums_at_once(place) else None
            total = torch.empty_like(self.weights[place], dtype=kind).detach()
        elif place in self._earlier:
            total = total.float()
        first = 0
        for grad in parts:
            here = total[first : first + len(grad)] if total.dim() else total
            first += len(grad) if total.dim() else 0
            if native and grad.is_contiguous() and total.dtype == torch.float32:
                back.add_gradient(grad, here, is_first=is_first)
            elif is_first:
                here.copy_(grad)
            else:
                here.add_(grad)
        self.grads[place] = total

    def _sums_at_once(self, place: int) -> bool:
        return self.masters[place].native and not self._is_only

    def step(self, weight: float, learning_rate: float) -> Tensor:
        """Divide by the weight of the whole step, clip, update; returns the gradient norm before clipping."""
        for place, without in enumerate(self.weights):
            if place not in self.grads:
                self.grads[place] = torch.zeros_like(without)
        native = [place for place, master in enumerate(self.masters) if master.native]
        others = [place for place, master in enumerate(self.masters) if not master.native]
        norms = [torch.tensor(back.norm_of(self.grads[place])) for place in native]
        if others:
            grads = [self.grads[place] for place in others]
            norms += torch._foreach_norm(grads, 2, dtype=torch.float32)  # type: ignore[attr-defined]
        norm = torch.linalg.vector_norm(torch.stack(norms)) / weight
        factor = (self.cfg.max_grad_norm / (norm + 1e-6)).clamp(max=1) / weight
        self.num_updates += 1
        self._update(native, float(factor) if native else 0.0, learning_rate)
        for some in _parts(others, [weight.numel() for weight in self.weights]):
            self._update_by_torch(some, factor, learning_rate)
        return norm

    def _update(self, places: list[int], factor: float, rate: float) -> None:
        """AdamW in one pass over each weight and what belongs to it."""
        cfg, count = self.cfg, self.num_updates
        fix, over = math.sqrt(1 - cfg.adam_beta2**count), rate / (1 - cfg.adam_beta1**count)
        numbers = (factor, cfg.adam_beta1, cfg.adam_beta2, EPS, fix, over, 1 - rate * cfg.weight_decay)
        for place in places:
            state = (self.grads.pop(place), self.exp_avg[place], self.exp_avg_sq[place])
            back.adamw(self.weights[place], self.masters[place].rest, state, numbers)

    @torch.no_grad()
    def _update_by_torch(self, places: list[int], factor: Tensor, rate: float) -> None:
        """The same by torch, all these weights in a few launches; nothing waits for a device."""
        values = [self.masters[place].value() for place in places]
        grads = _wide([self.grads.pop(place) for place in places])
        torch._foreach_mul_(grads, factor)  # type: ignore[attr-defined]
        first, second = ([kind[place] for place in places] for kind in (self.exp_avg, self.exp_avg_sq))
        steps = list(torch.full((len(places),), float(self.num_updates - 1), device=grads[0].device).unbind())
        cfg = self.cfg
        adamw(
            values,
            grads,
            first,
            second,
            [],
            steps,
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=rate,
            eps=EPS,
            beta1=cfg.adam_beta1,
            beta2=cfg.adam_beta2,
            weight_decay=cfg.weight_decay,
        )
        torch._foreach_copy_([self.weights[place] for place in places], values)  # type: ignore[attr-defined]

    def save(self, path: Path) -> None:
        """Masters and moments as one safetensors file."""
        tensors: dict[str, Tensor] = {}
        for place, name in enumerate(self.names):
            tensors[f"master/{name}"] = self.masters[place].value()
            if self.num_updates:
                tensors[f"step/{name}"] = torch.tensor([float(self.num_updates)])
                tensors[f"exp_avg/{name}"] = self.exp_avg[place]
                tensors[f"exp_avg_sq/{name}"] = self.exp_avg_sq[place]
        save_file(tensors, path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """The inverse of `save`; the model's weights follow."""
        tensors = load_file(path, device=str(self.weights[0].device))
        for place, name in enumerate(self.names):
            self.masters[place].set(tensors[f"master/{name}"])
            if f"exp_avg/{name}" in tensors:
                self.num_updates = int(tensors[f"step/{name}"])
                self.exp_avg[place].copy_(tensors[f"exp_avg/{name}"])
                self.exp_avg_sq[place].copy_(tensors[f"exp_avg_sq/{name}"])


def _wide(grads: list[Tensor]) -> list[Tensor]:
    """All in fp32, those that are not as copies."""
    wide = [grad if grad.dtype == torch.float32 else torch.empty_like(grad, dtype=torch.float32) for grad in grads]
    pairs = [(new, old) for new, old in zip(wide, grads, strict=True) if new is not old]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))  # type: ignore[attr-defined]
    return wide


def _parts(places: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """Weights that are updated together, in order: gradients of another type are widened for all of them at once."""
    part: list[int] = []
    for place in places:
        part.append(place)
        if sum(sizes[one] for one in part) >= TOGETHER:
            yield part
            part = []
    if part:
        yield part


def _first_dtype(master: Master, cfg: plan.Config) -> torch.dtype:
    """The type of a weight's first moment: that of the weight where kernels update it, and rounding does no harm."""
    return master.weight.dtype if master.native and cfg.adam_beta1 <= SHORT_BETA1 else torch.float32
