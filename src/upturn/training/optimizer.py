"""AdamW over fp32 master weights: bf16 weights alone would lose small updates."""

from __future__ import annotations

import math
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


class MasterAdamW:
    """Owns the fp32 copies, collects gradients in fp32, and writes updates back to the model."""

    def __init__(self, model: nn.Module, cfg: plan.Config) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.weights = [p for _, p in named]
        self.masters: list[Master] = [master_of(weight) for weight in self.weights]
        self.sums, self.exp_avg, self.exp_avg_sq = (
            [torch.zeros_like(weight, dtype=torch.float32) for weight in self.weights] for _ in range(3)
        )
        self.cfg = cfg
        self.num_updates = 0
        self._begun: set[int] = set()
        """Places whose sum holds a gradient of this step; the others hold what is left of the step before, or 0."""

    def backward(self, loss: Tensor) -> None:
        """Back-propagate; each gradient joins its fp32 sum as soon as it is there, so they never all exist in bf16."""
        hooks = [w.register_post_accumulate_grad_hook(partial(self._take, i)) for i, w in enumerate(self.weights)]
        try:
            with grad_sums.into({weight: partial(self._add, place) for place, weight in enumerate(self.weights)}):
                loss.backward()
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self, place: int, weight: Tensor) -> None:
        assert weight.grad is not None
        self._add(place, [weight.grad])
        weight.grad = None

    def _add(self, place: int, parts: grad_sums.Parts) -> None:
        """Add the gradient of a weight to its sum, or begin the sum: zeros first would be one more pass."""
        first, total = 0, self.sums[place]
        for grad in parts:
            here = total[first : first + len(grad)] if total.dim() else total
            first += len(grad) if total.dim() else 0
            if self.masters[place].native and grad.is_contiguous():
                back.add_gradient(grad, here, is_first=place not in self._begun)
            elif place in self._begun:
                here.add_(grad)
            else:
                here.copy_(grad)
        self._begun.add(place)

    def step(self, weight: float, learning_rate: float) -> Tensor:
        """Divide by the weight of the whole step, clip, update; returns the gradient norm before clipping."""
        for place in set(range(len(self.sums))) - self._begun:
            self.sums[place].zero_()
        self._begun.clear()
        norm = torch.nn.utils.get_total_norm(self.sums) / weight
        factor = (self.cfg.max_grad_norm / (norm + 1e-6)).clamp(max=1) / weight
        native = [place for place, master in enumerate(self.masters) if master.native]
        others = [place for place, master in enumerate(self.masters) if not master.native]
        self.num_updates += 1
        self._update(native, float(factor) if native else 0.0, learning_rate)
        if others:
            self._update_by_torch(others, factor, learning_rate)
        return norm

    def _update(self, places: list[int], factor: float, rate: float) -> None:
        """AdamW in one pass over each weight and what belongs to it."""
        cfg, count = self.cfg, self.num_updates
        fix, over = math.sqrt(1 - cfg.adam_beta2**count), rate / (1 - cfg.adam_beta1**count)
        numbers = (factor, cfg.adam_beta1, cfg.adam_beta2, EPS, fix, over, 1 - rate * cfg.weight_decay)
        for place in places:
            state = (self.sums[place], self.exp_avg[place], self.exp_avg_sq[place])
            back.adamw(self.weights[place], self.masters[place].rest, state, numbers)

    @torch.no_grad()
    def _update_by_torch(self, places: list[int], factor: Tensor, rate: float) -> None:
        values = [self.masters[place].value() for place in places]
        grads, first, second = (
            [kind[place] for place in places] for kind in (self.sums, self.exp_avg, self.exp_avg_sq)
        )
        for grad in grads:
            grad.mul_(factor)
        steps = [torch.tensor(float(self.num_updates - 1), device=grad.device) for grad in grads]
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
        for place, value in zip(places, values, strict=True):
            self.masters[place].set(value)

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
