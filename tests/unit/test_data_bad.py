"""Data that cannot be used, from files and from the hub: what is said of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from task_files import texts, write

from upturn.errors import DataError
from upturn.tasks import data
from upturn.types import Prompt


class TestBadData:
    good: dict[str, str] = {"prompt": "q", "answer": "a"}  # noqa: RUF012

    def error(self, path: Path, **values: Any) -> DataError:
        with pytest.raises(DataError) as caught:
            data.load(data.Config(data=str(path), **values)).prompts("train", 0, 1)
        return caught.value

    @pytest.mark.parametrize(
        ("bad", "what"),
        [
            ("{broken", "This is not JSON"),
            ("[1]", "not a JSON object"),
            ({"promt": "q", "answer": "a"}, "'prompt' is missing; there is: promt."),
            ({"prompt": "q"}, "'answer' is missing"),
            ({"prompt": "  ", "answer": "a"}, "The prompt in 'prompt' is empty."),
            ({"prompt": "q", "answer": " "}, "There is no answer in 'answer'."),
            ({"prompt": ["q"], "answer": "a"}, "The field 'prompt' is not text."),
        ],
    )
    def test_the_first_bad_line_is_named_and_all_are_counted(self, tmp_path: Path, bad: Any, what: str):
        path = write(tmp_path / "train.jsonl", self.good, "", bad, self.good, "{")
        error = self.error(path)
        assert error.where == f"{path}, line 3"
        assert what in error.what
        assert "2 of 4 records have problems" in error.what

    def test_bytes_that_are_no_text(self, tmp_path: Path):
        path = tmp_path / "train.jsonl"
        path.write_bytes(b'{"prompt": "\xff"}\n')
        assert self.error(path).where.endswith("line 1")

    def test_an_empty_file(self, tmp_path: Path):
        assert "not one record" in self.error(write(tmp_path / "some.jsonl", "", " ")).what

    def test_a_missing_file_names_the_nearest(self, tmp_path: Path):
        write(tmp_path / "squad" / "train.jsonl", self.good)
        assert f"Did you mean '{tmp_path / 'squad'}'?" in self.error(tmp_path / "squat" / "train.jsonl").mend
        assert "train.jsonl'?" in self.error(tmp_path / "squad" / "trian.jsonl").mend

    def test_a_folder_without_data(self, tmp_path: Path):
        write(tmp_path / "train.json", self.good)
        error = self.error(tmp_path)
        assert "neither train.jsonl nor test.jsonl" in error.what
        assert "train.json'?" in error.mend

    def test_a_missing_part(self, tmp_path: Path):
        assert "no train part" in self.error(write(tmp_path / "test.jsonl", self.good)).what

    def test_a_prompt_from_other_data_has_no_reference(self, tmp_path: Path):
        task = data.load(data.Config(data=str(write(tmp_path / "test.jsonl", self.good))))
        with pytest.raises(DataError, match="not in the data"):
            task.grade(Prompt("elsewhere", "?"), "a")


class TestHub:
    """The hub's library is a door to the network, so it is stood in for."""

    def give(self, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
        def load_dataset(name: str, subset: str | None) -> Any:
            if isinstance(answer, Exception):
                raise answer
            assert (name, subset) == ("some/data", None)
            return answer

        exceptions = ModuleType("datasets.exceptions")
        exceptions.DatasetsError = type("DatasetsError", (Exception,), {})  # pyright: ignore
        library = SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions)
        monkeypatch.setitem(sys.modules, "datasets", library)
        monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)

    def test_its_train_and_test_splits_are_read(self, monkeypatch: pytest.MonkeyPatch):
        rows = [{"prompt": f"q{i}", "answer": "a"} for i in range(5)]
        self.give(monkeypatch, {"train": rows[:3], "test": rows[3:], "other": []})
        task = data.load(data.Config(data="some/data"))
        assert (texts(task, "train"), texts(task, "test")) == (["q0", "q1", "q2"], ["q3", "q4"])

    def test_a_bad_row_is_named(self, monkeypatch: pytest.MonkeyPatch):
        self.give(monkeypatch, {"train": [{"prompt": "q", "answer": "a"}, {"prompt": "", "answer": "a"}]})
        with pytest.raises(DataError, match="some/data, train row 2"):
            data.load(data.Config(data="some/data"))

    def test_other_splits_are_named(self, monkeypatch: pytest.MonkeyPatch):
        self.give(monkeypatch, {"dev": []})
        with pytest.raises(DataError, match="only the splits dev"):
            data.load(data.Config(data="some/data"))

    def test_an_unreachable_hub_is_a_data_error(self, monkeypatch: pytest.MonkeyPatch):
        self.give(monkeypatch, ConnectionError("no route"))
        with pytest.raises(DataError, match="Check the name and the network"):
            data.load(data.Config(data="some/data"))

    def test_a_missing_library_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DataError, match=r"pip install 'upturn\[hub\]'"):
            data.load(data.Config(data="some/data"))
