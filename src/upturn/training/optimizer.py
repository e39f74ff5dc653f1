"""AdamW over fp32 master weights: bf16 weights alone would lose small updates."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from upturn.models.native import back, ops
from upturn.training import plan


class MasterAdamW:
    """Owns the fp32 copies, collects gradients in fp32, and writes updates back to the model."""

    def __init__(self, model: nn.Module, cfg: plan.Config) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.weights = [p for _, p in named]
        self.masters = [p.detach().to(torch.float32, copy=True) for p in self.weights]
        self.max_grad_norm = cfg.max_grad_norm
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self._begun: set[int] = set()
        """Places whose sum holds a gradient of this step; the others hold what is left of the step before, or 0."""
        self.adam = torch.optim.AdamW(
            self.masters,
            lr=cfg.learning_rate,
            betas=(cfg.adam_beta1, cfg.adam_beta2),
            weight_decay=cfg.weight_decay,
            fused=True,
        )

    def backward(self, loss: Tensor) -> None:
        """Back-propagate; each gradient joins its fp32 sum as soon as it is there, so they never all exist in bf16."""
        add = [partial(self._add, place) for place in range(len(self.weights))]
        hooks = [w.register_post_accumulate_grad_hook(hook) for w, hook in zip(self.weights, add, strict=True)]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, place: int, weight: Tensor) -> None:
        """Add the gradient of a weight to its sum, or begin the sum: zeros first would be one more pass."""
        grad, total, begun = _grad(weight), _grad(self.masters[place]), place in self._begun
        if ops.usable(grad) and grad.is_contiguous():
            back.add_gradient(grad, total, is_first=not begun)
        elif begun:
            total.add_(grad)
        else:
            total.copy_(grad)
        self._begun.add(place)
        weight.grad = None

    def step(self, weight: float, learning_rate: float) -> Tensor:
        """Divide by the weight of the whole step, clip, update; returns the gradient norm before clipping."""
        for place, master in enumerate(self.masters):
            if place not in self._begun:
                _grad(master).zero_()
        self._begun.clear()
        norm = torch.nn.utils.get_total_norm([_grad(master) for master in self.masters]) / weight
        factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1) / weight
        self.adam.param_groups[0]["lr"] = learning_rate
        if all(ops.usable(w) and w.is_contiguous() for w in self.weights):
            self._update(float(factor))
        else:
            self._update_by_torch(factor)
        return norm

    def _update(self, factor: float) -> None:
        """AdamW in one pass over each weight and what belongs to it."""
        group = self.adam.param_groups[0]
        (beta1, beta2), rate, eps = group["betas"], group["lr"], group["eps"]
        for weight, master in zip(self.weights, self.masters, strict=True):
            state = self.adam.state[master]
            if not state:
                state |= {"step": torch.tensor(0.0)}
                state |= {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
            state["step"] += 1
            count = float(state["step"])
            fix, rate_now = math.sqrt(1 - beta2**count), rate / (1 - beta1**count)
            kept = (master, _grad(master), state["exp_avg"], state["exp_avg_sq"])
            back.adamw(weight, kept, factor, beta1, beta2, eps, fix, rate_now, 1 - rate * group["weight_decay"])

    @torch.no_grad()
    def _update_by_torch(self, factor: Tensor) -> None:
        for master in self.masters:
            _grad(master).mul_(factor)
        self.adam.step()
        for parameter, master in zip(self.weights, self.masters, strict=True):
            parameter.copy_(master)

    def save(self, path: Path) -> None:
        """Masters and moments as one safetensors file."""
        tensors: dict[str, Tensor] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"master/{name}"] = master
            state = self.adam.state.get(master, {})
            tensors |= {
                f"{key}/{name}": value.reshape(-1) if value.dim() == 0 else value for key, value in state.items()
            }
        save_file(tensors, path)

    def load(self, path: Path) -> None:
        """The inverse of `save`; the model's weights follow."""
        tensors = load_file(path, device=str(self.masters[0].device))
        with torch.no_grad():
            for name, parameter, master in zip(self.names, self.weights, self.masters, strict=True):
                master.copy_(tensors[f"master/{name}"])
                parameter.copy_(master)
                if f"exp_avg/{name}" in tensors:
                    self.adam.state[master] = {
                        "step": tensors[f"step/{name}"].reshape(()).cpu(),
                        "exp_avg": tensors[f"exp_avg/{name}"],
                        "exp_avg_sq": tensors[f"exp_avg_sq/{name}"],
                    }


def _grad(master: Tensor) -> Tensor:
    assert master.grad is not None
    return master.grad
