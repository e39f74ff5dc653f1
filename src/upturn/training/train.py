"""Training on pairs: reference log-probs once, then optimizer steps over packed token trees, resumable anywhere."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from upturn.errors import DataError, RunError
from upturn.models import policy
from upturn.models.chat import Chat
from upturn.numerics import sum_by_sample
from upturn.objectives._base import Loss
from upturn.tracking import progress
from upturn.training import plan, rows
from upturn.training.optimizer import MasterAdamW
from upturn.types import Pair, Sample

Log = Callable[[dict[str, Any]], None]
CHECKPOINTS = ("checkpoint", "checkpoint.part", "checkpoint.old")
"""Folders that a training may leave in its folder; none is needed once the model is saved."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a training needs besides the model."""

    objective: ModuleType
    objective_cfg: Any
    pairs: Sequence[Pair]
    chat: Chat
    cfg: plan.Config
    seed: int
    label: str
    """What progress bars and messages call it."""
    folder: Path
    """Where checkpoints, cached reference values and repros lie."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training did."""

    num_steps: int
    tree_tokens: int
    """Tokens really computed per forward pass, summed over steps."""
    row_tokens: int
    """The same samples as separate rows."""
    final_loss: float
    metrics: dict[str, float]
    """Means over the last tenth of the steps."""


def run(model: nn.Module, job: Job, log: Log, reference: nn.Module | None = None) -> Outcome:
    """Train `model` in place.

    reference   the model whose log-probs the objective counts from; None means `model` as it is before training.
                Then every preference margin must be exactly 0 at step 0, or the training refuses to go on.
    Raises RunError on a loss that is not finite, with a saved repro, and DataError when a pair does not fit.
    """
    model.eval()  # dropout would make policy and reference differ at step 0
    groups, order = _samples(model, job)
    steps = plan.steps([rows.tree_size(group) for group in groups], job.cfg, job.seed)
    uses_reference = job.objective.uses_reference(job.objective_cfg)
    values = _reference(reference or model, job, groups, order, steps) if uses_reference else None
    trainer = _Trainer(model, job, groups, order, steps, values, must_start_at_zero=reference is None)
    return trainer.run(log)


def _samples(model: nn.Module, job: Job) -> tuple[list[list[Sample]], rows.Rows]:
    order = rows.order(job.objective.needs(job.objective_cfg))
    groups = [rows.samples_of(pair, order, job.chat) for pair in job.pairs]
    longest = int(model.config.get_text_config().max_position_embeddings)  # type: ignore[operator,union-attr]
    for pair, group in zip(job.pairs, groups, strict=True):
        size = max(len(sample.context) + len(sample.target) for sample in group)
        if size > longest:
            raise DataError(
                f"{job.label}: prompt {pair.prompt.id}",
                f"A training sample has {size} tokens, and the model takes {longest}.",
                "Drop the prompt, shorten max_new_tokens, or use a model with a longer context.",
            )
    return groups, order


def _pack(job: Job, groups: list[list[Sample]], order: rows.Rows, pairs: Sequence[int], values: Any) -> rows.Packed:
    return rows.pack(
        [groups[pair] for pair in pairs],
        order,
        [job.pairs[pair].p for pair in pairs],
        None if values is None else [values[pair].tolist() for pair in pairs],
    )


def _reference(
    model: nn.Module, job: Job, groups: list[list[Sample]], order: rows.Rows, steps: list[plan.Step]
) -> torch.Tensor:
    """Summed reference log-probs `[pair, row]`, in the very batches of the first pass over the pairs.

    The same layout, dtype and chunks as in training make the margins at step 0 exactly 0, not nearly.
    """
    path = job.folder / "reference.safetensors"
    if path.is_file():
        return load_file(path)["values"]
    device = next(model.parameters()).device
    values = torch.full((len(groups), len(order)), torch.nan)
    batches = [batch for step in steps if step.epoch == 0 for batch in step.micro_batches]
    model.eval()
    with torch.no_grad(), progress.track(f"{job.label}: reference", len(groups), "pairs") as bar:
        for batch in batches:
            packed = rows.to_device(_pack(job, groups, order, batch, None), device)
            logprobs_N = policy.tree_logprobs(model, packed.tree)
            sums_S = sum_by_sample(logprobs_N, packed.batch.owner_N, packed.tree.num_samples)
            values[list(batch)] = sums_S.reshape(len(batch), len(order)).cpu()
            bar.advance(len(batch))
    scratch = path.with_suffix(".part")
    save_file({"values": values}, scratch)
    os.replace(scratch, path)
    return values


class _Trainer:
    def __init__(
        self,
        model: nn.Module,
        job: Job,
        groups: list[list[Sample]],
        order: rows.Rows,
        steps: list[plan.Step],
        values: torch.Tensor | None,
        *,
        must_start_at_zero: bool,
    ) -> None:
        self.model, self.job, self.groups, self.order = model, job, groups, order
        self.steps, self.values, self.must_start_at_zero = steps, values, must_start_at_zero
        self.device = next(model.parameters()).device
        self.history: list[dict[str, float]] = []
        self.optimizer = MasterAdamW(model, job.cfg)
        self.folder = job.folder / "checkpoint"

    def run(self, log: Log) -> Outcome:
        first = self._resume()
        for entry in self.history:
            log(entry)
        saved = time.monotonic()
        with progress.track(f"{self.job.label}: training", len(self.steps), "steps") as bar:
            bar.advance(first)
            for number in range(first, len(self.steps)):
                entry = self._step(number)
                self.history.append(entry)
                log(entry)
                bar.advance(1, f"loss {entry['loss']:.4f}")
                if time.monotonic() - saved >= self.job.cfg.save_seconds and number + 1 < len(self.steps):
                    self._save(number + 1)
                    saved = time.monotonic()
        return self._outcome()

    def _step(self, number: int) -> dict[str, float]:
        began = time.monotonic()
        step = self.steps[number]
        total, weight, tree_tokens, row_tokens = 0.0, 0.0, 0, 0
        sums: dict[str, float] = {}
        for pairs in step.micro_batches:
            packed = rows.to_device(_pack(self.job, self.groups, self.order, pairs, self.values), self.device)
            logprobs_N = policy.tree_logprobs(self.model, packed.tree)
            if number == 0 and self.must_start_at_zero and self.values is not None:
                self._assert_at_reference(logprobs_N.detach(), packed)
            loss: Loss = self.job.objective.loss(logprobs_N, packed.batch, self.job.objective_cfg)
            value = float(loss.total.detach())
            if not math.isfinite(value):
                raise self._not_finite(number, pairs, value)
            loss.total.backward()
            self.optimizer.collect()
            total, weight = total + value, weight + loss.weight
            for name, metric in loss.metrics.items():
                sums[name] = sums.get(name, 0.0) + float(metric)
            tree_tokens += len(packed.tree.ids_T)
            row_tokens += packed.tree.num_row_tokens
        rate = plan.learning_rate(number, len(self.steps), self.job.cfg)
        norm = float(self.optimizer.step(weight, rate))
        if not math.isfinite(norm):
            raise self._not_finite(number, [p for batch in step.micro_batches for p in batch], norm)
        entry: dict[str, float] = {"step": number + 1, "loss": total / weight, "grad_norm": norm, "learning_rate": rate}
        entry |= {name: value / weight for name, value in sums.items()}
        seconds = time.monotonic() - began
        return entry | {"num_tokens": tree_tokens, "num_row_tokens": row_tokens, "seconds": round(seconds, 3)}

    def _assert_at_reference(self, logprobs_N: torch.Tensor, packed: rows.Packed) -> None:
        """At step 0 the policy is the reference, so every gain must be 0 to the last bit."""
        sums_S = sum_by_sample(logprobs_N, packed.batch.owner_N, packed.tree.num_samples)
        assert packed.batch.reference_S is not None
        worst = float((sums_S - packed.batch.reference_S).abs().max())
        if worst != 0:
            raise RunError(
                f"training {self.job.label}, step 0",
                f"The policy differs from its own reference by {worst:.3g} nats, so preference margins are not 0.",
                "The cached reference belongs to other weights or another layout: remove the step's folder and rerun.",
            )

    def _not_finite(self, number: int, pairs: Sequence[int], value: float) -> RunError:
        path = self.job.folder / f"repro-step-{number + 1}.json"
        record = {
            "step": number + 1,
            "value": str(value),
            "pairs": list(pairs),
            "prompts": [self.job.pairs[pair].prompt.id for pair in pairs],
            "samples": [[[list(s.context), list(s.target)] for s in self.groups[pair]] for pair in pairs],
        }
        path.write_text(json.dumps(record))
        return RunError(
            f"training {self.job.label}, step {number + 1}",
            f"The loss or its gradient is {value} on prompts {', '.join(record['prompts'][:4])}.",
            f"The batch is saved in {path}. Lower learning_rate or max_grad_norm, then run again.",
        )

    def _save(self, number: int) -> None:
        """Write a checkpoint beside the old one, then swap: a kill leaves one of them whole."""
        scratch = self.folder.with_name("checkpoint.part")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        self.optimizer.save(scratch / "optimizer.safetensors")
        (scratch / "state.json").write_text(json.dumps({"step": number, "history": self.history}))
        old = self.folder.with_name("checkpoint.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            os.replace(self.folder, old)
        os.replace(scratch, self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _resume(self) -> int:
        old = self.folder.with_name("checkpoint.old")
        if not self.folder.exists() and old.exists():
            os.replace(old, self.folder)  # killed between the two renames of `_save`
        if not self.folder.exists():
            return 0
        state = json.loads((self.folder / "state.json").read_text())
        self.optimizer.load(self.folder / "optimizer.safetensors")
        self.history = state["history"]
        progress.say(f"{self.job.label}: going on after step {state['step']} of {len(self.steps)}")
        return int(state["step"])

    def _outcome(self) -> Outcome:
        last = self.history[-max(1, len(self.history) // 10) :]
        names = [n for n in last[0] if n not in ("step", "seconds", "num_tokens", "num_row_tokens", "learning_rate")]
        return Outcome(
            num_steps=len(self.history),
            tree_tokens=int(sum(entry["num_tokens"] for entry in self.history)),
            row_tokens=int(sum(entry["num_row_tokens"] for entry in self.history)),
            final_loss=sum(entry["loss"] for entry in last) / len(last),
            metrics={name: sum(entry[name] for entry in last) / len(last) for name in names},
        )
