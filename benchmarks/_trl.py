"""The same rows in TRL's DPOTrainer: each pair gives three preference rows (direct, improve, keep), six sequences.

`DPOTrainer.train()` runs as it is; a callback holds it before each optimizer step until the parent asks, and times
the step. Collating a batch happens before that and is not counted. TRL's loss is its own (sigmoid DPO on every row).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

import _child
import _training
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl.trainer.dpo_config import DPOConfig  # type: ignore[import-not-found]
from trl.trainer.dpo_trainer import DPOTrainer  # type: ignore[import-not-found]

from upturn.models import folders, load
from upturn.types import Sample

FOREVER = 10**6
TUNED: dict[str, Any] = {
    "bf16": False,
    "gradient_checkpointing": False,
    "precompute_ref_log_probs": True,
    "train_sampling_strategy": "sequential",
}
"""Weights and optimizer state in one type without autocast, no recomputation, the reference once; rows come sorted."""


class OnOurRows(DPOTrainer):
    """Takes token ids as they are: the rows of the other arms."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class Turnstile(TrainerCallback):
    """Waits for the parent before each optimizer step, and answers after it."""

    def __init__(self, known: dict[str, Any]) -> None:
        self.wire, self.known, self.watch = _child.Wire(), known, _child.Stopwatch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold until asked."""
        if self.wire.receive() is None:
            raise SystemExit
        self.watch = _child.Stopwatch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how long it took."""
        self.wire.send({**self.watch.read(), **self.known})


def preference_rows(groups: list[list[Sample]]) -> Iterator[dict[str, list[int]]]:
    """Rows of TRL's data set; each context's chosen and rejected samples stand side by side."""
    for group in groups:
        for chosen, rejected in zip(group[::2], group[1::2], strict=True):
            assert chosen.context == rejected.context
            ids = {"prompt_ids": chosen.context, "chosen_ids": chosen.target, "rejected_ids": rejected.target}
            yield {name: list(value) for name, value in ids.items()}


def padded(rows: list[dict[str, list[int]]], batch: int) -> int:
    """Tokens of the padded batches, in the order given."""
    longest = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
    parts = [longest[first : first + batch] for first in range(0, len(longest), batch)]
    return sum(2 * len(part) * max(part) for part in parts)


def main() -> None:
    """Train until the parent closes."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    loaded = load.load(args.model, "bfloat16", device="cpu")
    found = _training.data(args.profile, args.pairs, loaded)
    rows = list(preference_rows(found.groups))
    if args.tuned:
        rows.sort(key=lambda row: sum(map(len, row.values())))
    batch = min(args.batch, len(rows))
    known = {"logical_tokens": found.logical_tokens, "computed_tokens": padded(rows, batch)}
    del loaded.model
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"output_dir": folder, "report_to": "none", "save_strategy": "no"}
        options |= {"use_cpu": args.device == "cpu"}
        options |= {"disable_tqdm": True, "max_steps": FOREVER, "learning_rate": _training.LEARNING_RATE}
        options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": -(-len(rows) // batch)}
        if args.tuned:
            options |= TUNED | {"model_init_kwargs": {"dtype": args.dtype}, "torch_compile": args.compile}
            options |= {"use_liger_kernel": args.liger}
        trainer = OnOurRows(
            model=folders.resolve(args.model),
            args=DPOConfig(**options),
            train_dataset=Dataset.from_list(rows),
            processing_class=loaded.tokenizer,
            callbacks=[Turnstile(known)],
        )
        trainer.train()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="TRL's arm of tree_step.py.")
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", help="of a tuned run")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--liger", action="store_true", help="layers of liger_kernel")
    parser.add_argument("--batch", type=int, default=8, help="preference rows of one micro-batch; 8 is TRL's default")
    _training.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
