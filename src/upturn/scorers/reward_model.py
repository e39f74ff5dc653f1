"""A reward model: any sequence classifier with one output, such as Skywork-Reward or a model of your own.

The pair (prompt, answer) is rendered once with the model's own chat template, which brings the only BOS.
Whether an answer counts as right still comes from the task's verifier, so that accuracy stays exact.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from upturn._model import Strict
from upturn.errors import ModelError
from upturn.scorers._base import Scorer, grade
from upturn.tasks._base import Task
from upturn.types import Attempt, Score

if TYPE_CHECKING:
    import torch

Ids = list[int]
RIGHT_IS_GOLD = True
"""As with `majority`."""


class Config(Strict):
    """Which model judges, and how much at once."""

    model_name_or_path: str
    """A folder or a hub id, with safetensors weights, a tokenizer and a chat template."""
    batch_size: int = Field(default=16, ge=1)
    """Answers judged at once; of like length, so that little is padded."""
    max_length: int = Field(default=4096, ge=1)
    """Tokens of prompt and answer; what is longer is not cut but scored NaN."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` keeps the saved one. Rewards are float32."""
    device: str = "auto"
    """Where it runs; `auto` takes a GPU if there is one."""
    trust_remote_code: bool = False
    """Whether Python code out of the model's folder may run."""


def load(cfg: Config) -> Scorer:
    """Load the model; a `ModelError` says why it cannot be used."""
    return RewardModel(cfg)


def key(cfg: Config) -> dict[str, Any]:
    """What shapes the scores: a folder counts by what it holds and not by its path, a hub id by its name."""
    shaping = cfg.model_dump(exclude={"device", "batch_size"})
    folder = Path(os.path.expanduser(cfg.model_name_or_path))
    if folder.is_dir():
        try:
            shaping["model_name_or_path"] = _digest(_files(folder))
        except OSError as error:
            what = f"{error.filename} cannot be read: {error.strerror}."
            raise ModelError(f"reward model {cfg.model_name_or_path}", what, _mend(str(folder))) from error
    return shaping


class RewardModel:
    """A sequence classifier and its tokenizer."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.tokenizer, self.model = _load(cfg)
        self._pad = self.model.config.pad_token_id

    def score(self, task: Task, attempts: list[Attempt]) -> list[Attempt]:
        """Value: the reward, any real number. Right: the verifier's word."""
        grades = [grade(task, a.prompt, draft.text) for a in attempts for draft in a.drafts]
        rows = [self.ids(a.prompt.text, draft.text) for a in attempts for draft in a.drafts]
        scores = iter(map(_score, self.rewards(rows), grades))
        return [replace(a, scores=tuple(next(scores) for _ in a.drafts)) for a in attempts]

    def ids(self, question: str, answer: str) -> Ids:
        """Token ids of one question and answer."""
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return list(self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))

    def rewards(self, rows: Sequence[Ids]) -> list[float]:
        """One reward for each row of token ids, NaN for rows that are longer than `max_length`."""
        rewards = [math.nan] * len(rows)
        for batch in self._batches(rows):
            values = self._forward([rows[place] for place in batch])
            for place, value in zip(batch, values.tolist(), strict=True):
                rewards[place] = value
        return rewards

    def _batches(self, rows: Sequence[Ids]) -> Iterator[list[int]]:
        """Places of rows of like length. Without a padding id, each row stands alone."""
        fitting = [place for place, row in enumerate(rows) if len(row) <= self.cfg.max_length]
        fitting.sort(key=lambda place: len(rows[place]))
        size = self.cfg.batch_size if self._pad is not None else 1
        for start in range(0, len(fitting), size):
            yield fitting[start : start + size]

    def _forward(self, rows: list[Ids]) -> torch.Tensor:
        """Rewards (rows,) in float32; the model reads each at its row's last token before the padding."""
        import torch

        width = max(map(len, rows))
        ids = [row + [self._pad] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        with torch.inference_mode():
            logits = self.model(**{name: tensor.to(self.model.device) for name, tensor in inputs.items()}).logits
        return logits[:, 0].float()


def _score(reward: float, verdict: Score) -> Score:
    note = "no reward: longer than max_length, or the model gave NaN" if math.isnan(reward) else verdict.note
    return replace(verdict, value=reward, note=note, critique="")  # the verifier's, and it may disagree


def _load(cfg: Config) -> tuple[Any, Any]:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    where = f"reward model {cfg.model_name_or_path}"
    name = os.path.expanduser(cfg.model_name_or_path)
    known: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **known)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=cfg.dtype, use_safetensors=True, output_loading_info=True, **known
        )
        model.to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(where, f"It cannot be loaded: {reason}", _mend(name)) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(where, f"Weights are missing: {missing}.", "Give a model that was trained to judge.")
    if model.config.num_labels != 1:
        what = f"It has {model.config.num_labels} outputs; a reward is one number."
        raise ModelError(where, what, "Give a sequence classifier with num_labels = 1.")
    if not tokenizer.chat_template:
        what = "Its tokenizer has no chat template, so a question cannot be told from an answer."
        raise ModelError(where, what, "Save the tokenizer with the chat template the model was trained with.")
    return tokenizer, model


def _files(folder: Path) -> tuple[tuple[Path, int, int], ...]:
    """What shapes scores, with the times and sizes that show a change without reading it again."""
    patterns = ("config.json", "tokenizer*.json", "*.model", "*.jinja", "*.safetensors", "*.py")
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths)


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()[:16]


def _mend(name: str) -> str:
    folder = Path(name)
    if not folder.is_dir():
        return "Give a folder with a sequence classifier, or a hub id that can be reached."
    needed = ("config.json", "tokenizer_config.json")
    lacking = [file for file in needed if not (folder / file).exists()]
    lacking += [] if list(folder.glob("*.safetensors")) else ["*.safetensors"]
    return f"The folder lacks {', '.join(lacking)}." if lacking else "Save the model again; its files are broken."
