"""Folders of models: the key knows what is in one, not where it is; a wrong name gets a list of right ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from upturn.errors import ModelError
from upturn.models import folders


def _another_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[next(iter(tensors))][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _another_end(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))


@pytest.mark.parametrize("change", [_another_weight, _another_end])
def test_the_key_knows_what_shapes_answers_and_not_the_path(
    tiny_model: Path, tmp_path: Path, change: Callable[[Path], None]
):
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    assert folders.key(copy) == folders.key(tiny_model)
    change(copy)
    assert folders.key(copy) != folders.key(tiny_model)


def test_an_unknown_path_names_the_short_names():
    with pytest.raises(ModelError, match="smollm2-135m"):
        folders.resolve("./nowhere")
