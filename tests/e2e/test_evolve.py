"""The whole recipe on a random model: what a run leaves, and that the next one does only what has changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from upturn.cli.main import app
from upturn.evaluation.summary import Summary
from upturn.lab import session


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evolve")
    return small_run.write(folder / "first.yaml", tiny.save(folder / "model", characters=tiny.SUMS))


@pytest.fixture(scope="module")
def planned(config: Path) -> dict[str, Any]:
    """The plan, made before the run."""
    made = session.plan(str(config), [])
    assert not config.with_suffix("").exists(), "a plan writes nothing"
    return made


@pytest.fixture(scope="module")
def run(config: Path, planned: dict[str, Any]) -> tuple[Path, Summary]:
    return session.run(str(config), [])


def steps(folder: Path) -> list[tuple[str, str]]:
    """Name and key of every step, in order."""
    paths = sorted((folder / "steps").iterdir())
    return [(path.stem[3:], json.loads(path.read_text())["key"]) for path in paths]


def redone(summary: Summary) -> list[str]:
    return [stage.name for stage in summary.stages if not stage.cached]


def test_the_plan_names_the_very_steps_that_the_run_makes(planned: dict[str, Any], run: tuple[Path, Summary]):
    assert [(s["name"].replace(" ", "-"), s["key"]) for s in planned["steps"]] == steps(run[0])
    assert [s["name"] for s in planned["steps"]] == [stage.name for stage in run[1].stages]
    assert not any(s["done"] for s in planned["steps"])


def test_the_run_folder_holds_everything(run: tuple[Path, Summary]):
    folder, summary = run
    assert Summary.read(folder / "summary.json") == summary
    assert summary.status == "finished"
    assert [m.label for m in summary.measurements] == ["base", "sft", "iteration 1", "iteration 2"]
    assert [t.label for t in summary.training] == ["sft", "iteration 1", "iteration 2"]
    assert all(m.n == 10 and len(m.turns) == 3 for m in summary.measurements)
    assert all(t.pairs > 0 and t.steps > 0 for t in summary.training)
    assert summary.training[0].steps > 1
    assert "<html" in (folder / "report.html").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["recipe"] == "evolve"
    for label in ("base", "sft", "iteration-1", "iteration-2"):
        lines = (folder / "drafts" / f"{label}.jsonl").read_text().splitlines()
        attempts = [json.loads(line) for line in lines]
        assert len(attempts) == 10
        assert all(len(a["drafts"]) == len(a["scores"]) == 3 for a in attempts)
        assert {tuple(d["parents"]) for a in attempts for d in a["drafts"]} == {(), (0,), (1,)}
        lines = (folder / "drafts" / f"{label}.parallel.jsonl").read_text().splitlines()
        direct = [json.loads(line)["drafts"] for line in lines]
        chains = [a["drafts"] for a in attempts]
        same = [a["text"] == b["text"] for pair in zip(direct, chains, strict=True) for a, b in zip(*pair, strict=True)]
        assert sum(same) < len(same) / 2, "controls are drawn anew"


def test_transformers_loads_the_model_and_the_card_shows_the_turns(config: Path, run: tuple[Path, Summary]):
    model = AutoModelForCausalLM.from_pretrained(run[0] / "model")
    base = AutoModelForCausalLM.from_pretrained(config.parent / "model")
    assert any((a != b).any() for a, b in zip(model.parameters(), base.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(run[0] / "model").chat_template == tiny.TEMPLATE
    card = (run[0] / "model" / "README.md").read_text()
    assert "| model | turn 1 | turn 2 | turn 3 |\n|---|---|---|---|\n| base |" in card
    assert "| iteration 2 |" in card


def test_training_starts_at_the_loss_of_the_theory(run: tuple[Path, Summary]):
    place = next((run[0] / "steps").glob("*-train-iteration-1.json"))
    folder = Path(json.loads(place.read_text())["folder"])
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.538629, abs=1e-6)


def test_running_again_does_nothing_anew(config: Path, run: tuple[Path, Summary]):
    before = small_run.lasting(run[0])
    _, summary = session.run(str(config), [])
    assert redone(summary) == []
    assert small_run.lasting(run[0]) == before
    assert all(step["done"] for step in session.plan(str(config), [])["steps"])


def test_the_resolved_config_is_the_same_run(config: Path, run: tuple[Path, Summary]):
    again = session.plan(str(run[0] / "config.yaml"), [])
    assert [step["key"] for step in again["steps"]] == [key for _, key in steps(run[0])]


def test_a_changed_setting_redoes_only_what_depends_on_it(config: Path, run: tuple[Path, Summary], tmp_path: Path):
    shared = [f"store={run[0] / 'store'}", f"output_dir={tmp_path / 'other'}"]
    settings = [*shared, "prefer.train.learning_rate=2e-3"]
    todo = [step["name"] for step in session.plan(str(config), settings)["steps"] if not step["done"]]
    assert todo[0] == "train iteration 1"
    _, summary = session.run(str(config), settings)
    assert redone(summary) == todo
    assert "train sft" not in todo and "generate iteration 1" not in todo


def test_a_second_round_of_stage_a_goes_on_from_the_first(config: Path, run: tuple[Path, Summary], tmp_path: Path):
    shared = [f"store={run[0] / 'store'}", f"output_dir={tmp_path / 'other'}"]
    _, summary = session.run(str(config), [*shared, "sft_rounds=2", "iterations=0"])
    assert redone(summary)[0] == "generate sft 2", "the first round is the same as that of a run with one"
    assert [m.label for m in summary.measurements] == ["base", "sft 1", "sft 2"]
    store, drafts = run[0] / "store", {}
    for path in (tmp_path / "other" / "steps").iterdir():
        if (name := path.stem[3:]) in ("generate-sft-1", "generate-sft-2"):
            lines = (store / json.loads(path.read_text())["folder"] / "drafts.jsonl").read_text().splitlines()
            drafts[name] = {json.loads(line)["prompt"]["id"] for line in lines}
    assert not drafts["generate-sft-1"] & drafts["generate-sft-2"], "no prompt is taken twice"
    assert [row.label for row in summary.training] == ["sft 1", "sft 2"]


def test_corrected_references_are_judged_anew_and_moved_ones_are_not(config: Path, tmp_path: Path):
    def planned(folder: str, answer: int) -> dict[str, str]:
        rows = [{"prompt": f"{n}+1", "answer": n + 1 if n else answer} for n in range(200)]
        data = tmp_path / folder / "sums.jsonl"
        data.parent.mkdir()
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = ["task.name=data", "task.verifier=number", f"task.data={data}"]
        settings = [*task, "iterations=0", "measure.prompts=4", f"output_dir={tmp_path / 'run'}"]
        return {step["name"]: step["key"] for step in session.plan(str(config), settings)["steps"]}

    first, moved, corrected = planned("a", 7), planned("b", 7), planned("c", 1)
    assert moved == first
    assert {name for name in first if first[name] == corrected[name]} == {
        "generate measure base",
        "generate parallel base",
        "generate sft",
    }


def test_settings_that_cannot_change_the_result_redo_nothing(config: Path, run: tuple[Path, Summary], tmp_path: Path):
    settings = [
        "prefer.train.save_seconds=0",
        f"store={run[0] / 'store'}",
        f"output_dir={tmp_path / 'other'}",
    ]
    assert all(step["done"] for step in session.plan(str(config), settings)["steps"])


def test_limit_makes_everything_small(config: Path, tmp_path: Path):
    _, summary = session.run(
        str(config), ["limit=6", "iterations=1", "measure.parallel=0", f"output_dir={tmp_path / 'small'}"]
    )
    assert {m.n for m in summary.measurements} == {6}
    assert all(0 < t.pairs <= 12 for t in summary.training)


def test_json_is_one_object_for_machines(config: Path, run: tuple[Path, Summary]):
    runner = CliRunner()
    done = runner.invoke(app, ["run", str(config), "--json"])
    assert done.exit_code == 0
    assert Summary.model_validate_json(done.stdout).measurements == run[1].measurements
    dry = runner.invoke(app, ["run", str(config), "--dry-run", "--json"])
    assert {"config", "steps", "tokens", "seconds"} <= json.loads(dry.stdout).keys()
    text = runner.invoke(app, ["run", str(config), "--dry-run"]).stdout
    assert "generate measure base" in text and "done" in text


def test_eval_measures_the_published_model(run: tuple[Path, Summary], tmp_path: Path):
    wanted = ["eval", "--model", str(run[0] / "model"), "--task", "carry", "-n", "5", "-t", "2", "--json"]
    done = CliRunner().invoke(app, [*wanted, "--output-dir", str(tmp_path / "eval")])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["measurements"]
    assert (row["n"], len(row["turns"])) == (5, 2)


def test_refine_shows_every_turn(run: tuple[Path, Summary]):
    wanted = [
        "refine",
        "--model",
        str(run[0] / "model"),
        "-t",
        "3",
        "--max-new-tokens",
        "8",
        "12345678+12345678",
    ]
    shown = CliRunner().invoke(app, wanted)
    assert shown.exit_code == 0, shown.output
    assert [f"Turn {turn}" in shown.stdout for turn in (1, 2, 3, 4)] == [True, True, True, False]
    attempt = json.loads(CliRunner().invoke(app, [*wanted, "--json"]).stdout)
    assert [draft["turn"] for draft in attempt["drafts"]] == [1, 2, 3]


def test_the_installed_command_runs_a_recipe(config: Path, run: tuple[Path, Summary]):
    command = [sys.executable, "-m", "upturn.cli.main", "run", str(config), "iterations=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    assert "generate measure base: done before" in done.stderr
