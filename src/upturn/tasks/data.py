"""Any JSONL file or hub data set, with a verifier chosen by name.

Verifiers, from strict to lenient; texts are compared in lower case, without outer punctuation:
    match       the whole answer is the reference
    number      the last stated number equals the reference (as in gsm8k)
    math        the last stated formula equals the reference (as in math; needs the extra `math`)
    contains    the reference stands in the answer, as whole words
    none        there is no verifier: scores are NaN, and a reward model has to judge
    python:package.module.function
                your own, called as f(prompt, answer, reference) -> bool or number in [0, 1]; 1 is right
"""

from __future__ import annotations

import importlib
import math as arithmetic
import re
from collections.abc import Callable

from pydantic import Field

from upturn._model import Strict
from upturn.errors import ConfigError, DataError
from upturn.tasks import gsm8k, math
from upturn.tasks._base import Split, Task
from upturn.tasks._files import TEST_SHARE, Columns, Table
from upturn.types import Prompt, Score

Judge = Callable[[Prompt, str, str], Score]
"""Prompt, answer, reference -> score."""

_EDGES = re.compile(r"^[\W_]+|[\W_]+$")


class Config(Strict):
    """Where the prompts are, and how answers are judged."""

    data: str
    """A folder with train.jsonl and test.jsonl, one JSONL file, or a hub data set."""
    test_data: str | None = None
    """All of it is the test split, and all of `data` the train split."""
    test_share: float = Field(default=TEST_SHARE, gt=0, lt=1)
    """Share of the prompts, chosen by their hash, that is the test split where the data has no test part."""
    subset: str | None = None
    """The hub data set's configuration."""
    prompt_column: str = "prompt"
    """The field with the prompt."""
    answer_column: str = "answer"
    """The field with the reference answer; not read with the verifier `none`."""
    verifier: str = Field(default="match", pattern=r"^(match|number|math|contains|none|python:(\w+\.)+\w+)$")
    """How an answer is judged: match, number, math, contains, none, or python:package.module.function."""
    instruction: str = ""
    """Stands below each prompt."""
    refine_request: str = "Check your answer. Write an improved answer only."
    """What the user says after a draft."""
    max_new_tokens: int = Field(default=256, ge=1)
    """A length that fits nearly every good answer."""


def load(cfg: Config) -> Task:
    """Read the data and find the verifier; a `DataError` or `ConfigError` says what is wrong with them."""
    return Data(cfg)


class Data:
    """Prompts of a file with a named verifier."""

    def __init__(self, cfg: Config) -> None:
        self.refine_request = cfg.refine_request
        self.max_new_tokens = cfg.max_new_tokens
        self._judge = _judge(cfg.verifier)
        self._key = {"number": gsm8k.stated_number, "math": math.key}.get(cfg.verifier, plain)
        answer_column = None if cfg.verifier == "none" else cfg.answer_column
        gold = gsm8k.stated_number if cfg.verifier == "number" else str.strip
        columns = Columns(cfg.prompt_column, answer_column, cfg.instruction, gold)
        self._table = Table(cfg.data, columns, cfg.test_share, cfg.subset)
        if cfg.test_data is not None:
            self._table.use_test(Table(cfg.test_data, columns, cfg.test_share, cfg.subset))

    def prompts(self, split: Split, start: int, count: int) -> list[Prompt]:
        """`count` prompts from place `start`; fewer at the end of the data."""
        return self._table.prompts(split, start, count)

    def grade(self, prompt: Prompt, answer: str) -> Score:
        """The verifier's judgement. Only a verifier of your own can fail, with a `DataError`."""
        return self._judge(prompt, answer, self._table.reference(prompt))

    def vote_key(self, prompt: Prompt, answer: str) -> str:
        """The stated number or formula with these verifiers, else the whole text in lower case."""
        return self._key(answer)


def plain(text: str) -> str:
    """The text in lower case, with single spaces and without outer punctuation."""
    return _EDGES.sub("", " ".join(text.casefold().split()))


def _judge(name: str) -> Judge:
    if name.startswith("python:"):
        return _own(name)
    if name == "math":
        math.math_verify()
    judges: dict[str, Judge] = {
        "match": lambda _, answer, reference: _verdict(plain(answer) == plain(reference)),
        "contains": lambda _, answer, reference: _verdict(_stands_in(plain(reference), plain(answer))),
        "number": lambda _, answer, reference: gsm8k.grade(answer, reference),
        "math": lambda _, answer, reference: math.grade(answer, reference),
        "none": lambda *_: Score(arithmetic.nan, False, "no verifier"),
    }
    return judges[name]


def _verdict(right: bool) -> Score:
    return Score(float(right), right, "" if right else "differs")


def _stands_in(words: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _own(name: str) -> Judge:
    """The user's function, imported by name, with every failure as an error that names the prompt."""
    module, _, function = name.removeprefix("python:").rpartition(".")
    try:
        verify: Callable[[str, str, str], float] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        mend = "Give it as python:package.module.function, importable from here (see PYTHONPATH)."
        raise ConfigError(f"verifier = '{name}'", f"It cannot be imported: {error}.", mend) from error

    def judge(prompt: Prompt, answer: str, reference: str) -> Score:
        where, mend = f"verifier {name}, prompt {prompt.id}", f"Mend {function}, or leave this prompt out."
        try:
            value = float(verify(prompt.text, answer, reference))
        except Exception as error:
            raise DataError(where, f"It raised {type(error).__name__}: {error}", mend) from error
        if not 0 <= value <= 1:
            raise DataError(where, f"It gave {value}, which is not a number in [0, 1].", mend)
        return Score(value, value == 1)

    return judge
