"""Training: reference log-probs once, then optimizer steps over packed token trees, resumable anywhere."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from upturn.errors import DataError, RunError
from upturn.models import native, policy
from upturn.models.chat import Chat
from upturn.models.native import build
from upturn.objectives._base import Batch, Loss
from upturn.tracking import progress
from upturn.training import frozen, plan, rows
from upturn.training.optimizer import MasterAdamW
from upturn.types import Example, Group, Pair, Prompt, Sample

Log = Callable[[dict[str, Any]], None]
CHECKPOINT, OLD, PART = "checkpoint", "checkpoint.old", "checkpoint.part"
"""The last checkpoint, the one before it while they are swapped, and what is half written or half removed."""
STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
ARITHMETIC = "arithmetic.json"
"""How an unfinished training computes."""
FROZEN = ("reference", "old")
"""Models whose log-probs are cached beside the checkpoint."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a training needs besides the model."""

    objective: ModuleType
    objective_cfg: Any
    examples: Sequence[Example]
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


@policy.captured_layers()
def run(model: nn.Module, job: Job, log: Log, reference: nn.Module | None = None) -> Outcome:
    """Train `model` in place.

    reference   the model whose log-probs the objective counts from; None means `model` as it is before training.
                Then every preference margin must be exactly 0 at step 0, or the training refuses to go on.
    Raises RunError on a loss that is not finite, with a saved repro, and DataError when an example does not fit.
    """
    model.eval()  # dropout would make policy and reference differ at step 0
    data = _samples(model, job)
    _keep_to_one_arithmetic(model, job)
    device = next(model.parameters()).device.type
    steps = plan.steps([rows.tree_size(group) for group in data.groups], job.cfg, job.seed, device)
    sizes = [rows.num_targets(group) for group in data.groups]
    found: dict[str, list[Tensor]] = {}
    still = _frozen_models(model, reference, job)
    for name, other in still.items():
        twin = next((earlier for earlier in found if still[earlier] is other), None)
        path = job.folder / f"{name}.safetensors"
        label = f"{job.label}: {name}"
        found[name] = found[twin] if twin else frozen.logps(other, path, sizes, steps, data.pack, label)
    trainer = _Trainer(model, job, replace(data, cached=found), steps, started_here=reference is None)
    return trainer.run(log)


def forget(folder: Path) -> None:
    """Remove what only an unfinished training needs, under a name that none resumes from: a kill leaves no half."""
    for place in (folder / CHECKPOINT, folder / OLD):
        if place.exists():
            shutil.rmtree(folder / PART, ignore_errors=True)
            os.replace(place, folder / PART)
    shutil.rmtree(folder / PART, ignore_errors=True)
    (folder / ARITHMETIC).unlink(missing_ok=True)


def _keep_to_one_arithmetic(model: nn.Module, job: Job) -> None:
    """Begin anew where what is left of this training was computed otherwise, as before a compiler was there.

    Its steps would not be those of any unbroken run, and its policy would differ from the cached reference.
    """
    path, now = job.folder / ARITHMETIC, _arithmetic(model)
    before = told(path) if path.is_file() else now
    if before != now:
        changed = ", ".join(
            f"{name} {before.get(name, 'unknown')} before, {now[name]} now"
            for name in now
            if now[name] != before.get(name)
        )
        progress.say(f"{job.label}: begins anew, as what is left of it was computed otherwise ({changed})")
        for name in FROZEN:
            (job.folder / f"{name}.safetensors").unlink(missing_ok=True)
        forget(job.folder)
    if before != now or not path.is_file():
        path.with_suffix(".part").write_text(json.dumps(now))
        os.replace(path.with_suffix(".part"), path)


def told(path: Path) -> dict[str, Any]:
    """What stands in a file of progress; nothing where there is none, or it is empty or cut."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _arithmetic(model: nn.Module) -> dict[str, str]:
    """What the bits of a training depend on, besides everything that stands in its key."""
    weight = next(model.parameters())
    kernels = native.on_gpu(weight) if weight.is_cuda else build.kernels(weight.dtype) is not None
    return {"kernels": "yes" if kernels else "no", "device": weight.device.type, "dtype": str(weight.dtype)}


def _frozen_models(model: nn.Module, reference: nn.Module | None, job: Job) -> dict[str, nn.Module]:
    """The models whose log-probs the objective reads, by name; `old` is the model before training."""
    uses_old = getattr(job.objective, "USES_OLD", False)
    models = {"reference": reference or model} if job.objective.uses_reference(job.objective_cfg) else {}
    return models | ({"old": model} if uses_old else {})


@dataclass(frozen=True, slots=True)
class _Data:
    """The examples as samples, and what is cached of them."""

    examples: Sequence[Example]
    groups: list[list[Sample]]
    order: rows.Rows
    cached: dict[str, list[Tensor]]
    root_tokens: int | None

    def pack(self, chosen: Sequence[int]) -> rows.Packed:
        """One batch of some examples."""
        parts = {f"{name}_N": torch.cat([values[e] for e in chosen]) for name, values in self.cached.items()}
        groups, examples = [self.groups[e] for e in chosen], [self.examples[e] for e in chosen]
        return rows.pack(groups, self.order, examples, rows.Cached(**parts), root_tokens=self.root_tokens)


def _samples(model: nn.Module, job: Job) -> _Data:
    needs = job.objective.needs(job.objective_cfg)
    wanted, kind = (Group, "groups of drafts") if needs is None else (Pair, "pairs")
    if not all(isinstance(example, wanted) for example in job.examples):
        raise DataError(
            f"{job.label}: objective {job.objective.__name__.rpartition('.')[2]}",
            f"It learns from {kind}, and the selection gave something else.",
            "Choose a selection that gives what this objective needs (see docs/adding.md).",
        )
    order = rows.order(needs)
    groups = [rows.samples_of(example, order, job.chat) for example in job.examples]
    longest = int(model.config.get_text_config().max_position_embeddings)  # type: ignore[operator,union-attr]
    for example, group in zip(job.examples, groups, strict=True):
        size = max(len(sample.context) + len(sample.target) for sample in group)
        if size > longest:
            raise DataError(
                f"{job.label}: prompt {_prompt(example).id}",
                f"A training sample has {size} tokens, and the model takes {longest}.",
                "Drop the prompt, shorten max_new_tokens, or use a model with a longer context.",
            )
    return _Data(job.examples, groups, order, {}, rows.root_tokens(next(model.parameters()).device))


def _prompt(example: Example) -> Prompt:
    return example.attempt.prompt if isinstance(example, Group) else example.prompt


def _is_whole(checkpoint: Path) -> bool:
    """Whether a training can go on from it: an older version removed checkpoints file by file."""
    return all((checkpoint / name).is_file() for name in (STATE, OPTIMIZER))


class _Trainer:
    def __init__(
        self,
        model: nn.Module,
        job: Job,
        data: _Data,
        steps: list[plan.Step],
        *,
        started_here: bool,
    ) -> None:
        self.model, self.job, self.data, self.steps = model, job, data, steps
        self.still = [name for name in data.cached if started_here or name == "old"]
        """Cached log-probs that the first step must repeat to the last bit."""
        self.device = next(model.parameters()).device
        self.history: list[dict[str, float]] = []
        self.optimizer = MasterAdamW(model, job.cfg)
        self.folder = job.folder / CHECKPOINT

    def run(self, log: Log) -> Outcome:
        first = self._resume()
        for entry in self.history:
            log(entry)
        saved = time.monotonic()
        with progress.track(f"{self.job.label}: training", len(self.steps), "steps") as bar:
            bar.find(first)
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
        weight, tree_tokens, row_tokens = 0.0, 0, 0
        losses: list[Loss] = []
        for examples in step.micro_batches:
            packed = rows.to_device(self.data.pack(examples), self.device)
            logprobs_N = policy.tree_logprobs(self.model, packed.tree)
            if number == 0:
                self._assert_still(logprobs_N.detach(), packed.batch)
            loss: Loss = self.job.objective.loss(logprobs_N, packed.batch, self.job.objective_cfg)
            self.optimizer.backward(loss.total, is_only=len(step.micro_batches) == 1)
            losses.append(loss.detached())
            weight += loss.weight
            tree_tokens += len(packed.tree.ids_T)
            row_tokens += packed.tree.num_row_tokens
        sums = self._read(number, losses)
        if not weight:
            raise DataError(
                f"training {self.job.label}, step {number + 1}",
                "None of its examples weighs anything.",
                "Choose a selection that leaves such examples out.",
            )
        rate = plan.learning_rate(number, len(self.steps), self.job.cfg)
        norm = float(self.optimizer.step(weight, rate))
        if not math.isfinite(norm):
            raise self._not_finite(number, [p for batch in step.micro_batches for p in batch], norm)
        means = {name: value / weight for name, value in sums.items()}
        entry: dict[str, float] = {"step": number + 1, "loss": means.pop("loss"), "grad_norm": norm}
        entry |= {"learning_rate": rate} | means
        seconds = time.monotonic() - began
        return entry | {"num_tokens": tree_tokens, "num_row_tokens": row_tokens, "seconds": round(seconds, 3)}

    def _read(self, number: int, losses: Sequence[Loss]) -> dict[str, float]:
        """Sums of the losses and of their metrics over a step. A device is asked once, so that it never waits for the
        next micro-batch."""
        shown = [{"loss": loss.total} | loss.metrics for loss in losses]
        named = [(place, name, value) for place, some in enumerate(shown) for name, value in some.items()]
        values = torch.stack([value for *_, value in named]).tolist()
        sums: dict[str, float] = {}
        for (place, name, _), value in zip(named, values, strict=True):
            if name == "loss" and not math.isfinite(value):
                raise self._not_finite(number, self.steps[number].micro_batches[place], value)
            sums[name] = sums.get(name, 0.0) + value
        return sums

    def _assert_still(self, logprobs_N: Tensor, batch: Batch) -> None:
        """At step 0 the policy is its own reference, so every gain must be 0 to the last bit."""
        for name in self.still:
            worst = float((logprobs_N - getattr(batch, f"{name}_N")).abs().max())
            if worst != 0:
                raise RunError(
                    f"training {self.job.label}, step 0",
                    f"The policy differs from its own {name} by {worst:.3g} nats, so preference margins are not 0.",
                    "The cached values belong to other weights or another layout: remove the step's folder and rerun.",
                )

    def _not_finite(self, number: int, examples: Sequence[int], value: float) -> RunError:
        path = self.job.folder / f"repro-step-{number + 1}.json"
        record = {
            "step": number + 1,
            "value": str(value),
            "examples": list(examples),
            "prompts": [_prompt(self.job.examples[e]).id for e in examples],
            "samples": [[[list(s.context), list(s.target)] for s in self.data.groups[e]] for e in examples],
        }
        path.write_text(json.dumps(record))
        return RunError(
            f"training {self.job.label}, step {number + 1}",
            f"The loss or its gradient is {value} on prompts {', '.join(record['prompts'][:4])}.",
            f"The batch is saved in {path}. Lower learning_rate or max_grad_norm, then run again.",
        )

    def _save(self, number: int) -> None:
        """Write a checkpoint beside the old one, then swap: a kill leaves one of them whole."""
        scratch = self.folder.with_name(PART)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        self.optimizer.save(scratch / OPTIMIZER)
        (scratch / STATE).write_text(json.dumps({"step": number, "history": self.history}))
        old = self.folder.with_name(OLD)
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            os.replace(self.folder, old)
        os.replace(scratch, self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _resume(self) -> int:
        old = self.folder.with_name(OLD)
        if not _is_whole(self.folder) and _is_whole(old):  # killed between the two renames of `_save`
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(old, self.folder)
        if not _is_whole(self.folder):
            return 0
        state = told(self.folder / STATE)
        try:
            if not {"step", "history"} <= state.keys():
                raise ValueError(f"{STATE} is damaged")
            self.optimizer.load(self.folder / OPTIMIZER)  # which reads all before it sets any
        except (SafetensorError, ValueError):
            progress.say(f"{self.job.label}: its checkpoint is damaged, so it begins anew")
            shutil.rmtree(self.folder)
            return 0
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
