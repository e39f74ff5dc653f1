"""Configs: files, overrides and plug-ins become one validated tree, or one message with every problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from upturn import config
from upturn.errors import ConfigError
from upturn.lab.lab import Measure
from upturn.objectives import dpo, evolve
from upturn.strategies import chain

SMALL: dict[str, Any] = {
    "recipe": "evolve",
    "model": "somewhere",
    "task": "carry",
    "scorer": "exact",
    "activate": None,
    "sft": {"objective": "nll"},
    "collect": {"strategy": {"name": "chain", "turns": 3}, "selection": "best_vs_worst"},
    "prefer": {"objective": {"name": "evolve", "alpha": 0.5, "dpo": {"beta": 0.2}}},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return tmp_path / "small.yaml"


def loaded(path: Path, *overrides: str) -> Any:
    return config.load(str(path), overrides)[2]


def test_plug_ins_come_with_their_own_validated_configs(path: Path):
    cfg = loaded(path)
    assert cfg.collect.strategy.cfg == chain.Config(turns=3)
    assert cfg.prefer.objective.cfg == evolve.Config(alpha=0.5, dpo=dpo.Config(beta=0.2))
    assert cfg.prefer.objective.module is evolve
    assert cfg.sft.objective.name == "nll"


def test_overrides_reach_any_depth_and_names_become_plug_ins(path: Path):
    cfg = loaded(path, "seed=7", "prefer.objective.dpo.beta=0.3", "sft.objective.keep=0.5", "collect.strategy=star")
    assert cfg.seed == 7
    assert cfg.prefer.objective.cfg == evolve.Config(alpha=0.5, dpo=dpo.Config(beta=0.3))
    assert (cfg.sft.objective.name, cfg.sft.objective.cfg.keep) == ("nll", 0.5)
    assert cfg.collect.strategy.name == "star"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("0.1", 0.1),
        ("3", 3),
        ("null", None),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("a/1b", "a/1b"),
        ("", ""),
    ],
)
def test_override_values_are_yaml_and_know_exponents(text: str, value: Any):
    assert config.override({}, [f"a.b={text}"]) == {"a": {"b": value}}


def test_a_saved_config_is_the_same_config(path: Path, tmp_path: Path):
    cfg = loaded(path, "prefer.train.learning_rate=3e-6")
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump({"recipe": "evolve"} | cfg.model_dump(mode="json")))
    assert loaded(saved) == cfg


def test_data_is_short_for_the_data_of_the_task(path: Path):
    assert loaded(path, "task=gsm8k", "data=here").task.cfg.data == "here"
    assert loaded(path, "task.name=gsm8k", "data=here").task.cfg.data == "here"


def test_every_problem_is_listed_with_its_full_path(path: Path):
    with pytest.raises(ConfigError) as caught:
        loaded(
            path,
            "prefer.objective.dpo.bta=1",
            "collect.strategy.turns=many",
            "prefer.train.adam_beta1=2",
            "models=x",
        )
    said = str(caught.value)
    assert "4 problems in" in said
    assert "prefer.objective.dpo.bta = 1\n        There is no such key.\n        Did you mean 'beta'?" in said
    assert "collect.strategy.turns = 'many'" in said
    assert "Adam_beta1 and adam_beta2 lie in [0, 1)." in said
    assert "Did you mean 'model'?" in said


def test_a_key_like_no_other_gets_the_list(path: Path):
    with pytest.raises(ConfigError, match="Known keys: model, task, seed"):
        loaded(path, "xyzzy=1")


def test_a_plug_in_from_plain_data_is_checked_too():
    assert config.plugin("objectives", "dpo").cfg == dpo.Config()
    with pytest.raises(ConfigError, match="Did you mean 'beta'"):
        config.plugin("objectives", {"name": "dpo", "bta": 1})
    with pytest.raises(ConfigError, match="This needs a name"):
        config.plugin("objectives", {"beta": 1})


def test_configs_do_not_change(path: Path):
    with pytest.raises(ValueError, match="frozen"):
        loaded(path).seed = 3


@pytest.mark.parametrize(
    ("given", "turns"),
    [
        ({"turns": 6, "strategy": "critique_refine"}, 6),
        ({"strategy": {"name": "critique_refine", "turns": 3}}, 3),
        ({"turns": 3, "strategy": {"name": "chain", "turns": 3}}, 3),
        ({"strategy": "chain"}, 4),
    ],
)
def test_a_measurement_has_the_turns_of_its_strategy(given: dict[str, Any], turns: int):
    cfg = config.checked(Measure, given, "measure")
    assert cfg.strategy is not None
    assert cfg.turns == cfg.strategy.cfg.turns == turns


def test_two_numbers_of_turns_are_refused():
    with pytest.raises(ConfigError, match=r"Turns is 6 and strategy.turns is 4"):
        config.checked(Measure, {"turns": 6, "strategy": {"name": "chain", "turns": 4}}, "measure")


def test_a_strategy_without_turns_leaves_those_of_the_measurement():
    assert config.checked(Measure, {"turns": 5, "strategy": {"name": "aggregate"}}, "measure").turns == 5
