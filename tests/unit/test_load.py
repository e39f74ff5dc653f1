"""Loading and saving models: the saved folder is ordinary, a broken one is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from upturn.errors import ModelError
from upturn.models import load


def test_a_saved_model_is_an_ordinary_folder(tiny_model: Path, tmp_path: Path):
    loaded = load.load(str(tiny_model), "bfloat16", device="cpu")
    load.save(loaded, tmp_path / "out", "# card")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "# card"
    assert words.chat_template == loaded.tokenizer.chat_template
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("break_it", "what"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no \*.safetensors"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickled"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), "Safetensor"),
    ],
)
def test_a_broken_folder_is_named(tiny_model: Path, tmp_path: Path, break_it, what: str):
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    break_it(copy)
    with pytest.raises(ModelError, match=what):
        load.load(str(copy), device="cpu")
