"""The heavy half of the steps: everything here needs torch, and keeps its progress in the step's folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from upturn.config import Plugin
from upturn.engines import local, sampling
from upturn.evaluation.summary import Summary
from upturn.lab.store import write_text
from upturn.models import card, chat, load
from upturn.tracking import progress
from upturn.training import train as training
from upturn.types import Draft, Pair, Prompt, to_json


@dataclass(frozen=True, slots=True)
class Settings:
    """What every heavy step needs."""

    label: str
    folder: Path
    request: str
    options: Any
    seed: int


def generate(
    loaded: load.Loaded, prompts: Sequence[Prompt], strategy: Plugin, how: sampling.Config, s: Settings
) -> dict[str, Any]:
    """Sample in chunks; each finished chunk is a file, and the chunks together are `drafts.jsonl`.

    A chunk is always sampled as a whole, so that a resumed run has the same batches and the same bits.
    """
    talk = chat.load(loaded.tokenizer, loaded.end_ids, s.request, s.options.layout)
    if talk.notice:
        progress.say(f"{s.label}: {talk.notice}")
    engine = local.Local(loaded.model, talk, how, seed=s.seed, slots=s.options.slots)
    engine.check(prompts)
    rule = partial(strategy.module.generate, cfg=strategy.cfg)
    size = s.options.chunk_prompts
    chunks = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    total = len(prompts) * strategy.cfg.turns  # type: ignore[attr-defined]
    merged = (s.folder / "drafts.jsonl").is_file()  # killed between the merge and the manifest
    with progress.track(s.label, total, "drafts") as bar:
        for number, chunk in enumerate([] if merged else chunks):
            path = s.folder / f"chunk-{number:05d}.jsonl"
            if path.is_file():
                bar.advance(sum(len(json.loads(line)["drafts"]) for line in path.read_text().splitlines()))
                continue

            def seen(draft: Draft) -> None:
                bar.advance(1)

            attempts = engine.run(chunk, rule, seen)
            write_text(path, "".join(json.dumps(to_json(a), separators=(",", ":")) + "\n" for a in attempts))
    return _merge(s.folder)


def _merge(folder: Path) -> dict[str, int]:
    whole, parts = folder / "drafts.jsonl", sorted(folder.glob("chunk-*.jsonl"))
    if not whole.is_file():
        write_text(whole, "".join(part.read_text() for part in parts))
    for part in parts:
        part.unlink()
    counts = {"drafts": 0, "tokens": 0, "prompt_tokens": 0, "cached_tokens": 0}
    for line in whole.read_text().splitlines():
        for draft in json.loads(line)["drafts"]:
            counts["drafts"] += 1
            counts["tokens"] += len(draft["token_ids"])
            counts["prompt_tokens"] += draft["prompt_tokens"]
            counts["cached_tokens"] += draft["cached_tokens"]
    return counts


def train(
    loaded: load.Loaded,
    reference: load.Loaded | None,
    pairs: Sequence[Pair],
    how: Any,
    s: Settings,
) -> dict[str, Any]:
    """Train and save the model; the checkpoint goes once the model is whole."""
    talk = chat.load(loaded.tokenizer, loaded.end_ids, s.request, s.options.layout)
    job = training.Job(
        objective=how.objective.module,
        objective_cfg=how.objective.cfg,
        pairs=pairs,
        chat=talk,
        cfg=how.train,
        seed=s.seed,
        label=s.label,
        folder=s.folder,
    )
    metrics = s.folder / "metrics.jsonl"
    with metrics.open("w") as file:

        def log(entry: dict[str, Any]) -> None:
            file.write(json.dumps({"label": s.label} | entry) + "\n")
            file.flush()

        outcome = training.run(loaded.model, job, log, reference.model if reference else None)
    load.save(loaded, s.folder / "model", card.stage(s.label, how.objective.dump(), len(pairs)))
    for name in training.CHECKPOINTS:
        shutil.rmtree(s.folder / name, ignore_errors=True)
    return {
        "steps": outcome.num_steps,
        "tokens": outcome.tree_tokens,
        "row_tokens": outcome.row_tokens,
        "final_loss": outcome.final_loss,
        "metrics": outcome.metrics,
    }


def publish(source: Path, target: Path, summary: Summary, about: str) -> None:
    """Copy the final model into the run folder with a model card that shows its turn table."""
    scratch = target.with_name(f".{target.name}.part")
    with FileLock(target.with_name(f".{target.name}.lock")):
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(source, scratch)
        (scratch / "README.md").write_text(card.final(summary, about))
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
