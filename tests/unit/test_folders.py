"""Folders of models: the key knows what is in one, not where it is; whatever is wrong with one is said in a message."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from benchmark_room import module
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from upturn.errors import ModelError
from upturn.models import folders


def _another_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[next(iter(tensors))][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _another_end(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))


def _other_code(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("")


def _other_pieces(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"pieces")


def _new(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text("other")

    return change


SLOW = ("vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.json")
"""What a tokenizer is made of where there is no tokenizer.json."""


@pytest.mark.parametrize(
    "change", [_another_weight, _another_end, _other_code, _other_pieces, *(_new(name) for name in SLOW)]
)
def test_the_key_knows_what_shapes_answers_and_not_the_path(
    tiny_model: Path, tmp_path: Path, change: Callable[[Path], None]
):
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    assert folders.key(copy) == folders.key(tiny_model)
    change(copy)
    assert folders.key(copy) != folders.key(tiny_model)


def test_an_unknown_path_names_the_short_names():
    with pytest.raises(ModelError, match="use one of: carry, smollm2-135m"):
        folders.resolve("./nowhere")
    with pytest.raises(ModelError, match="no such folder"):
        folders.resolve("~nobody-of-this-name/model")


def test_a_run_folder_in_the_place_of_its_model_names_the_model(tiny_model: Path, tmp_path: Path):
    shutil.copytree(tiny_model, tmp_path / "run" / "model")
    with pytest.raises(ModelError, match=rf"no config.json.\n +Did you mean {tmp_path / 'run' / 'model'}\?"):
        folders.resolve(str(tmp_path / "run"))


def test_the_key_of_a_folder_without_code_is_the_one_it_always_had(tmp_path: Path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text(name)
    assert folders.key(tmp_path) == "19b87de9be7c80a1"


def test_weights_that_are_there_twice_are_read_once(tiny_model: Path, tmp_path: Path):
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    (copy / "consolidated.safetensors").write_bytes(b"the same again")
    assert folders.key(copy) == folders.key(tiny_model)
    (copy / "model.safetensors").unlink()
    alone = folders.key(copy)
    (copy / "consolidated.safetensors").write_bytes(b"others")
    assert folders.key(copy) != alone


class Hub:
    """Stands for the hub: it holds files of some names, or fails."""

    def __init__(self, folder: Path, names: Iterable[str] = (), fault: BaseException | None = None) -> None:
        self.folder, self.names, self.fault = folder, names, fault

    def __call__(self, hub_id: str, *, allow_patterns: Any, ignore_patterns: Any, etag_timeout: float) -> str:
        if self.fault:
            raise self.fault
        names = filter_repo_objects(self.names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).touch()
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a hub in place of the real one, and says where it keeps its snapshot."""

    def put(names: Iterable[str] = (), fault: BaseException | None = None) -> Path:
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(snapshot, names, fault))
        return snapshot

    return put


NEEDED = {
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
    "merges.txt",
    "modeling_own.py",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
}
SPARE = {
    "pytorch_model.bin",
    "consolidated.safetensors",
    "consolidated-00001-of-00002.safetensors",
    "original/consolidated.00.safetensors",
    "original/params.json",
    "original/tokenizer.model",
    "onnx/model.safetensors",
    "onnx/deep/config.json",
    "README.md",
}


def test_what_a_model_needs_is_fetched_and_no_weight_twice(hub: Callable[..., Path]):
    snapshot = hub(NEEDED | SPARE)
    assert folders.resolve("owner/name") == str(snapshot)
    assert {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()} == NEEDED


@pytest.mark.parametrize(
    ("names", "what"),
    [(["config.json", "pytorch_model.bin"], r"no \*.safetensors"), (["model.safetensors"], "no config.json")],
)
def test_a_hub_model_that_lacks_files_is_named(hub: Callable[..., Path], names: list[str], what: str):
    hub(names)
    with pytest.raises(ModelError, match=f"model owner/name\n.*{what}"):
        folders.resolve("owner/name")


def test_what_the_hub_says_is_told(hub: Callable[..., Path]):
    hub(fault=OSError(errno.ENOSPC, "No space left on device\nand more"))
    with pytest.raises(ModelError) as caught:
        folders.resolve("owner/name")
    assert caught.value.what.endswith("OSError: [Errno 28] No space left on device")


def test_an_interrupt_of_a_fetch_passes(hub: Callable[..., Path]):
    hub(fault=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        folders.resolve("owner/name")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the folder of its models."""
    monkeypatch.setenv("UPTURN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def gguf_file(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benchmarks_on_path: None) -> Path:
    """The tiny model as a GGUF file with a vocabulary."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    known = gguf.GGUFWriter.add_tokenizer_model

    def add(writer: Any, _: str) -> None:
        vocab = tiny.tokenizer().get_vocab()
        known(writer, "gpt2")
        writer.add_token_list([*sorted(vocab, key=lambda token: vocab[token])[:-1], "ab"])
        writer.add_token_merges(["a b"])

    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_model", add)
    module("_gguf").convert(tiny_model, tmp_path / "small.gguf")
    return tmp_path / "small.gguf"


def test_a_gguf_file_is_converted_once(cache: Path, gguf_file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    folder = Path(folders.resolve(str(gguf_file)))
    assert list(cache.iterdir()) == [folder]
    ours = load_file(tiny_model / "model.safetensors")
    for name, weight in load_file(folder / "model.safetensors").items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, ours[name].bfloat16()), name
    monkeypatch.setattr(folders, "_read", None)
    assert folders.resolve(str(gguf_file)) == str(folder)


def test_a_gguf_file_that_lacks_weights_is_refused(cache: Path, gguf_file: Path):
    import gguf

    whole = gguf.GGUFReader(gguf_file)
    lacking = gguf_file.read_bytes().replace(b"blk.0.ffn_gate.weight", b"blk.9.ffn_gate.weight")
    assert "blk.0.ffn_gate.weight" in {tensor.name for tensor in whole.tensors}
    gguf_file.write_bytes(lacking)
    with pytest.raises(ModelError, match=r"lacks 1 of the weights .* model\.layers\.0\.mlp\.gate_proj\.weight"):
        folders.resolve(str(gguf_file))
    assert list(cache.iterdir()) == []


def _unknown(path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "unheard-of")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (_unknown, "unheard-of"),
        (lambda path: path.write_bytes(b"junk"), "ValueError"),
        (lambda path: path.touch(), "Error"),
    ],
)
def test_a_gguf_file_that_cannot_be_read_is_named(
    cache: Path, tmp_path: Path, write: Callable[[Path], None], what: str
):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path = tmp_path / "bad.gguf"
    write(path)
    with pytest.raises(ModelError) as caught:
        folders.resolve(str(path))
    assert caught.value.where == f"model {path}"
    assert what in caught.value.what and "\n" not in caught.value.what
    assert "Hugging Face folder" in caught.value.mend
    assert list(cache.iterdir()) == []


def test_an_interrupt_of_a_conversion_passes(cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        folders.resolve(str(gguf_file))
    assert list(cache.iterdir()) == []


class Saver:
    """Stands for a model and its tokenizer: saved as an empty config, or not at all."""

    def __init__(self, fault: BaseException | None = None) -> None:
        self.fault = fault

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        if self.fault:
            raise self.fault
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Converts a file of which nothing is read."""
    monkeypatch.setattr(folders, "find_spec", lambda name: name)
    (tmp_path / "some.gguf").write_bytes(b"bytes")

    def run(fault: BaseException | None = None) -> str:
        monkeypatch.setattr(folders, "_read", lambda path: (Saver(), Saver(fault)))
        return folders.resolve(str(tmp_path / "some.gguf"))

    return run


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: full (os error 28)"),
        Exception("full (os error 28)"),
    ],
)
def test_a_full_disk_is_told_with_the_cache_it_is_full_under(
    cache: Path, convert: Callable[..., str], fault: Exception
):
    with pytest.raises(ModelError) as caught:
        convert(fault)
    assert caught.value.where == f"cache {cache.parent}"
    assert "No space left on device" in caught.value.what
    assert caught.value.mend == "Free some space, or set UPTURN_CACHE to another folder."
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), RuntimeError("ours (os error 28)")])
def test_what_is_not_of_the_disk_passes_and_leaves_nothing(
    cache: Path, convert: Callable[..., str], fault: BaseException
):
    with pytest.raises(type(fault)):
        convert(fault)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", ["smollm2-135m", "some.gguf"])
def test_a_cache_that_cannot_be_is_told(
    name: str,
    convert: Callable[..., str],
    hub: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UPTURN_CACHE", str(tmp_path / "file"))
    hub(fault=ConnectionError())
    with pytest.raises(ModelError, match=f"cache {tmp_path / 'file'}\n.*Not a directory.\n"):
        convert() if name == "some.gguf" else folders.resolve(name)


def test_a_cache_that_may_not_be_read_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(ModelError, match=f"cache {cache.parent}\n.*Permission denied"):
        folders.resolve("smollm2-135m")


def test_only_old_scratch_folders_are_removed(cache: Path, convert: Callable[..., str]):
    old, new, finished = cache / "tmpabcdefgh", cache / "tmpnew_new_", cache / "tmp-model-0123456789ab"
    for folder in (old, new, finished):
        (folder / "model").mkdir(parents=True)
    before = time.time() - 2 * folders.DAY
    for folder in (old, finished):
        os.utime(folder, times=(before, before))
    made = Path(convert())
    assert set(cache.iterdir()) == {new, finished, made}


def test_a_conversion_that_another_process_has_finished_counts(
    cache: Path, convert: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    replace = os.replace

    def overtaken(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        (target / "theirs").touch()
        replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    assert (Path(convert()) / "theirs").exists()
    assert len(list(cache.iterdir())) == 1


def test_half_a_folder_in_the_place_of_a_conversion_is_told(cache: Path, convert: Callable[..., str]):
    half = Path(convert())
    (half / "config.json").rename(half / "other")
    with pytest.raises(ModelError, match=f"cache {cache.parent}"):
        convert()


def _pip(wheel: folders.Wheel, content: bytes) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Stands for the command that fetches a package."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "some.whl", "w") as archive:
            archive.writestr(wheel.member, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.mark.parametrize("names", [None, ["config.json"]])
def test_a_short_name_takes_the_package_where_the_hub_gives_nothing(
    names: list[str] | None,
    cache: Path,
    convert: Callable[..., str],
    hub: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
):
    hub(names or (), fault=None if names else ConnectionError("down"))
    known = convert()
    wheel = folders.Wheel("some==1", "some/other.gguf", folders.sha256_of(cache.parents[1] / "some.gguf"), "owner/name")
    monkeypatch.setitem(folders.SHORT_NAMES, "short", wheel)
    monkeypatch.setattr(subprocess, "run", _pip(wheel, b"bytes"))
    made = Path(folders.resolve("short"))
    assert made.name == f"other-{wheel.sha256[:12]}"
    assert set(cache.iterdir()) == {made, Path(known)}


def test_a_short_name_takes_the_hub_where_it_answers(cache: Path, hub: Callable[..., Path]):
    snapshot = hub(["config.json", "model.safetensors"])
    assert folders.resolve("smollm2-135m") == str(snapshot)
