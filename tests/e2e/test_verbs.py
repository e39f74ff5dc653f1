"""`upturn refine` and `upturn eval` with a strategy: critiques are asked for and shown, kept answers are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from rich.text import Text
from typer.testing import CliRunner, Result

from upturn.cli import verbs
from upturn.cli.main import app
from upturn.lab import session
from upturn.models import card
from upturn.models.card import Refining
from upturn.types import Draft, Requests

REQUEST = "Better."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("verbs") / "model")


def refine(model: Path, *more: str) -> Result:
    wanted = ["refine", "-m", str(model), "-t", "3", "--max-new-tokens", "8", "--request", REQUEST]
    return CliRunner().invoke(app, [*wanted, *more, "1+1"])


def drafts(model: Path, *more: str) -> list[dict[str, Any]]:
    done = refine(model, "--json", "--strategy", "critique_refine", *more)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["drafts"]


def titles(printed: str) -> list[str]:
    return [line.partition(" [")[0] for line in printed.splitlines() if line.endswith(" tokens]") or "tokens, " in line]


def test_every_critique_is_shown_between_the_answers(model: Path):
    shown = refine(model, "--strategy", "critique_refine")
    assert shown.exit_code == 0, shown.output
    assert titles(shown.stdout) == ["Turn 1", "Critique of turn 1", "Turn 2", "Critique of turn 2", "Turn 3"]
    for draft in drafts(model):
        assert draft["text"] in shown.stdout


def test_a_chain_is_what_it_was(model: Path):
    plain = refine(model)
    assert titles(plain.stdout) == ["Turn 1", "Turn 2", "Turn 3"]
    assert refine(model, "--strategy", "chain").stdout == plain.stdout


def test_a_terminal_shows_the_same_in_the_end(model: Path, monkeypatch: pytest.MonkeyPatch):
    plain = refine(model)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    shown = refine(model)
    assert shown.stdout.index("\x1b[?25l") < shown.stdout.index("\x1b[?25h")  # the cursor goes and comes back
    assert titles(Text.from_ansi(shown.stdout).plain) == titles(plain.stdout)


def test_critique_and_answer_have_requests_of_their_own(model: Path):
    generic, own = drafts(model), drafts(model, "--critique-request", "Check.")
    assert [draft["kind"] for draft in generic] == ["answer", "critique", "answer", "critique", "answer"]
    # a token is a character: the first critique sees the same answer, behind it another request
    assert generic[1]["prompt_tokens"] - own[1]["prompt_tokens"] == len(Requests("").critique) - len("Check.")
    # the refined answer sees the critique too, closed by an end token, and the request between two signs of who speaks
    _, critique, answer, *_ = own
    closed = len(critique["token_ids"]) + (critique["finish_reason"] != "stop")
    assert answer["prompt_tokens"] - critique["prompt_tokens"] == closed + len(REQUEST) + 2


def kept(model: Path, capsys: pytest.CaptureFixture[str], stop: str) -> tuple[list[Draft], str]:
    """Drafts and what was printed, where a critique with the words `stop` ends the refining."""
    trained = Refining(strategy={"name": "critique_refine", "stop": stop}, refine=REQUEST)
    (model / card.REFINING).write_text(trained.model_dump_json())
    how = verbs.Asked(None, 3, None, None, temperature=0.7, max_new_tokens=8, seed=0)
    attempt = verbs.refine("1+1", str(model), how, show=True)
    (model / card.REFINING).unlink()
    return list(attempt.drafts), capsys.readouterr().out


def test_what_the_model_was_trained_for_is_done_unless_another_is_told(model: Path, tmp_path: Path):
    own = tmp_path / "own"
    shutil.copytree(model, own)
    trained = Refining(strategy={"name": "critique_refine"}, refine=REQUEST, critique="Check.")
    (own / card.REFINING).write_text(trained.model_dump_json())
    done = CliRunner().invoke(app, ["refine", "-m", str(own), "-t", "3", "--max-new-tokens", "8", "--json", "1+1"])
    assert json.loads(done.stdout)["drafts"] == drafts(model, "--critique-request", "Check.")
    assert refine(own, "--strategy", "chain").stdout == refine(model).stdout


def test_the_models_own_strategy_keeps_its_settings_when_named(model: Path, tmp_path: Path):
    own = tmp_path / "own"
    shutil.copytree(model, own)
    (own / card.REFINING).write_text(Refining(strategy={"name": "critique_refine", "stop": "x"}).model_dump_json())
    trained = verbs.trained_for(str(own))
    for name in (None, "critique_refine"):
        assert verbs.measuring(name, trained, 3, 10, 0.7)["strategy"] == {
            "name": "critique_refine",
            "stop": "x",
            "turns": 3,
        }
    assert verbs.measuring("chain", trained, 3, 10, 0.7)["strategy"] == {"name": "chain", "turns": 3}


def test_a_strategy_without_turns_gives_way_to_a_chain(model: Path, tmp_path: Path):
    own = tmp_path / "own"
    shutil.copytree(model, own)
    (own / card.REFINING).write_text(Refining(strategy={"name": "aggregate", "proposals": 2}).model_dump_json())
    assert titles(refine(own).stdout) == ["Turn 1", "Turn 2", "Turn 3"]


def test_eval_asks_a_model_as_it_was_trained(model: Path, tmp_path: Path):
    own, folder = tmp_path / "own", tmp_path / "run"
    shutil.copytree(model, own)
    trained = Refining(strategy={"name": "critique_refine"}, refine=REQUEST, critique="Check.")
    (own / card.REFINING).write_text(trained.model_dump_json())
    wanted = ["eval", "-m", str(own), "--task", "carry", "-t", "2", "-n", "2", "--output-dir", str(folder)]
    done = CliRunner().invoke(app, [*wanted, "--json"])
    assert done.exit_code == 0, done.output
    direct, refined = json.loads((folder / "drafts" / "model.jsonl").read_text().splitlines()[0])["drafts"]
    # a token is a character: the context of the critique has the answer, its end, and the request between two signs
    closed = len(direct["token_ids"]) + (direct["finish_reason"] != "stop")
    asked = direct["prompt_tokens"] + closed + len("Check.") + 2
    said = refined["num_tokens_told"] - len(refined["token_ids"])
    cut = asked + said + len(REQUEST) + 2
    assert refined["prompt_tokens"] in (asked + cut, asked + cut + 1)  # and an end where the critique was cut


def test_eval_shows_drafts_as_the_model_was_trained_to_see_them(model: Path, tmp_path: Path):
    own, folder = tmp_path / "own", tmp_path / "run"
    shutil.copytree(model, own)
    (own / card.REFINING).write_text(Refining(layout="quoted").model_dump_json())
    wanted = ["eval", "-m", str(own), "--task", "carry", "-t", "2", "-n", "2", "--output-dir", str(folder)]
    done = CliRunner().invoke(app, [*wanted, "--json"])
    assert done.exit_code == 0, done.output
    assert yaml.safe_load((folder / "config.yaml").read_text())["options"]["layout"] == "quoted"
    _, refined = json.loads((folder / "drafts" / "model.jsonl").read_text().splitlines()[0])["drafts"]
    assert refined["cached_tokens"] < refined["prompt_tokens"] / 2, "a quoted draft is no earlier turn"


def test_models_of_two_runs_have_folders_of_their_own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for run in ("a", "b"):
        shutil.copytree(model, tmp_path / "runs" / run / "model")
        wanted = ["eval", "-m", f"runs/{run}/model", "--task", "carry", "-t", "2", "-n", "2", "--json"]
        done = CliRunner().invoke(app, wanted)
        assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {"eval-a-model-carry", "eval-b-model-carry"}
    wanted = ["eval", "-m", "runs/b/model", "--task", "carry", "-n", "2", "--output-dir", "runs/eval-a-model-carry"]
    refused = CliRunner().invoke(app, wanted)
    assert refused.exit_code == 2
    assert "results of other models" in refused.output


def test_a_base_with_other_tokens_is_measured_without_drift(model: Path, tmp_path: Path):
    other = tiny.save(tmp_path / "other", characters=tiny.SUMS)
    wanted = ["diagnose", "-m", str(model), "--base", str(other), "--task", "carry", "-t", "2", "-n", "2", "--json"]
    done = CliRunner().invoke(app, [*wanted, "--output-dir", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "run" / "summary.json").read_text())["measurements"]
    assert [row["kl_start"] for row in told] == [None, None]


def test_a_broken_file_is_one_message(model: Path, tmp_path: Path):
    own = tmp_path / "own"
    shutil.copytree(model, own)
    for text, what in [("{", "EOF while parsing"), ('{"layout": "x"}', "layout: Input should be 'auto',")]:
        (own / card.REFINING).write_text(text)
        wrong = refine(own)
        assert wrong.exit_code == 2
        assert card.REFINING in wrong.stderr and what in wrong.stderr and "Mend or delete it" in wrong.stderr


def test_a_draft_that_the_context_ends_is_not_told_as_too_long(model: Path, capsys: pytest.CaptureFixture[str]):
    for question, why in [("1+1", "at the length limit"), ("1" * 500, "where the model's context was full")]:
        for seed in range(5):
            how = verbs.Asked(None, 1, None, None, temperature=0.7, max_new_tokens=20, seed=seed)
            [draft] = verbs.refine(question, str(model), how, show=True).drafts
            assert (f", cut {why}]" in capsys.readouterr().out) != draft.complete


def test_a_kept_answer_ends_the_conversation_with_a_line(model: Path, capsys: pytest.CaptureFixture[str]):
    through, printed = kept(model, capsys, stop="")
    assert "nothing to change" not in printed
    stopped, printed = kept(model, capsys, stop=through[1].text)
    assert titles(printed) == ["Turn 1", "Critique of turn 1"]
    assert printed.endswith("\n\nThe critique found nothing to change: the answer stays.\n")
    assert [draft.turn for draft in stopped if draft.kind == "answer"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("critique_refin", "Did you mean 'critique_refine'?"),
        ("nothing_like_it", "Choose one of: aggregate, chain"),
        ("aggregate", "Known keys: proposals, layers."),
    ],
)
def test_a_wrong_strategy_is_one_message_and_leaves_nothing(name: str, told: str, model: Path, tmp_path: Path):
    folder = tmp_path / "run"
    evaluate = ["eval", "-m", str(model), "--task", "carry", "--output-dir", str(folder), "--strategy", name]
    for wrong in (refine(model, "--strategy", name), CliRunner().invoke(app, evaluate)):
        assert wrong.exit_code == 2
        assert told in wrong.stderr and "Traceback" not in wrong.stderr
    assert not folder.exists()


def measured(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "drafts" / "model.jsonl").read_text().splitlines()]


def test_eval_measures_answers_and_keeps_what_was_said_of_them(model: Path, tmp_path: Path):
    wanted = ["eval", "-m", str(model), "--task", "carry", "-t", "3", "-n", "4", "--output-dir", str(tmp_path)]
    done = CliRunner().invoke(app, [*wanted, "--strategy", "critique_refine", "--json"])
    assert done.exit_code == 0, done.output
    assert [row["turn"] for row in json.loads(done.stdout)["measurements"][0]["turns"]] == [1, 2, 3]
    for attempt in measured(tmp_path):
        assert [draft["kind"] for draft in attempt["drafts"]] == ["answer"] * 3
    texts = [draft["critique"] for attempt in measured(tmp_path) for draft in attempt["drafts"]]
    assert any(texts), "a critique is not always empty"
    assert ('class="critique"' in (tmp_path / "report.html").read_text()) == any(texts)


def test_eval_refines_in_a_chain_when_not_told(model: Path, tmp_path: Path):
    folder, _ = session.evaluate(str(model), "carry", {"turns": 3, "prompts": 4}, session.Setting(output_dir=tmp_path))
    keys = steps(folder)
    wanted = ["eval", "-m", str(model), "--task", "carry", "-t", "3", "-n", "4"]
    done = CliRunner().invoke(app, [*wanted, "--output-dir", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    assert steps(folder) == keys


def steps(folder: Path) -> list[str]:
    return [json.loads(path.read_text())["key"] for path in sorted((folder / "steps").iterdir())]


@pytest.mark.parametrize(("seconds", "told"), [(20, "under a minute"), (60, "1 minute"), (130, "2 minutes")])
def test_a_plan_never_takes_no_time(seconds: float, told: str):
    steps = [{"name": "train sft", "tokens": 9, "seconds": seconds, "done": False}]
    plan = {"config": {}, "output_dir": "r", "steps": steps, "tokens": 9, "seconds": seconds}
    assert session.describe(plan).endswith(f"To do: about 9 tokens, {told} on this machine.")
    done = plan | {"steps": [steps[0] | {"done": True}], "tokens": 0, "seconds": 0}
    assert session.describe(done).endswith("To do: nothing, all steps are done.")


def test_a_run_folder_that_is_a_file_is_told(model: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    wanted = ["eval", "-m", str(model), "--task", "carry", "--output-dir", str(tmp_path / "file")]
    done = CliRunner().invoke(app, wanted, env={"COLUMNS": "400"})
    assert done.exit_code == 2 and "is a file." in done.stderr
