"""AdamW over fp32 master weights: bf16 weights alone would lose small updates."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
        self.adam = torch.optim.AdamW(
            self.masters,
            lr=cfg.learning_rate,
            betas=(cfg.adam_beta1, cfg.adam_beta2),
            weight_decay=cfg.weight_decay,
            fused=True,
        )

    def backward(self, loss: Tensor) -> None:
        """Back-propagate; each gradient joins its fp32 sum as soon as it is there, so they never all exist in bf16."""
        pairs = zip(self.weights, self.masters, strict=True)
        hooks = [w.register_post_accumulate_grad_hook(partial(_move_grad, master)) for w, master in pairs]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()

    def step(self, weight: float, learning_rate: float) -> Tensor:
        """Divide by the weight of the whole step, clip, update; returns the gradient norm before clipping."""
        grads = [_grad(master) for master in self.masters]
        for grad in grads:
            grad /= weight
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)
        self.adam.param_groups[0]["lr"] = learning_rate
        self.adam.step()
        for grad in grads:
            grad.zero_()
        with torch.no_grad():
            for parameter, master in zip(self.weights, self.masters, strict=True):
                parameter.copy_(master)
        return norm

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


def _move_grad(master: Tensor, weight: Tensor) -> None:
    _grad(master).add_(_grad(weight))
    weight.grad = None


def _grad(master: Tensor) -> Tensor:
    assert master.grad is not None
    return master.grad
