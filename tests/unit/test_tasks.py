"""The tasks' verifiers, worked by hand, and the reading of their data."""

from __future__ import annotations

import importlib.util
import json
import math as arithmetic
import os
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upturn.errors import ConfigError, DataError
from upturn.tasks import data, gsm8k, keywords, math
from upturn.tasks._base import Task
from upturn.tasks._words import WORDS
from upturn.types import Prompt

DATA = Path(os.environ.get("UPTURN_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
GSM8K, MATH500 = DATA / "gsm8k", DATA / "math500"
needs_gsm8k = pytest.mark.skipif(not GSM8K.exists(), reason="no gsm8k folder; set UPTURN_DATA to the data folder")
needs_math500 = pytest.mark.skipif(not MATH500.exists(), reason="no math500 folder; set UPTURN_DATA to the data folder")
needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="the extra 'math' is not installed"
)


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(task: Task, split: Any) -> list[str]:
    return [prompt.text for prompt in task.prompts(split, 0, 10**6)]


class TestKeywords:
    prompt = Prompt("p", 'Write one sentence of at most 15 words that uses the words "dog", "run" and "blue".')
    task = keywords.load(keywords.Config())

    @pytest.mark.parametrize(
        "answer",
        [
            "The dog can run by the blue sea.",
            "  The dog can run by the BLUE sea!\n",
            '"The dog can run by the blue sea."',
            "**The blue dog can run.**",
            "The blue dog can run...",
            '"Run!" said the blue dog.',
            'The "blue dog" can run.',
            "The dogs' dog can't run the boys' blue mile.",
            "Mr. Dog can run 3.5 blue miles.",
            "One two three four five six seven eight nine ten eleven twelve blue dog run.",
        ],
    )
    def test_a_right_sentence_is_worth_one(self, answer: str):
        score = self.task.grade(self.prompt, answer)
        assert (score.value, score.right, score.note) == (1.0, True, "")

    @pytest.mark.parametrize(
        ("answer", "value", "note"),
        [
            ("", 0, "empty"),
            ("...", 0, "empty"),
            ("The blue dog sleeps.", 2 / 3, "missing: run"),
            ("The blue dog runs.", 2 / 3, "missing: run"),
            ('The word "dog" can run blue.', 2 / 3, "missing: dog"),
            ("My sentence has “blue,” 'run' and a dog.", 1 / 3, "missing: run, blue"),
            ("A dog's blue run.", 2 / 3, "missing: dog"),
            ("The bluedog can run.", 1 / 3, "missing: dog, blue"),
            ("The dog can run by the blue sea", 1 / 2, "no end mark"),
            ("Dog run blue.", 1 / 2, "only a list"),
            ("The dog ran. It is a blue run.", 1 / 2, "2 sentences"),
            ("the dog can run. he is blue.", 1 / 2, "2 sentences"),
            ("The dog can run.The sea is blue.", 1 / 2, "2 sentences"),
            ("The dog can run\nby the blue sea.", 1 / 2, "2 sentences"),
            ('"Run!" The blue dog left.', 1 / 2, "2 sentences"),
            # 14 + 5 words: 3/3 used, 15/19 for the length
            (
                "The dog and the dog and the dog and the dog and the dog can run by blue seas.",
                15 / 19,
                "19 words",
            ),
            # 2/3 used, 2 sentences, no end mark: 2/3 * 1/2 * 1/2
            ("The dog. It is blue", 1 / 6, "missing: run; 2 sentences; no end mark"),
        ],
    )
    def test_partial_credit_is_the_product_of_the_faults(self, answer: str, value: float, note: str):
        score = self.task.grade(self.prompt, answer)
        assert score.value == pytest.approx(value)
        assert (score.right, score.note) == (False, note)

    @pytest.mark.parametrize(
        ("answer", "critique"),
        [
            ("The blue dog can run.", "Words: dog yes, run yes, blue yes. No changes needed."),
            ("The blue dog sleeps.", "Words: dog yes, run no, blue yes. So add run."),
            ("It is. It sleeps", "Words: dog no, run no, blue no. So add dog and run and blue; make it one sentence; "
             "end it with a full stop."),
            ("Dog run blue.", "Words: dog yes, run yes, blue yes. So make it a sentence."),
            ("The blue dog can run " + "so " * 12 + "far.", "Words: dog yes, run yes, blue yes. So make it shorter."),
            ("", "It is empty. So write a sentence."),
        ],
    )  # fmt: skip
    def test_the_critique_goes_through_the_words_and_says_what_to_do(self, answer: str, critique: str):
        assert self.task.grade(self.prompt, answer).critique == critique

    def test_a_prompt_names_the_words_and_the_limit(self):
        [prompt] = keywords.load(keywords.Config(num_words=1, max_words=9)).prompts("train", 0, 1)
        assert prompt.text.startswith('Write one sentence of at most 9 words that uses the word "')

    def test_reordering_the_words_does_not_move_a_prompt_to_the_other_split(self):
        sets = {
            split: {frozenset(p.text.split('"')[1::2]) for p in self.task.prompts(split, 0, 2000)}
            for split in ("train", "test")
        }
        assert not sets["train"] & sets["test"]

    def test_the_words_are_many_and_differ(self):
        assert len(set(WORDS)) == len(WORDS) >= 200
        assert all(word.isalpha() and word.islower() for word in WORDS)

    def test_a_limit_that_no_sentence_can_keep_is_refused(self):
        with pytest.raises(ValueError, match="max_words must be greater"):
            keywords.Config(num_words=3, max_words=3)


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("9 * 2 = 18\n#### 18", "18"),
            ("#### 18 ... Let me double check: 9*2=19", "18"),
            ("#### 5\nNo, wrong.\n#### $1,018.50.", "1018.5"),
            ("#### Step 2\nso \\boxed{18}", "18"),
            ("\\boxed{3} and then \\boxed{18 \\text{ eggs}}. I took 2 steps.", "18"),
            ("The answer is 18 (see step 2).", "18"),
            ("**Answer:** 18 eggs for 7 days", "18"),
            ("She makes $18.00.", "18"),
            ("so 18...", "18"),
            ("1{,}000", "1000"),
            ("\\$1,200.50", "1200.5"),
            ("50%", "50"),
            ("it is $-5", "-5"),
            ("it is −5", "-5"),
            ("20-3", "3"),
            ("-.50", "-0.5"),
            ("-0", "0"),
            ("007", "7"),
            ("3, 4..", "4"),
            ("1" * 60, "1" * 60),
            ("none at all", ""),
            ("", ""),
        ],
    )
    def test_the_last_stated_number_is_isolated_and_normalised(self, text: str, number: str):
        assert gsm8k.stated_number(text) == number

    def test_no_number_is_wrong_and_says_so(self):
        score = gsm8k.grade("I do not know.", "#### 4")
        assert (score.value, score.right, score.note) == (0.0, False, "no number stated")

    @given(st.text(max_size=60))
    def test_no_text_raises(self, text: str):
        assert gsm8k.stated_number(gsm8k.stated_number(text)) == gsm8k.stated_number(text)

    @needs_gsm8k
    def test_all_1319_labels_of_the_released_solutions_agree(self):
        rows = read(GSM8K / "solutions_6b_verification.jsonl")
        wrong = [r for r in rows if gsm8k.grade(r["solution"], r["ground_truth"]).right != r["is_correct"]]
        assert (len(rows), wrong) == (1319, [])

    @needs_gsm8k
    def test_every_reference_solution_of_the_real_data_is_right(self):
        task = gsm8k.load(gsm8k.Config(data=str(GSM8K)))
        rows = read(GSM8K / "test.jsonl")
        prompts = task.prompts("test", 0, 2000)
        assert (len(prompts), len(task.prompts("train", 0, 10_000))) == (1319, 7473)
        assert all(task.grade(p, row["answer"]).right for p, row in zip(prompts, rows, strict=True))

    def test_the_instruction_stands_below_the_question(self, tmp_path: Path):
        write(tmp_path / "test.jsonl", {"question": "1 + 1?", "answer": "so 2\n#### 2"})
        task = gsm8k.load(gsm8k.Config(data=str(tmp_path), instruction="Be quick."))
        [prompt] = task.prompts("test", 0, 5)
        assert prompt.text == "1 + 1?\n\nBe quick."
        assert task.grade(prompt, "The answer is 2.00.").right
        assert task.vote_key(prompt, "The answer is 2.00.") == "2"


@needs_math_verify
class TestMath:
    @pytest.mark.parametrize(
        ("reference", "answer", "right"),
        [
            ("6", "Simplify $2\\cdot3$", False),
            ("6", "", False),
            ("5", "\\boxed{", False),
            ("5", "\\boxed{}", False),
            ("7", "Previous answer: \\boxed{5}. The answer is \\boxed{7}.", True),
            ("5", "Previous answer: \\boxed{5}. The answer is \\boxed{7}.", False),
            ("18", "Answer: 18 dollars per day for 7 days", True),
            ("1000", "The answer is 1,000.", True),
            ("\\frac{1}{2}", "The answer is $\\frac12$.", True),
            ("\\frac{1}{3}", "\\boxed{0.3333}", False),
            ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", True),
            ("90^\\circ", "\\boxed{90}", True),
            ("x=3", "\\boxed{3}", True),
            ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", True),
        ],
    )
    def test_pitfalls(self, reference: str, answer: str, right: bool):
        score = math.grade(answer, reference)
        assert (score.right, score.value) == (right, float(right))

    @pytest.mark.parametrize(
        ("text", "inside"),
        [
            ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
            ("\\boxed{1} \\fbox {2}", "2"),
            ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
            ("\\boxed{5} then \\boxed{7", "5"),
            ("none", ""),
        ],
    )
    def test_the_last_box_with_balanced_braces(self, text: str, inside: str):
        assert math.last_boxed(text) == inside

    def test_equal_formulas_have_one_key(self):
        assert math.key("\\boxed{\\frac{2}{4}}") == math.key("The answer is $\\frac{1}{2}$.") != ""
        assert math.key("Simplify $2$") == ""

    def test_judging_works_outside_the_main_thread(self):
        verdicts: list[bool] = []
        thread = threading.Thread(target=lambda: verdicts.append(math.grade("\\boxed{\\sqrt{4}}", "2").right))
        thread.start()
        thread.join()
        assert verdicts == [True]

    @settings(deadline=None, max_examples=30)
    @given(st.text("0123456789+-*/^_{}\\$,.= abcx", max_size=20))
    def test_no_formula_raises(self, text: str):
        assert math.grade(f"\\boxed{{{text}}}", "7").value in (0, 1)
        assert isinstance(math.key(f"The answer is {text}"), str)

    @needs_math500
    def test_the_real_data_is_right_by_its_own_solutions(self):
        rows = read(MATH500 / "test.jsonl")
        task = math.load(math.Config(data=str(MATH500)))
        prompts = task.prompts("test", 0, 1000)
        assert len(prompts) == 500
        assert all(task.grade(p, row["solution"]).right for p, row in zip(prompts, rows, strict=True))


def test_a_missing_math_verify_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(DataError, match=r"pip install 'upturn\[math\]'"):
        math.load(math.Config(data="anywhere"))


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


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the user's own."""
    module = ModuleType("own_verifier")
    monkeypatch.setitem(sys.modules, "own_verifier", module)
    return module


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
