"""The verifiers of tasks that come with upturn, worked by hand, and the reading of their data."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_files import needs_math_verify, write

from upturn.errors import DataError
from upturn.tasks import gsm8k, keywords, math
from upturn.tasks._words import WORDS
from upturn.types import Prompt

DATA = Path(os.environ.get("UPTURN_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
GSM8K, MATH500 = DATA / "gsm8k", DATA / "math500"
needs_gsm8k = pytest.mark.skipif(not GSM8K.exists(), reason="no gsm8k folder; set UPTURN_DATA to the data folder")
needs_math500 = pytest.mark.skipif(not MATH500.exists(), reason="no math500 folder; set UPTURN_DATA to the data folder")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
            ("The answer is 6 * 7 = 42.", "42"),
            ("**Answer:** 6 eggs * 7 = $42 eggs. Of them 2 = 1 + 1 broke.", "42"),
            ("The answer is 6 * (3 + 4) = 42", "42"),
            ("The answer is 42 (where x = 2)", "42"),
            ("The answer is 5! = 120.", "120"),
            ("The answer is 42 = 6*7", "42"),
            ("The answer is 6 * 7 = 42 = 6 \\times 7", "42"),
            ("The answer is 2 - 7 = -5, no, the answer is 2 - 8 = -6", "-6"),
            ("The answer is 42 = x. Then 5", "42"),
            ("The answer is: the answer 5", "5"),
            ("######## 5", "5"),
            ("#### 6*7 = 42", "42"),
            ("#### 18 (see step 2)", "18"),
            ("The answer is 18 eggs for 7 days", "18"),
            ("\\boxed{6*7=42}", "42"),
            ("The answer is $\\boxed 5$ of 7", "5"),
            ("none at all", ""),
            ("", ""),
        ],
    )
    def test_the_last_stated_number_is_isolated_and_normalised(self, text: str, number: str):
        assert gsm8k.stated_number(text) == number

    @pytest.mark.parametrize(
        "text", ["Answer: 1 " + "=" * 20_000, "Answer: 1" + "=1" * 10_000, "Answer: 1 " * 2000, "#" * 20_000]
    )
    def test_a_model_that_repeats_itself_is_read_at_once(self, text: str):
        start = time.perf_counter()
        gsm8k.stated_number(text)
        assert time.perf_counter() - start < 1  # some hundredths; reading on from each marker takes many seconds

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

    def test_the_key_is_of_the_numbers(self, tmp_path: Path):
        def key(name: str, answer: str) -> str:
            write(tmp_path / name / "test.jsonl", {"question": "1 + 1?", "answer": answer})
            return gsm8k.load(gsm8k.Config(data=str(tmp_path / name))).key  # pyright: ignore[reportAttributeAccessIssue]

        assert key("a", "so 2\n#### 2") == key("b", "thus 2.0\n#### 2.0") != key("c", "so 2\n#### 3")


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
            ("-5", "The answer is −5.", True),
            ("5", "The answer is −5.", False),
            ("−5", "\\boxed{-5}", True),
            ("120", "The answer is 5! = 120.", True),
            ("5", "The answer is 5! = 120.", False),
            ("7", "The answer is 7! Well done! 8", True),
            ("5", "So it is $\\boxed 5$.", True),
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
            ("\\boxed 5", "5"),
            ("$\\boxed -5.$", "-5"),
            ("\\(\\boxed 12\\).", "12"),
            ("\\boxed{1}, so \\boxed \\frac{1}{2}, yes", "\\frac{1}{2}"),
            ("\\boxed{1} stands in \\boxed as asked, in \\boxed.", "1"),
            ("none", ""),
        ],
    )
    def test_the_last_box_with_balanced_braces(self, text: str, inside: str):
        assert math.last_boxed(text) == inside

    def test_the_key_is_of_the_references(self, tmp_path: Path):
        def key(name: str, answer: str) -> str:
            write(tmp_path / name / "test.jsonl", {"problem": "1 + 1?", "answer": answer})
            return math.load(math.Config(data=str(tmp_path / name))).key  # pyright: ignore[reportAttributeAccessIssue]

        assert key("a", "2") == key("b", "2") != key("c", "3")

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
