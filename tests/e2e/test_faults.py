"""Bad input: one clear message that says where, what and how to mend it, exit code 2, no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny
from typer.testing import CliRunner

from upturn.cli.main import app
from upturn.lab import session, work
from upturn.lab.store import at_work
from upturn.models import load
from upturn.report import read

Run = Callable[..., str]

HEADLESS = "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}<a>"
"""A template that tells no answer from a question in the history."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("faults") / "model", characters=tiny.SUMS)


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    return small_run.write(tmp_path / "first.yaml", model, iterations=1, measure={"prompts": 4, "turns": 2})


@pytest.fixture
def fails(recipe: Path) -> Run:
    """Run the recipe with settings that must fail; gives the message."""

    def run(*settings: str, config: str | Path = recipe) -> str:
        return refused(["run", "--quiet", str(config), *settings])

    return run


def refused(arguments: list[str]) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    where, *what, mend = done.stderr.rstrip("\n").split("\n")
    assert where[:1].strip() and what and mend.startswith("    ")
    assert "Traceback" not in done.output
    return done.stderr


def rows(folder: Path, *lines: str | dict[str, Any]) -> Path:
    """A data file."""
    path = folder / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+{i}", "answer": str(2 * i)} for i in range(count)]


def with_data(path: Path, **settings: Any) -> str:
    return "task=" + json.dumps({"name": "data", "data": str(path), "max_new_tokens": 6} | settings)


# Config


def test_a_misspelt_key_gets_the_nearest_name(fails: Run):
    said = fails("iteration=2")
    assert "1 problem in" in said
    assert "iteration = 2\n        There is no such key.\n        Did you mean 'iterations'?" in said


@pytest.mark.parametrize(
    ("setting", "near"),
    [
        ("prefer.train.learning_rat=1", "learning_rate"),
        ("prefer.objective.alpa=1", "alpha"),
        ("prefer.objective.dpo.bta=1", "beta"),
        ("activate.promts=3", "prompts"),
        ("collect.sampling.temprature=1", "temperature"),
        ("collect.strategy.turn=1", "turns"),
    ],
)
def test_a_misspelt_inner_key_gets_the_nearest_name(fails: Run, setting: str, near: str):
    assert f"Did you mean '{near}'?" in fails(setting)


def test_a_wrong_type_names_the_key_the_value_and_the_type(fails: Run):
    said = fails("iterations=many")
    assert "iterations = 'many'" in said and "valid integer" in said


@pytest.mark.parametrize(
    "setting",
    [
        "prefer.train.learning_rate=-1",
        "collect.sampling.top_p=0",
        "collect.sampling.temperature=-1",
        "limit=0",
    ],
)
def test_a_value_out_of_range_is_refused(fails: Run, setting: str):
    assert setting.partition("=")[0] + " = " in fails(setting)


def test_all_problems_come_at_once(fails: Run):
    said = fails("iterations=many", "sed=1", "prefer.train.learning_rate=fast", "scorer=exakt")
    assert "4 problems in" in said
    assert all(word in said for word in ("'many'", "'seed'", "'fast'", "'exact'"))


def test_an_unknown_plug_in_gets_the_nearest_name(fails: Run):
    assert "There is no 'evlove' among the objectives" in (said := fails("prefer.objective=evlove"))
    assert "Did you mean 'evolve'?" in said


def test_a_missing_key_is_named(recipe: Path, fails: Run):
    recipe.write_text("recipe: evolve\nmodel: x\n")
    said = fails()
    assert "task\n        This is required." in said and "prefer\n" in said


def test_an_unknown_config_gets_the_nearest_name(fails: Run):
    assert "Did you mean 'keywords-smollm2'?" in fails(config="keyword-smollm2")


def test_bad_yaml_is_named_with_its_line(recipe: Path, fails: Run):
    recipe.write_text("recipe: evolve\nmodel: [x\ntask: carry\n")
    assert ", line 3" in fails()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"- a\n- b\n", b"", b"model: x\n", b"recipe: evolv\n"])
def test_a_file_that_is_no_recipe_is_refused(recipe: Path, fails: Run, content: bytes):
    recipe.write_bytes(content)
    fails()


@pytest.mark.parametrize("setting", ["iterations", "=3", "iterations=[1", "seed.x=1"])
def test_an_override_that_is_none_is_refused(fails: Run, setting: str):
    assert setting[:4] in fails(setting)


def test_the_smaller_verbs_refuse_too(model: Path, tmp_path: Path):
    assert "Did you mean 'carry'?" in refused(["eval", "-m", str(model), "--task", "cary"])
    assert "dtype = 'int3'" in refused(["eval", "-m", str(model), "--task", "carry", "--dtype", "int3"])
    assert "Choose one of:" in refused(["list", "taks"])
    assert "There is no such folder" in refused(["refine", "-m", str(tmp_path / "none"), "1+1"])
    assert "tokens with its template" in refused(["refine", "-m", str(model), "1" * 600])
    assert "It is empty." in refused(["refine", "-m", str(model), " "])


# Models


def copy(model: Path, target: Path) -> Path:
    return Path(shutil.copytree(model, target))


def test_a_missing_model_folder_is_named(fails: Run, tmp_path: Path):
    assert f"model {tmp_path / 'none'}\n    There is no such folder" in fails(f"model={tmp_path / 'none'}")


def test_a_folder_without_config_is_refused(fails: Run, model: Path, tmp_path: Path):
    (copy(model, tmp_path / "bare") / "config.json").unlink()
    assert "The folder has no config.json." in fails(f"model={tmp_path / 'bare'}")


def test_broken_weights_are_refused(fails: Run, model: Path, tmp_path: Path):
    weights = copy(model, tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"model {tmp_path / 'cut'}\n    SafetensorError" in fails(f"model={tmp_path / 'cut'}")


def test_pickled_weights_are_refused(fails: Run, model: Path, tmp_path: Path):
    (copy(model, tmp_path / "old") / "model.safetensors").rename(tmp_path / "old" / "pytorch_model.bin")
    assert "Its weights are pickled, which can run code." in fails(f"model={tmp_path / 'old'}")


def test_a_folder_without_tokenizer_is_refused(fails: Run, model: Path, tmp_path: Path):
    for path in copy(model, tmp_path / "mute").glob("tokenizer*"):
        path.unlink()
    assert f"model {tmp_path / 'mute'}\n" in fails(f"model={tmp_path / 'mute'}")


def test_a_model_without_chat_template_is_refused(fails: Run, tmp_path: Path):
    plain = tiny.save(tmp_path / "plain", template=None, characters=tiny.SUMS)
    assert "It has no chat template" in fails(f"model={plain}")


def test_a_template_that_keeps_no_prefix_is_refused_where_a_conversation_is_wanted(fails: Run, tmp_path: Path):
    odd = tiny.save(tmp_path / "odd", template=HEADLESS, characters=tiny.SUMS)
    said = fails(f"model={odd}", "options.layout=conversation")
    assert "The chat template is not prefix-preserving" in said
    assert "Set options.layout=quoted." in said
    done = CliRunner().invoke(
        app, ["eval", "-m", str(odd), "--task", "carry", "-n", "2", "--output-dir", str(tmp_path / "e")]
    )
    assert done.exit_code == 0 and "drafts are quoted in one message, because" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(fails: Run, device: str):
    assert f"device {device}\n" in fails(f"options.device={device}")


# Data


def test_a_broken_line_is_named_with_file_and_number(fails: Run, tmp_path: Path):
    path = rows(tmp_path, *sums(3), '{"prompt": "1+1", ')
    assert f"{path}, line 4\n    This is not JSON" in fails(with_data(path))


def test_a_missing_field_is_named_with_what_is_there(fails: Run, tmp_path: Path):
    path = rows(tmp_path, *sums(3), {"question": "1+1", "answer": "2"})
    said = fails(with_data(path))
    assert f"{path}, line 4\n    The field 'prompt' is missing; there is: question, answer." in said


def test_an_empty_prompt_is_refused(fails: Run, tmp_path: Path):
    path = rows(tmp_path, *sums(3), {"prompt": "  ", "answer": "2"})
    assert f"{path}, line 4\n    The prompt in 'prompt' is empty." in fails(with_data(path))


def test_missing_data_names_what_is_near(fails: Run, tmp_path: Path):
    rows(tmp_path, *sums(3))
    assert "Did you mean" in fails(with_data(tmp_path / "row.jsonl"))


def test_data_is_short_for_task_data(fails: Run, tmp_path: Path):
    said = fails("task=data", f"data={tmp_path / 'none.jsonl'}")
    assert f"{tmp_path / 'none.jsonl'}\n    There is no such file" in said


def test_a_prompt_longer_than_the_context_is_refused_before_any_work(fails: Run, tmp_path: Path):
    (tmp_path / "test").mkdir()
    held = rows(tmp_path / "test", {"prompt": "1+1", "answer": "2"}, {"prompt": "1" * 600, "answer": "2"})
    said = fails(with_data(rows(tmp_path, *sums(60)), test_data=str(held)))
    assert "It has 603 tokens with its template, and the model takes 512. 1 of 2" in said
    assert f", '{'1' * 60}...'\n" in said
    assert not list(tmp_path.glob("first/store/*/chunk-*"))


def test_too_few_prompts_for_a_late_step_are_noticed_before_the_first(fails: Run, tmp_path: Path):
    assert "It has no prompts from place 53 on." in fails(with_data(rows(tmp_path, *sums(60))), "activate.prompts=60")
    assert not (tmp_path / "first").exists()


@pytest.fixture
def verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's own verifiers."""
    source = "def broken(p, a, r):\n    return 1 / 0\n\ndef tie(p, a, r):\n    return 0.5\n"
    (tmp_path / "verdicts.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_verifier_that_raises_is_named_with_the_prompt(fails: Run, tmp_path: Path, verdicts: None):
    said = fails(with_data(rows(tmp_path, *sums(60)), verifier="python:verdicts.broken"))
    assert "verifier python:verdicts.broken, prompt " in said
    assert "It raised ZeroDivisionError: division by zero" in said


def test_all_pairs_tied_says_how_many(fails: Run, tmp_path: Path, verdicts: None):
    said = fails(with_data(rows(tmp_path, *sums(60)), verifier="python:verdicts.tie"))
    assert "selection for sft\n    None of 12 prompts gave an example: " in said
    assert re.search(r"\d+ whose drafts are tied", said)


# Run folder and training


def test_a_run_folder_that_cannot_be_made_is_named(fails: Run, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for place in ("output_dir=file", "output_dir=file/below", "store=file/store"):
        key, _, below = place.partition("=")
        assert f"{tmp_path / 'file'} is a file, and no folder." in fails(f"{key}={tmp_path / below}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_forbidden_run_folder_is_named(fails: Run, tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in fails(f"output_dir={tmp_path / 'closed' / 'run'}")


def test_a_folder_with_another_kind_of_run_is_left_alone(model: Path, recipe: Path, tmp_path: Path):
    folder = tmp_path / "eval"
    wanted = [
        "eval",
        "-m",
        str(model),
        "--task",
        "carry",
        "-n",
        "2",
        "-t",
        "2",
        "-q",
        "--output-dir",
        str(folder),
    ]
    assert CliRunner().invoke(app, wanted).exit_code == 0
    assert "It holds a run of the recipe 'eval'." in refused(["run", str(recipe), f"output_dir={folder}"])


def test_a_run_does_not_take_the_place_of_the_users_model(fails: Run, model: Path, tmp_path: Path):
    mine = copy(model, tmp_path / "proj" / "model")
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    read = fails(f"output_dir={tmp_path / 'proj'}", f"model={mine}")
    assert f"folder {mine}\n    This run reads from it" in read
    assert "it holds what no run put there: " in fails(f"output_dir={tmp_path / 'proj'}")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model").symlink_to(mine)
    assert f"folder {tmp_path / 'linked' / 'model'}\n" in fails(f"output_dir={tmp_path / 'linked'}")
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before
    for folder in ("proj", "linked"):
        assert not (tmp_path / folder / "store").exists(), "no work has begun"


def test_a_run_does_not_write_over_the_recipe_that_it_was_given(recipe: Path, fails: Run, tmp_path: Path):
    (tmp_path / "proj").mkdir()
    given = recipe.rename(tmp_path / "proj" / "config.yaml")
    before = given.read_text()
    for config in (given, tmp_path / "proj" / ".." / "proj" / "config.yaml"):
        said = fails(f"output_dir={tmp_path / 'proj'}", config=config)
        assert f"The resolved config would be written over the one that was given, {config}." in said
    assert given.read_text() == before
    assert [path.name for path in given.parent.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("content", ["theme: dark\n", "- a\n", "a: [", ""])
def test_a_config_that_no_run_wrote_is_left_alone(fails: Run, tmp_path: Path, content: str):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "config.yaml").write_text(content)
    assert "It holds a config.yaml that no run wrote." in fails(f"output_dir={tmp_path / 'site'}")
    assert (tmp_path / "site" / "config.yaml").read_text() == content


def test_a_model_that_changes_under_a_run_is_noticed(
    fails: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changing, load_it = copy(model, tmp_path / "changing"), load.load

    def late(name: str, *options: Any, **more: Any) -> load.Loaded:
        shutil.copy(tiny.save(tmp_path / "other", seed=1, characters=tiny.SUMS) / "model.safetensors", changing)
        return load_it(name, *options, **more)

    monkeypatch.setattr(load, "load", late)
    said = fails(f"model={changing}")
    assert f"model {changing}\n    Its folder {changing} has changed since this run began." in said
    assert not list(tmp_path.glob("first/store/*/manifest.json"))


def names(folder: Path) -> set[str]:
    """What a run folder says of drafts and steps."""
    return {path.relative_to(folder).as_posix() for room in ("drafts", "steps") for path in (folder / room).iterdir()}


def test_a_changed_run_leaves_nothing_of_the_earlier_one(
    recipe: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "first"
    session.run(str(recipe), ["measure.parallel=2"])
    shutil.copy(folder / "drafts" / "base.jsonl", folder / "drafts" / "base.reward.jsonl")
    (folder / "drafts" / "notes.txt").write_text("mine")
    assert [bool(rows.parallel and rows.chain_rewards) for rows in read.read(folder).measured] == [True, False, False]
    changed = ["seed=7", "measure.parallel=0", "iterations=0"]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            session.run(str(recipe), changed)
    half, _ = read.both(folder)
    assert half.summary.status == "stopped" and half.losses == ()
    assert [(rows.label, rows.parallel, rows.chain_rewards) for rows in half.measured] == [("base", [], None)]
    assert "drafts/iteration-1.jsonl" not in names(folder)
    session.run(str(recipe), changed)
    fresh = tmp_path / "fresh"
    session.run(str(recipe), [*changed, f"output_dir={fresh}", f"store={folder / 'store'}"])
    assert names(folder) == names(fresh) | {"drafts/notes.txt"}
    assert {label for label, _ in read.read(folder).losses} == {"sft"}


def test_what_a_run_planned_and_did_not_do_is_not_that_of_an_earlier_one(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "first"
    session.run(str(recipe), ["iterations=0"])
    late = {"drafts/iteration-2.jsonl", "steps/99-train-iteration-2.json"}
    for name in late:
        (folder / name).write_text("{}")
    planned = session._planned

    def more(*told: Any) -> Any:  # as where a selection finds nothing in iteration 2, and the run ends before
        bench, store = planned(*told)
        bench.copies |= late
        return bench, store

    monkeypatch.setattr(session, "_planned", more)
    session.run(str(recipe), ["iterations=0"])
    assert not late & names(folder)


def test_a_changed_measurement_leaves_nothing_of_the_earlier_one(model: Path, tmp_path: Path):
    for cfg in ({"turns": 2, "prompts": 2, "parallel": 2}, {"turns": 2, "prompts": 2}):
        folder, _ = session.evaluate(str(model), "carry", cfg, session.Setting(output_dir=tmp_path / "run"))
    steps = {"steps/01-generate-measure-model.json", "steps/02-score-measure-model.json"}
    assert names(folder) == steps | {"drafts/model.jsonl"}


def test_a_second_run_in_a_folder_stops_before_it_writes(fails: Run, model: Path, tmp_path: Path):
    with at_work(tmp_path / "first"):
        assert f"A run is at work here (process {os.getpid()})." in fails("seed=7")
        assert not (tmp_path / "first" / "config.yaml").exists()
        asked = ["eval", "-m", str(model), "--task", "carry", "-n", "2", "--output-dir", str(tmp_path / "first")]
        assert "A run is at work here" in refused(asked)


def test_sigterm_ends_like_ctrl_c(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(work, "train", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    done = CliRunner().invoke(app, ["run", "--quiet", str(recipe)])
    assert (done.exit_code, signal.getsignal(signal.SIGTERM)) == (143, signal.SIG_DFL)
    assert done.stderr.strip() == "Stopped. Run the same command again to go on where it stopped."
    assert json.loads((tmp_path / "first" / "summary.json").read_text())["status"] == "stopped"


def test_a_model_that_is_gone_from_the_store_is_named(recipe: Path, fails: Run, tmp_path: Path):
    session.run(str(recipe), ["iterations=0"])
    (trained,) = tmp_path.glob("first/store/train-*")
    shutil.rmtree(trained / "model")
    said = fails("iterations=0")
    assert f"folder {trained}\n    The result of this step is damaged: its model is gone.\n    Delete it" in said


def test_nan_stops_with_the_step_the_prompts_and_a_repro(fails: Run, tmp_path: Path):
    said = fails(
        "prefer.train.learning_rate=1e30",
        "prefer.train.train_batch_size=1",
        "prefer.train.num_train_epochs=2",
    )
    assert "training iteration 1, step " in said
    assert "is nan on prompts carry-train-" in said
    (repro,) = tmp_path.glob("first/store/*/repro-step-*.json")
    assert str(repro) in said
    assert json.loads(repro.read_text())["samples"]
