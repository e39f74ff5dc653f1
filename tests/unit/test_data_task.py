"""A task of one's own data: verifiers by name, splits, and what is known by a digest."""

from __future__ import annotations

import math as arithmetic
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from task_files import needs_math_verify, texts, write

from upturn.errors import ConfigError, DataError
from upturn.tasks import data


def judged(folder: Path, verifier: str, reference: Any, answer: str) -> bool:
    path = write(folder / "test.jsonl", {"prompt": "Where?", "answer": reference})
    task = data.load(data.Config(data=str(path), verifier=verifier))
    return task.grade(task.prompts("test", 0, 1)[0], answer).right


class TestData:
    @pytest.mark.parametrize(
        ("verifier", "reference", "answer", "right"),
        [
            ("match", "Paris", " paris.\n", True),
            ("match", "Paris", "It is Paris.", False),
            ("contains", "Paris", "It is Paris.", True),
            ("contains", "Paris", "Parisian life", False),
            ("contains", "C++ (new)", "I like c++ (new), yes", True),
            ("number", 1000, "so $1,000.00.", True),
            ("number", "7", "8", False),
            pytest.param("math", "\\frac12", "\\boxed{0.5}", True, marks=needs_math_verify),
            ("python:operator.eq", "x", "x", None),
        ],
    )
    def test_a_verifier_by_name(self, tmp_path: Path, verifier: str, reference: Any, answer: str, right: bool):
        path = write(tmp_path / "test.jsonl", {"prompt": "Where?", "answer": reference})
        task = data.load(data.Config(data=str(path), verifier=verifier))
        [prompt] = task.prompts("test", 0, 5)
        if right is None:  # operator.eq takes two arguments, and is called with three
            with pytest.raises(DataError, match=rf"prompt {prompt.id}\n    It raised TypeError"):
                task.grade(prompt, answer)
        else:
            assert task.grade(prompt, answer).right == right

    @pytest.mark.parametrize(
        ("reference", "answer", "right"),
        [
            ("-5", "5", False),
            ("-5", "−5.", True),
            (".5", "5", False),
            (".5", "**.5**", True),
            ("√2", "2", False),
            ("C++", "C#", False),
            ("C++", "c++!", True),
            (">3", "<3", False),
            ("+", "", False),
            ("+", " `+` ", True),
            ("5%", "5", False),
            ("A*", "A", False),
            ("*", "", False),
            ("Paris", "``Paris,'' ", True),
            ("Paris", "«Paris»", True),
            ("Paris", "“**(Paris).**”", True),
            ("北京", "北京。", True),
            ("[0, 1]", "(0, 1)", False),
            ("(a) or (b)", "(A) or (b).", True),
            ("a) or (b", "(a) or (b)", False),
        ],
    )
    def test_match_forgives_case_quotes_brackets_and_end_marks_and_no_other_sign(
        self, tmp_path: Path, reference: str, answer: str, right: bool
    ):
        assert judged(tmp_path, "match", reference, answer) == right

    @pytest.mark.parametrize(
        ("reference", "answer", "right"),
        [
            ("-5", "It is 5 degrees", False),
            ("-5", "It is −5 degrees", True),
            ("-5", "3-5", False),
            ("5", "It is 5.7", False),
            ("5", "It is 4.5", False),
            ("5", "It is .5", False),
            ("1", "it is 1,000", False),
            ("000", "it is 1,000", False),
            ("5", "-5", False),
            ("5", "-$5", False),
            ("$5", "-$5", False),
            ("$5", "only $5.", True),
            ("4", "It is 3/4", False),
            ("3", "It is 3/4", False),
            ("30", "at 3:30", False),
            ("10", "It is 10^6", False),
            ("2", "It is √2", False),
            ("5", "5x", False),
            ("5", "It is 5.", True),
            ("5", "(5)", True),
            ("5", "5, I think", True),
            ("5", "x=5: done", True),
            ("5", "It costs $5 or 5%", True),
            ("1,000", "it is 1,000, yes", True),
            ("well-known", "a well-known dog", True),
            ("known", "a well-known dog", True),
            ("C", "I like C++", False),
            ("C", "I like C#", False),
            ("C", "I like C.", True),
        ],
    )
    def test_contains_sees_no_piece_of_a_number_or_a_word(
        self, tmp_path: Path, reference: str, answer: str, right: bool
    ):
        assert judged(tmp_path, "contains", reference, answer) == right

    @pytest.mark.parametrize(
        ("reference", "number"),
        [
            ("18 eggs", "18"),
            ("$1,000.00", "1000"),
            ("-7", "-7"),
            ("50%", "50"),
            ("18 eggs!", "18"),
            (0.00005, "0.00005"),
            (1e16, "10000000000000000"),
            (-2.5, "-2.5"),
            (7, "7"),
            ("9 * 2 = 18, so 18\n#### 18", "18"),
            ("9 * 2\n#### 6*7 = 42", "42"),
            ("2 steps. \\boxed{18 \\text{ eggs}}", "18"),
            ("\\boxed{6*7=42}", "42"),
            ("The answer is 18 (see step 2).", "18"),
            ("Of 3, the answer is 18 eggs for 7 days.", "18"),
            ("#### 18 ... 9*2=18", "18"),
        ],
    )
    def test_number_reads_the_one_number_of_the_reference(self, tmp_path: Path, reference: Any, number: str):
        assert judged(tmp_path, "number", reference, number)

    @pytest.mark.parametrize(
        "reference",
        [
            *("3/4", "2 1/2", "10^6", "1e6", "1 000 000", "3:30", "12 (see page 3)", "20-3", "1.000.000", "1,5"),
            *("√2", "2½", "10⁶", "x^2", "\\frac12", "2\\pi", "- 7", "6*7 = 42", "Paris", True),
            *("#### 3/4", "#### 1e6", "#### 1 000", "#### √2", "\\boxed{\\frac{3}{4}}", "The answer is 2 1/2."),
            *("The answer is \\frac12", "The answer is 3 * 2 = \\frac12"),
        ],
    )
    def test_a_reference_that_is_not_one_number_is_named(self, tmp_path: Path, reference: Any):
        good = {"prompt": "q", "answer": 1}
        path = write(tmp_path / "test.jsonl", good, {"prompt": "Where?", "answer": reference})
        with pytest.raises(DataError, match="not exactly one number") as caught:
            data.load(data.Config(data=str(path), verifier="number"))
        assert caught.value.where == f"{path}, line 2"

    @pytest.mark.parametrize("sign", ["*", ".", '"', "(", " ", "-"])
    def test_long_nonsense_is_compared_at_once(self, sign: str):
        start = time.perf_counter()
        assert data.plain(f"x{sign * 20_000}x" + sign * 20_000)
        data.plain(sign * 20_000)
        assert time.perf_counter() - start < 2  # some milliseconds

    @pytest.mark.parametrize("verifier", ["match", "contains"])
    def test_a_reference_of_nothing_but_end_marks_is_named(self, tmp_path: Path, verifier: str):
        path = write(tmp_path / "test.jsonl", {"prompt": "q", "answer": "**...**"})
        with pytest.raises(DataError, match="line 1\n    There is no answer in 'answer'"):
            data.load(data.Config(data=str(path), verifier=verifier))

    def test_a_verifier_of_ones_own_sees_prompt_answer_and_reference(self, tmp_path: Path, own: ModuleType):
        own.judge = lambda prompt, answer, reference: 0.5 if answer == reference + prompt else 1  # pyright: ignore
        path = write(tmp_path / "test.jsonl", {"prompt": "q", "answer": "r"})
        task = data.load(data.Config(data=str(path), verifier="python:own_verifier.judge"))
        [prompt] = task.prompts("test", 0, 1)
        half, full = task.grade(prompt, "rq"), task.grade(prompt, "other")
        assert (half.value, half.right, full.value, full.right) == (0.5, False, 1.0, True)

    @pytest.mark.parametrize(("value", "what"), [(2, "gave 2.0"), (arithmetic.nan, "gave nan"), ("x", "ValueError")])
    def test_an_odd_value_of_ones_own_verifier_is_named(self, tmp_path: Path, own: ModuleType, value: Any, what: str):
        own.judge = lambda *_: value  # pyright: ignore
        path = write(tmp_path / "test.jsonl", {"prompt": "q", "answer": "r"})
        task = data.load(data.Config(data=str(path), verifier="python:own_verifier.judge"))
        with pytest.raises(DataError, match=what):
            task.grade(task.prompts("test", 0, 1)[0], "a")

    def test_a_verifier_that_cannot_be_imported_is_a_config_error(self, tmp_path: Path):
        path = write(tmp_path / "test.jsonl", {"prompt": "q", "answer": "r"})
        with pytest.raises(ConfigError, match="cannot be imported"):
            data.load(data.Config(data=str(path), verifier="python:nowhere_at_all.judge"))

    def test_an_unknown_verifier_is_refused(self):
        with pytest.raises(ValueError, match="verifier"):
            data.Config(data="x", verifier="exactly")

    def test_without_a_verifier_no_answer_is_read_and_scores_are_nan(self, tmp_path: Path):
        path = write(tmp_path / "test.jsonl", {"prompt": "Tell me."})
        task = data.load(data.Config(data=str(path), verifier="none"))
        score = task.grade(task.prompts("test", 0, 1)[0], "Well.")
        assert arithmetic.isnan(score.value)
        assert not score.right

    def test_one_file_is_split_by_hash_and_rows_added_later_move_nothing(self, tmp_path: Path):
        rows = [{"prompt": f"q{i}", "answer": "a"} for i in range(500)]
        path = write(tmp_path / "some.jsonl", *rows)
        config = data.Config(data=str(path), test_share=0.2)
        train, test = texts(data.load(config), "train"), texts(data.load(config), "test")
        assert len(train) + len(test) == 500
        assert 70 < len(test) < 130
        write(path, {"prompt": "new", "answer": "a"}, *rows)
        assert set(test) <= set(texts(data.load(config), "test"))

    def test_neither_an_instruction_nor_white_space_moves_a_prompt_to_the_other_split(self, tmp_path: Path):
        rows = [{"prompt": f"q{i}", "answer": "a"} for i in range(200)]
        plain = data.load(data.Config(data=str(write(tmp_path / "a.jsonl", *rows))))
        padded = [{"prompt": f" q{i}\n", "answer": "a"} for i in range(200)]
        path = write(tmp_path / "b.jsonl", *padded)
        other = data.load(data.Config(data=str(path), instruction="Be brief."))
        assert [f" {text}\n\n\nBe brief." for text in texts(plain, "test")] == texts(other, "test")
        assert 5 < len(texts(plain, "test")) < 40

    def test_the_split_is_chosen_by_the_hash_of_the_prompt(self, tmp_path: Path):
        # sha256 of q0 to q9 begins with 34 c7 be 58 11 26 77 0b d9 56, and below 0.1 * 256 = 25.6 are 11 and 0b
        path = write(tmp_path / "a.jsonl", *({"prompt": f"q{i}", "answer": "a"} for i in range(10)))
        assert texts(data.load(data.Config(data=str(path))), "test") == ["q4", "q7"]

    def test_prompts_that_differ_in_outer_white_space_are_one(self, tmp_path: Path):
        write(tmp_path / "train.jsonl", *({"prompt": text, "answer": "a"} for text in ("x ", "y", " y")))
        write(tmp_path / "test.jsonl", {"prompt": "x", "answer": "a"})
        task = data.load(data.Config(data=str(tmp_path)))
        assert (texts(task, "train"), texts(task, "test")) == (["y"], ["x"])

    def test_a_prompt_of_both_parts_stays_in_the_test_split_only(self, tmp_path: Path):
        rows = [{"prompt": text, "answer": "a"} for text in ("x", "y", "x")]
        write(tmp_path / "train.jsonl", *rows)
        write(tmp_path / "test.jsonl", {"prompt": "x", "answer": "a"})
        task = data.load(data.Config(data=str(tmp_path)))
        assert (texts(task, "train"), texts(task, "test")) == (["y"], ["x"])

    def test_test_data_is_the_test_split(self, tmp_path: Path):
        train = write(tmp_path / "a.jsonl", *({"prompt": f"q{i}", "answer": "a"} for i in range(100)))
        test = write(tmp_path / "b.jsonl", *({"prompt": f"q{i}", "answer": "a"} for i in range(90, 120)))
        task = data.load(data.Config(data=str(train), test_data=str(test)))
        assert sorted(texts(task, "test")) == sorted(f"q{i}" for i in range(90, 120))
        assert sorted(texts(task, "train")) == sorted(f"q{i}" for i in range(90))

    def test_places_follow_the_file_and_end_with_it(self, tmp_path: Path):
        path = write(tmp_path / "test.jsonl", *({"prompt": f"q{i}", "answer": "a"} for i in range(10)))
        task = data.load(data.Config(data=str(path)))
        assert [prompt.text for prompt in task.prompts("test", 8, 5)] == ["q8", "q9"]
        assert len({prompt.id for prompt in task.prompts("test", 0, 10)}) == 10


class TestKey:
    """What judges has a digest, so that stored judgements are used again only where they would come out the same."""

    rows = [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "2"}]  # noqa: RUF012

    def key(self, path: Path, **values: Any) -> str:
        return data.load(data.Config(data=str(path), **values)).key  # pyright: ignore[reportAttributeAccessIssue]

    def test_it_is_of_the_references_and_not_of_the_place(self, tmp_path: Path):
        first = self.key(write(tmp_path / "a" / "train.jsonl", *self.rows))
        assert first
        assert self.key(write(tmp_path / "b" / "other.jsonl", *reversed(self.rows))) == first
        assert self.key(write(tmp_path / "c.jsonl", self.rows[0], {"prompt": "q", "answer": "3"})) != first
        assert self.key(write(tmp_path / "d.jsonl", self.rows[0], {"prompt": "r", "answer": "2"})) != first

    def test_the_source_of_a_verifier_of_ones_own_is_in_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def key(folder: str, source: str) -> str:
            module = tmp_path / folder / "some_verifier.py"
            module.parent.mkdir()
            module.write_text(source)
            with monkeypatch.context() as patch:
                patch.syspath_prepend(module.parent)
                patch.delitem(sys.modules, "some_verifier", raising=False)
                return self.key(path, verifier="python:some_verifier.judge")

        path = write(tmp_path / "a.jsonl", *self.rows)
        one = key("1", "def judge(*_):\n    return 1\n")
        assert one != self.key(path)
        assert key("2", "def judge(*_):\n    return 1\n") == one
        assert key("3", "def judge(*_):\n    return 0\n") != one

    def test_a_verifier_without_source_adds_nothing(self, tmp_path: Path, own: ModuleType):
        own.judge = lambda *_: 1  # pyright: ignore
        path = write(tmp_path / "a.jsonl", *self.rows)
        assert self.key(path, verifier="python:own_verifier.judge") == self.key(path)
        assert self.key(path, verifier="python:math.hypot") == self.key(path)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the user's own."""
    module = ModuleType("own_verifier")
    monkeypatch.setitem(sys.modules, "own_verifier", module)
    return module
