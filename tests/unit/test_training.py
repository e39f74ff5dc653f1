"""Training: exact zero at step 0, batches that do not matter, checkpoints that do not show, faults that speak."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from upturn.errors import DataError, RunError
from upturn.models import chat, load
from upturn.objectives import evolve, nll
from upturn.objectives._base import Loss
from upturn.training import plan, train
from upturn.training.optimizer import MasterAdamW
from upturn.types import Draft, Pair, Prompt, Requests


def draft(words: Any, text: str, index: int) -> Draft:
    ids = (*words(text, add_special_tokens=False)["input_ids"], 2)
    return Draft(index, 1, (), text, ids, (0.0,) * len(ids), "stop", 5, 0)


def pairs_of(words: Any, count: int = 6) -> list[Pair]:
    return [
        Pair(Prompt(f"p{i}", "sum " + "ab" * (i % 3)), draft(words, "yes" * (1 + i % 2), 0), draft(words, f"no{i}", 1))
        for i in range(count)
    ]


def job(loaded: load.Loaded, folder: Path, objective: Any = evolve, cfg: Any = None, **settings: Any) -> train.Job:
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))
    settings = {"learning_rate": 1e-3, "train_batch_size": 3, "save_seconds": 1e9} | settings
    folder.mkdir(exist_ok=True, parents=True)
    return train.Job(
        objective,
        cfg or objective.Config(),
        pairs_of(loaded.tokenizer),
        talk,
        plan.Config(**settings),
        0,
        "test",
        folder,
    )


def fresh(model: Path, dtype: str = "float32") -> load.Loaded:
    return load.load(str(model), dtype, device="cpu")


def state(loaded: load.Loaded) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


def test_critiques_are_learnt_beside_the_preferences(tiny_model: Path, tmp_path: Path):
    loaded, entries = fresh(tiny_model), []
    cfg = evolve.Config(nll_weight=0.5, nll=nll.Config(direct=0, critique=1))
    plain = job(loaded, tmp_path, cfg=cfg, num_train_epochs=6.0)
    judged = [replace(pair, chosen_critique="fine", rejected_critique="too short") for pair in plain.examples]
    train.run(loaded.model, replace(plain, examples=judged), entries.append)
    assert entries[0]["improve/rewards/margins"] == 0
    assert entries[0]["refine/loss"] == pytest.approx(0.5, abs=1e-6)
    assert entries[-1]["nll/loss"] < 0.95 * entries[0]["nll/loss"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_loss_is_that_of_the_theory(tiny_model: Path, tmp_path: Path, dtype: str):
    loaded, entries = fresh(tiny_model, dtype), []
    train.run(loaded.model, job(loaded, tmp_path), entries.append)
    assert entries[0]["loss"] == pytest.approx(0.2 * math.log(2) + 0.8 * 0.5, abs=1e-6)
    assert entries[0]["improve/rewards/margins"] == 0
    assert entries[-1]["loss"] < entries[0]["loss"]


def test_a_reference_of_other_weights_stops_the_training(tiny_model: Path, tmp_path: Path):
    loaded = fresh(tiny_model)
    train.run(loaded.model, job(loaded, tmp_path), lambda entry: None)
    stale = fresh(tiny_model)
    with torch.no_grad():
        next(stale.model.parameters()).add_(0.01)
    with pytest.raises(RunError, match="differs from its own reference"):
        train.run(stale.model, job(stale, tmp_path), lambda entry: None)


def test_micro_batches_do_not_matter(tiny_model: Path, tmp_path: Path):
    whole, cut = fresh(tiny_model), fresh(tiny_model)
    train.run(whole.model, job(whole, tmp_path / "a", max_tree_tokens=10_000), lambda entry: None)
    train.run(cut.model, job(cut, tmp_path / "b", max_tree_tokens=1), lambda entry: None)
    for name, tensor in state(whole).items():
        torch.testing.assert_close(state(cut)[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 10_000])
def test_an_output_layer_of_its_own_learns_too(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, tokens: int
):
    """Llama 3, Mistral and all larger models have one; its gradient comes in parts, and autograd hands over none."""

    def trained(folder: Path) -> dict[str, torch.Tensor]:
        loaded = fresh(tiny_model, dtype)
        model: Any = loaded.model
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        train.run(model, job(loaded, folder, max_tree_tokens=tokens), lambda entry: None)
        return state(loaded)

    parts = trained(tmp_path / "parts")
    monkeypatch.setattr("upturn.models._output_layer.usable", lambda model, hidden: False)
    whole = trained(tmp_path / "whole")
    start = state(fresh(tiny_model, dtype))
    assert not torch.equal(parts["lm_head.weight"], start["lm_head.weight"])
    assert not torch.equal(parts["lm_head.weight"], parts["model.embed_tokens.weight"])
    rtol, atol = (1e-3, 1e-5) if dtype == "float32" else (0.02, 0.004)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=rtol, atol=atol)


def test_gradients_are_summed_over_micro_batches_and_leave_the_weights():
    model = torch.nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    optimizer = MasterAdamW(model, plan.Config())
    first = (
        torch.float32 if optimizer.masters[0].native else torch.bfloat16
    )  # without kernels it waits for a second one
    for factor, held in ((1.0, first), (2.0, torch.float32), (2**-7, torch.float32)):
        optimizer.backward(factor * model(torch.tensor([[3.0, 5.0]], dtype=torch.bfloat16)).sum())
        assert model.weight.grad is None
        assert optimizer.grads[0].dtype == held
    expected = [[9.0 + 3 / 128, 15.0 + 5 / 128]]  # bfloat16 would lose the small one
    assert optimizer.grads[0].tolist() == expected
    model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()  # another's backward pass is left alone
    assert model.weight.grad is not None
    assert optimizer.grads[0].tolist() == expected


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_killed_training_ends_byte_for_byte_like_an_unbroken_one(tiny_model: Path, tmp_path: Path, stop_after: int):
    settings = {"num_train_epochs": 2.0, "save_seconds": 0.0}
    unbroken, killed = fresh(tiny_model, "bfloat16"), fresh(tiny_model, "bfloat16")
    all_entries: list[dict[str, Any]] = []
    train.run(unbroken.model, job(unbroken, tmp_path / "a", **settings), all_entries.append)

    def kill(entry: dict[str, Any]) -> None:
        if entry["step"] > stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.run(killed.model, job(killed, tmp_path / "b", **settings), kill)
    again, entries = fresh(tiny_model, "bfloat16"), []
    train.run(again.model, job(again, tmp_path / "b", **settings), entries.append)
    assert all(torch.equal(state(again)[name], tensor) for name, tensor in state(unbroken).items())
    assert [e["loss"] for e in entries] == [e["loss"] for e in all_entries]


def stopped(model: Path, folder: Path, after: int = 2) -> None:
    """A training that was killed once it had written some checkpoints."""
    killed = fresh(model)

    def kill(entry: dict[str, Any]) -> None:
        if entry["step"] > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.run(killed.model, job(killed, folder, num_train_epochs=2.0, save_seconds=0.0), kill)


def gone_on(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights that the same training ends with, and what it says."""
    said: list[str] = []
    monkeypatch.setattr(train.progress, "say", said.append)
    loaded = fresh(model)
    train.run(loaded.model, job(loaded, folder, num_train_epochs=2.0, save_seconds=0.0), lambda entry: None)
    return state(loaded), said


@pytest.mark.parametrize("lost", [train.STATE, train.OPTIMIZER])
@pytest.mark.parametrize("has_old", [False, True])
def test_a_checkpoint_that_lost_a_file_counts_for_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, has_old: bool
):
    stopped(tiny_model, tmp_path / "a")
    if has_old:
        shutil.copytree(tmp_path / "a" / train.CHECKPOINT, tmp_path / "a" / train.OLD)
    (tmp_path / "a" / train.CHECKPOINT / lost).unlink()
    found, said = gone_on(tiny_model, tmp_path / "a", monkeypatch)
    assert said == (["test: going on after step 2 of 4"] if has_old else [])
    whole, _ = gone_on(tiny_model, tmp_path / "b", monkeypatch)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("size", [0, 40])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        (f"{train.CHECKPOINT}/{train.STATE}", "test: its checkpoint is damaged, so it begins anew"),
        (f"{train.CHECKPOINT}/{train.OPTIMIZER}", "test: its checkpoint is damaged, so it begins anew"),
        (
            "reference.safetensors",
            "test: reference: reference.safetensors is damaged, so its values are computed again",
        ),
        (train.ARITHMETIC, "test: begins anew, as what is left of it was computed otherwise (kernels unknown before"),
    ],
)
def test_a_damaged_file_of_progress_counts_for_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: str, size: int
):
    stopped(tiny_model, tmp_path / "a")
    damaged = tmp_path / "a" / name
    damaged.write_bytes(damaged.read_bytes()[:size])
    found, said = gone_on(tiny_model, tmp_path / "a", monkeypatch)
    assert said[0].startswith(told)
    whole, _ = gone_on(tiny_model, tmp_path / "b", monkeypatch)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_what_no_training_needs_any_more_is_never_half_there(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stopped(tiny_model, tmp_path)

    def killed(folder: Path, **_: Any) -> None:
        if folder.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        train.forget(tmp_path)
    assert (tmp_path / train.PART).exists() and not (tmp_path / train.CHECKPOINT).exists()


def test_other_arithmetic_begins_a_training_anew_and_says_so(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stopped(tiny_model, tmp_path / "a")
    before = json.loads((tmp_path / "a" / train.ARITHMETIC).read_text())
    stale = (tmp_path / "a" / "reference.safetensors").stat().st_ino
    kept = tmp_path / "a" / "kept"
    os.link(tmp_path / "a" / "reference.safetensors", kept)  # its number is not given to another file
    monkeypatch.setattr(train, "_arithmetic", lambda model: before | {"kernels": "changed"})
    found, said = gone_on(tiny_model, tmp_path / "a", monkeypatch)
    told = f"(kernels {before['kernels']} before, changed now)"
    assert said == [f"test: begins anew, as what is left of it was computed otherwise {told}"]
    assert (tmp_path / "a" / "reference.safetensors").stat().st_ino != stale
    whole, _ = gone_on(tiny_model, tmp_path / "b", monkeypatch)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_a_training_knows_whether_it_has_kernels(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    model = fresh(tiny_model).model
    monkeypatch.setattr(train.build, "kernels", lambda dtype: None)
    assert train._arithmetic(model) == {"kernels": "no", "device": "cpu", "dtype": "torch.float32"}
    monkeypatch.setattr(train.build, "kernels", lambda dtype: model)
    assert train._arithmetic(model)["kernels"] == "yes"


def test_a_loss_that_is_not_finite_stops_with_a_repro(tiny_model: Path, tmp_path: Path):
    def explode(logprobs_N: torch.Tensor, batch: Any, cfg: Any) -> Loss:
        return Loss(logprobs_N.sum() * math.nan, 1.0)

    broken = SimpleNamespace(needs=nll.needs, uses_reference=nll.uses_reference, loss=explode, Config=nll.Config)
    loaded = fresh(tiny_model)
    with pytest.raises(RunError, match=r"step 1\n.*nan"):
        train.run(loaded.model, job(loaded, tmp_path, broken), lambda entry: None)
    repro = json.loads((tmp_path / "repro-step-1.json").read_text())
    assert repro["prompts"] and repro["samples"]


def test_a_pair_longer_than_the_context_is_refused(tiny_model: Path, tmp_path: Path):
    loaded = fresh(tiny_model)
    loaded.model.config.max_position_embeddings = 8  # type: ignore[union-attr]
    with pytest.raises(DataError, match="the model takes 8"):
        train.run(loaded.model, job(loaded, tmp_path), lambda entry: None)


def test_every_pair_is_in_every_epoch_and_the_rate_follows_the_schedule():
    cfg = plan.Config(num_train_epochs=2, train_batch_size=4, max_tree_tokens=10, warmup_ratio=0.25, learning_rate=1.0)
    steps = plan.steps([3, 9, 4, 2, 8, 5], cfg, seed=0)
    assert len(steps) == 4
    for epoch in (0, 1):
        pairs = [p for step in steps if step.epoch == epoch for batch in step.micro_batches for p in batch]
        assert sorted(pairs) == [0, 1, 2, 3, 4, 5]
    # 1 step of warm-up to the full rate, then a cosine over 3 steps: 1, 3/4, 1/4
    rates = [plan.learning_rate(i, 4, cfg) for i in range(4)]
    assert rates == pytest.approx([1.0, 1.0, 0.75, 0.25])


def test_the_device_chooses_the_micro_batch_and_no_key_changes():
    chosen, given = plan.Config(), plan.Config(max_tree_tokens=10)
    assert [cfg.tree_tokens(device) for cfg in (chosen, given) for device in ("cpu", "cuda")] == [4096, 16384, 10, 10]
    assert [len(plan.steps([4096] * 8, chosen, 0, device)[0].micro_batches) for device in ("cpu", "cuda")] == [8, 2]
    assert chosen.key() == plan.Config(max_tree_tokens=4096).key() != given.key()
    assert chosen.key()["max_tree_tokens"] == 4096 and "save_seconds" not in chosen.key()
