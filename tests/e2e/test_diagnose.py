"""`upturn diagnose` from the command to the verdict, on endpoints that refine by a script."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from scripted_server import ScriptedServer, answer
from typer.testing import CliRunner, Result

from upturn.cli.main import app

PROMPTS = 150
"""Half of what the command asks by default; the rules behind the verdict are tested on 300 in tests/unit."""


def diagnose(model: str, url: str, folder: Path, *more: str) -> Result:
    arguments = ["diagnose", "--model", model, "--api", url, "--task", "keywords", "--output-dir", str(folder)]
    return CliRunner().invoke(app, [*arguments, "--json", *more])


@pytest.mark.parametrize(
    ("model", "more"),
    [("copies", []), ("churns", []), ("refines", []), ("answers", ["--base", "base"])],
)
def test_a_verdict_tells_the_scripted_models_apart(model: str, more: list[str], tmp_path: Path):
    with ScriptedServer() as server:
        done = diagnose(model, server.url, tmp_path, "--prompts", str(PROMPTS), *more)
    assert done.exit_code == 0, done.output
    study = json.loads(done.stdout)
    assert study["verdict"]["kind"] == model, study["verdict"]
    assert study["models"][-1]["n"] == PROMPTS
    assert (tmp_path / "report.html").is_file()
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(("strategy", "chain", "direct"), [("chain", 3, 5), ("critique_refine", 3, 7)])
def test_the_controls_are_two_more_than_the_drafts_of_a_chain(strategy: str, chain: int, direct: int, tmp_path: Path):
    with ScriptedServer() as server:
        done = diagnose("refines", server.url, tmp_path, "--strategy", strategy, "-t", "3", "--prompts", "4")
    assert done.exit_code == 0, done.output
    drafts = {path.stem: _drafts(path) for path in (tmp_path / "drafts").iterdir()}
    assert {name: len(found) for name, found in drafts.items()} == {"model": chain, "model.parallel": direct}
    assert [bool(draft["critique"]) for draft in drafts["model"]] == [False] + [strategy == "critique_refine"] * 2


def _drafts(path: Path) -> list[dict[str, object]]:
    """Of the first prompt."""
    return json.loads(path.read_text().splitlines()[0])["drafts"]


def test_a_second_diagnosis_asks_nothing_again(tmp_path: Path):
    with ScriptedServer() as server:
        first = diagnose("copies", server.url, tmp_path, "--prompts", "20")
        url = server.url
    again = diagnose("copies", url, tmp_path, "--prompts", "20")  # nobody listens any more
    assert (first.exit_code, again.exit_code) == (0, 0), again.output
    assert json.loads(again.stdout)["models"] == json.loads(first.stdout)["models"]


def test_an_endpoint_that_is_not_there_is_one_message_and_loses_nothing(tmp_path: Path):
    with ScriptedServer() as server:
        url = server.url
    absent = diagnose("copies", url, tmp_path, "--prompts", "3", "--max-retries", "1")
    assert absent.exit_code == 2
    assert "3 of 3 prompts have no answer" in absent.output
    assert "--skip-failed" in absent.output


def test_prompts_that_were_left_out_are_asked_for_without_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other answers stay as they are, and nobody is asked for them again."""
    asked = list[str]()

    def sometimes(model: str, messages: list[dict[str, str]], seed: int) -> str:
        asked.append(messages[0]["content"])
        if down and int(hashlib.sha256(asked[-1].encode()).hexdigest(), 16) % 3 == 0:
            raise ConnectionError
        return answer(model, messages, seed)

    monkeypatch.setattr("scripted_server.answer", sometimes)
    with ScriptedServer() as server:
        few = ("--prompts", "12", "--max-retries", "0")
        down = True
        first = diagnose("copies", server.url, tmp_path, *few, "--skip-failed")
        assert first.exit_code == 0, first.output
        answered = json.loads(first.stdout)["models"][0]["n"]
        assert 0 < answered < 12
        asked.clear()
        again = diagnose("copies", server.url, tmp_path, *few, "--skip-failed")
        assert json.loads(again.stdout)["models"] == json.loads(first.stdout)["models"]
        assert not asked
        refused = diagnose("copies", server.url, tmp_path, *few)
        assert refused.exit_code == 2, refused.output
        assert f"{12 - answered} of 12 prompts have no answer" in refused.output
        down = False
        asked.clear()
        whole = diagnose("copies", server.url, tmp_path, *few)
    assert whole.exit_code == 0, whole.output
    assert json.loads(whole.stdout)["models"][0]["n"] == 12
    assert len({*asked}) == 12 - answered


def test_an_endpoint_that_answers_nothing_is_no_result(tmp_path: Path):
    with ScriptedServer() as server:
        url = server.url
    for _ in range(2):
        absent = diagnose("copies", url, tmp_path, "--prompts", "3", "--max-retries", "0", "--skip-failed")
        assert absent.exit_code == 2
        assert "3 of 3 prompts have no answer" in absent.output


def test_a_wrong_setting_of_the_task_is_one_message(tmp_path: Path):
    wrong = diagnose("copies", "http://localhost:9/v1", tmp_path, "max_word=20")
    assert wrong.exit_code == 2
    assert "Did you mean 'max_words'?" in wrong.output
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_strategy_is_one_message(tmp_path: Path):
    wrong = diagnose("copies", "http://localhost:9/v1", tmp_path, "--strategy", "critic_refine")
    assert wrong.exit_code == 2
    assert "There is no 'critic_refine' among the strategies." in wrong.output
    assert "Did you mean 'critique_refine'?" in wrong.output
    assert list(tmp_path.iterdir()) == []
