"""Every recipe from its shipped config, on a micro setting: it runs, and goes on after a kill as if there was none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from upturn import config, registry
from upturn.errors import ConfigError, NothingToLearn
from upturn.evaluation.summary import Summary
from upturn.lab import session
from upturn.lab.bench import Bench
from upturn.lab.store import Store
from upturn.report import page

WORLD = {name: config.read(name)[1]["recipe"] for name in config.shipped() if config.read(name)[1]["model"] == "carry"}
"""Shipped configs on the embedded world, and the recipe of each; `evolve` has tests of its own."""
RIVALS = sorted(name for name, recipe in WORLD.items() if recipe != "evolve")
SMALLER = {
    "iterations": "iterations=2", "measure_every": "measure_every=2", "prompts": "prompts=12",
    "train": "train.train_batch_size=8", "warm_up": "warm_up.train_batch_size=8",
}  # fmt: skip


def overrides(name: str, folder: Path) -> list[str]:
    """So few prompts that a run takes seconds; temperature 1.2 lets right and wrong drafts be among them."""
    fields = config.load(name)[2].__class__.model_fields
    fewer = [setting for field, setting in SMALLER.items() if field in fields]
    hot = ["sampling.temperature=1.2"] if "sampling" in fields else []
    measure = ["measure.prompts=4", "measure.parallel=2", "measure.turns=3", "options.chunk_prompts=12"]
    return [*fewer, *hot, *measure, f"output_dir={folder}"]


def test_every_recipe_has_a_config_on_the_embedded_world():
    assert set(WORLD.values()) == set(registry.names("recipes"))


@pytest.mark.parametrize("name", registry.names("recipes"))
def test_no_recipe_has_a_field_that_is_taken_for_the_data_of_its_task(name: str):
    assert "data" not in registry.find("recipes", name).Config.model_fields


def test_all_answers_so_far_can_be_learnt():
    _, _, cfg = config.load("think_prune_train", ["answers=accumulate"])
    assert cfg.answers == "accumulate"


@pytest.mark.parametrize("name", ["grpo_turns", "score_rl", "srt"])
def test_policy_gradients_sample_from_the_model_as_it_is(name: str):
    """Their ratios count from log-probs at temperature 1."""
    assert registry.find("recipes", name).Config(model="tiny", task="carry").sampling.temperature == 1


class Killed(BaseException):
    """What nobody catches."""


@pytest.mark.parametrize("name", RIVALS)
def test_a_recipe_goes_on_after_a_kill(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """That what is done again has the same bytes is shown for all kinds of steps in test_kill.py."""
    monkeypatch.setattr(page, "write_page", lambda folder: None)  # most of the time of so small a run
    settings = overrides(name, tmp_path / "run")
    planned = session.plan(name, settings)["steps"]
    keys, middle = [step["key"] for step in planned], len(planned) // 2
    with monkeypatch.context() as patch:
        patch.setattr(Store, "do", _until(middle))
        with pytest.raises(Killed):
            session.run(name, settings)
    folder, summary = session.run(name, settings)
    assert summary == Summary.read(folder / "summary.json")
    assert summary.status == "finished"
    assert [stage.name for stage in summary.stages] == [step["name"] for step in planned]
    known = [place < middle or key in keys[:place] for place, key in enumerate(keys)]
    assert [stage.cached for stage in summary.stages] == known


@pytest.mark.parametrize("name", ["grpo_turns", "demo"])
def test_a_run_whose_drafts_teach_nothing_more_ends_with_what_it_has(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As with a collapsed model, whose drafts are all alike; the model before is measured and published."""
    monkeypatch.setattr(page, "write_page", lambda folder: None)
    select = Bench.select

    def nothing_at_last(bench: Bench, attempts: Any, selector: Any, label: str) -> Any:
        if label == "iteration 2" and not bench.dry:
            raise NothingToLearn("here", "All are tied.", "Begin anew.")
        return select(bench, attempts, selector, label)

    monkeypatch.setattr(Bench, "select", nothing_at_last)
    activate = ["activate.prompts=12", "collect.prompts=12", "iterations=3", "sft.train.train_batch_size=8"]
    settings = overrides(name, tmp_path / "run") + (activate if name == "demo" else [])
    folder, summary = session.run(name, settings)
    assert summary.status == "finished"
    assert summary.measurements[-1].label == "iteration 1"
    assert (folder / "model" / "model.safetensors").is_file()


def test_where_the_first_drafts_teach_nothing_the_run_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def nothing(bench: Bench, attempts: Any, selector: Any, label: str) -> Any:
        raise NothingToLearn("here", "All are tied.", "Begin anew.")

    monkeypatch.setattr(Bench, "select", nothing)
    with pytest.raises(NothingToLearn):
        session.run("grpo_turns", overrides("grpo_turns", tmp_path / "run"))


def test_a_run_without_labels_does_not_learn_from_them():
    """`majority` leaves to the verifier what is right, for measuring."""
    with pytest.raises(ConfigError, match="scorer majority leaves that to the verifier"):
        session.plan("think_prune_train", ["scorer=majority"])
    assert session.plan("think_prune_train", ["scorer=majority", "prune=false"])["steps"]


def _until(count: int) -> Callable[..., Any]:
    """A store that does so many steps and then dies."""
    done, do = [], Store.do

    def counted(*args: Any, **settings: Any) -> Any:
        if len(done) == count:
            raise Killed
        done.append(args)
        return do(*args, **settings)

    return counted
