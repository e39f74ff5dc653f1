"""What the documents show works: examples run, configs load, links lead somewhere."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from upturn import registry
from upturn.objectives._base import Batch, Row
from upturn.types import Attempt, Draft, Prompt, Score

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + [*(ROOT / "docs").glob("*.md")]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def example(room: str, folder: Path, number: int = 0) -> ModuleType:
    """An example of one room in docs/adding.md, imported as if it lay in the room's folder."""
    text = (ROOT / "docs" / "adding.md").read_text()
    section = next(part for part in text.split("\n## ") if f"`{room}/NAME.py`" in part.split("\n")[0])
    found = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    path = folder / f"example_{room}_{number}.py"
    path.write_text(found[number])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def draft(index: int, text: str, parents: tuple[int, ...] = ()) -> Draft:
    return Draft(index, index + 1, parents, text, (5, 2), (0.0, 0.0), "stop", 3, 0)


def test_there_is_one_example_for_every_room():
    text = (ROOT / "docs" / "adding.md").read_text()
    assert [room for room in registry.ROOMS if f"`{room}/NAME.py`" not in text] == []


def test_the_strategy_shows_first_and_last(tmp_path: Path):
    module = example("strategies", tmp_path)
    seen: list[list[int]] = []

    async def sample(prompt: Prompt, shown: Sequence[Draft]) -> Draft:
        seen.append([one.index for one in shown])
        return draft(len(seen) - 1, "text")

    asyncio.run(module.generate(Prompt("p", "q"), sample, module.Config(turns=4)))
    assert seen == [[], [0], [0, 1], [0, 2]]


def test_the_objective_is_a_hinge(tmp_path: Path):
    module = example("objectives", tmp_path)
    rows: dict[Row, torch.Tensor] = {
        ("direct", "chosen"): torch.tensor([0]),
        ("direct", "rejected"): torch.tensor([1]),
    }
    owner, tokens = torch.tensor([0, 0, 1]), torch.tensor([2, 1])
    batch = Batch(owner, tokens, rows, torch.ones(1), reference_S=torch.tensor([-5.0, -3.0]))
    # gains: chosen -3 + 5 = 2, rejected -4 + 3 = -1; margin 3; 1 - 0.1 * 3 = 0.7
    found = module.loss(torch.tensor([-1.0, -2.0, -4.0]), batch, module.Config())
    assert float(found.total) == pytest.approx(0.7)
    assert found.weight == 1


def test_the_task_the_scorer_and_the_selection_work_together(tmp_path: Path):
    task = (module := example("tasks", tmp_path)).load(module.Config())
    prompt = task.prompts("test", 0, 1)[0]
    word = prompt.text.split()[-1][::-1]
    assert task.prompts("test", 0, 3)[1:] == task.prompts("test", 1, 2)
    attempt = Attempt(prompt, (draft(0, "wrong"), draft(1, word, (0,)), draft(2, word, (1,))))
    scorer = (module := example("scorers", tmp_path)).load(module.Config())
    scored = scorer.score(task, [attempt])
    assert scored[0].scores[1] == Score(0.999, True, "")
    selection = example("selection", tmp_path)
    chosen = selection.select(scored, selection.Config())
    assert [(pair.chosen.index, pair.rejected.index) for pair in chosen.pairs] == [(1, 0)]


def test_the_rule_for_groups_weighs_complete_drafts(tmp_path: Path):
    module = example("selection", tmp_path, number=1)
    whole = draft(0, "a")
    attempt = Attempt(Prompt("p", "q"), (whole, replace(draft(1, "b"), finish_reason="length"), draft(2, "c")))
    scores = (Score(0.5, False), Score(1.0, True), Score(0.0, False))
    assert module.select([replace(attempt, scores=scores)], module.Config()).examples[0].values == (0.5, None, None)
    nothing = module.select([replace(attempt, scores=scores[2:] * 3)], module.Config())
    assert (nothing.examples, nothing.dropped) == ([], {"worthless": 1})


def test_the_recipe_takes_its_config(tmp_path: Path):
    module = example("recipes", tmp_path)
    data = yaml.safe_load(blocks("docs/adding.md", "yaml")[0])
    assert data.pop("recipe") == "weighted"
    cfg = module.Config.model_validate(data)
    assert (cfg.iterations, cfg.samples, cfg.scorer.name) == (2, 8, "exact")


def test_the_config_of_the_readme_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from upturn import config

    monkeypatch.chdir(tmp_path)
    lines = (json.dumps({"prompt": f"What is {i} plus 2?", "answer": str(i + 2)}) for i in range(20))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "mine.yaml").write_text(blocks("README.md", "yaml")[0])
    name, _, cfg = config.load("mine.yaml")
    assert name == "mine"
    assert cfg.model_dump()["iterations"] == 2


def test_python_of_the_readme_runs(tiny_model: Path, capsys: pytest.CaptureFixture[str]):
    [block] = blocks("README.md", "python")
    smaller = {"smollm2-135m": str(tiny_model), "0, 100": "0, 3", "max_new_tokens=48": "max_new_tokens=4"}
    for whole, small in smaller.items():
        assert whole in block
        block = block.replace(whole, small)
    exec(block, {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:4]] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path):
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []
