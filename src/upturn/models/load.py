"""Loading and saving of models with their tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upturn.errors import ModelError, first_line
from upturn.models import _faithful, folders, lean

Dtype = str
"""'float32', 'bfloat16' or 'auto' (bfloat16 for pretrained weights of 16 bits, else float32)."""


@dataclass(slots=True)
class Loaded:
    """A model with its tokenizer, and where it came from."""

    model: nn.Module
    tokenizer: Any
    name: str
    end_ids: tuple[int, ...]


def load(name: str, dtype: Dtype = "auto", *, trust_remote_code: bool = False, device: str = "auto") -> Loaded:
    """Load a causal language model and its tokenizer. Raises ModelError with the cause in one line."""
    from transformers import AutoTokenizer

    _hush()
    folder = folders.resolve(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = _pretrained(folder, dtype=_dtype(dtype), use_safetensors=True, **options)
    except Exception as error:  # the one place where any failure of a foreign folder becomes a message
        raise ModelError(f"model {name}", first_line(error), "Check the folder, or load another model.") from error
    ends = model.generation_config.eos_token_id if model.generation_config else None
    place = place_of(device)
    try:
        nn.Module.to(model, place)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {place}", first_line(error), "Use another device, or device=auto.") from error
    _faithful.check(model.eval(), name)
    return Loaded(model, tokenizer, name, _ids(ends))


def _pretrained(folder: str, **options: Any) -> Any:
    """The model with the attention of torch, or with its own where it knows no other: until a plan takes its place."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **options)
    except ValueError as error:
        if "attention implementation" not in str(error):
            raise
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)


def load_to_answer(folder: str) -> Loaded:
    """As `load`, where a model will only answer: on a CPU without the imports that take most of the time, if it can be.

    Such a model (`lean`) learns nothing and is not saved. It computes the same, to the bit.
    """
    model = lean.load(Path(folder)) if place_of("auto") == "cpu" else None
    if model is None:
        return load(folder)
    from transformers import AutoTokenizer
    from transformers.configuration_utils import PreTrainedConfig

    _hush()
    try:  # a config of the model's own class would import what its layers are made of
        config = PreTrainedConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        return Loaded(model, tokenizer, folder, _ids(lean.ends(Path(folder))))
    except Exception:
        return load(folder)  # which says what is wrong


def place_of(device: str) -> str:
    """The device that `options.device` names: for `auto` a CUDA device where there is one."""
    return device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def save(loaded: Loaded, folder: Path, card: str) -> None:
    """Write an ordinary Hugging Face folder: safetensors, tokenizer, config, generation config, model card."""
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = loaded.model
    implementation = model.config._attn_implementation
    model.config._attn_implementation = None  # whoever loads it chooses
    model.save_pretrained(folder, safe_serialization=True)
    model.config._attn_implementation = implementation
    loaded.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def _hush() -> None:
    """What `transformers` says while it loads is for its own users; failures come as a ModelError."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _ids(ends: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids that end an answer, as a config names them."""
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)


def _dtype(dtype: Dtype) -> Any:
    return "auto" if dtype == "auto" else getattr(torch, dtype)
