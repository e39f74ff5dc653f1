"""Any JSONL file or hub data set, with a verifier chosen by name.

Verifiers, from strict to lenient; texts are compared in lower case, without outer quotes, brackets, markup and end
marks. Every other sign counts: -5 is not 5, C++ is not C#.
    match       the whole answer is the reference
    number      the last stated number equals the reference (as in gsm8k), which must be exactly one number
    math        the last stated formula equals the reference (as in math; needs the extra `math`)
    contains    the reference stands in the answer, as whole words and numbers
    none        there is no verifier: scores are NaN, and a reward model has to judge
    python:package.module.function
                your own, called as f(prompt, answer, reference) -> bool or number in [0, 1]; 1 is right
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math as arithmetic
import re
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from upturn._model import Strict
from upturn.errors import ConfigError, DataError
from upturn.tasks import gsm8k, math
from upturn.tasks._base import Split, Task
from upturn.tasks._files import TEST_SHARE, Columns, Table
from upturn.types import Prompt, Score

Judge = Callable[[Prompt, str, str], Score]
"""Prompt, answer, reference -> score."""

_END_MARKS = " .,;:!?…。、，；：！？"
_QUOTES = "\"'`“”„‘’‚«»‹›「」"
_STARTS_AS_NUMBER = re.compile(r"[-+.$€£]*[0-9]")


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
        gold = {"number": gsm8k.one_number, "match": _words, "contains": _words}.get(cfg.verifier, str.strip)
        columns = Columns(cfg.prompt_column, answer_column, cfg.instruction, gold)
        self._table = Table(cfg.data, columns, cfg.test_share, cfg.subset)
        if cfg.test_data is not None:
            self._table.use_test(Table(cfg.test_data, columns, cfg.test_share, cfg.subset))
        self.key = hashlib.sha256(self._table.key.encode() + _source(cfg.verifier)).hexdigest()

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
    """The text in lower case, with single spaces and without outer quotes, brackets, markup and end marks."""
    text = " ".join(text.casefold().replace("−", "-").split())
    while (inner := _inside(text).strip(" ").rstrip(_END_MARKS)) != text:
        text = inner
    return text


def _inside(text: str) -> str:
    """What a pair of quotes, stars or brackets encloses; else the text. Brackets of several things stay: (0, 1)."""
    first, inner, last = text[:1], text[1:-1], text[-1:]
    enclosed = (
        (first in _QUOTES and last in _QUOTES)
        or first + last == "**"
        or (first + last in ("()", "[]", "{}") and not set(inner) & set("()[]{},"))
    )
    return inner if inner and enclosed else text


def _words(text: str) -> str:
    """A reference for texts; '' where nothing of it would be compared, as the empty answer would be right."""
    return text.strip() if plain(text) else ""


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
    """Whether the words stand in the text, and not as a piece of another word or number."""
    number = r"(?<![\w.,+–√^-])(?<![0-9][:/])(?<![+–-][$€£])"
    before = number if _STARTS_AS_NUMBER.match(words) else r"(?<!\w)"
    after = r"(?![\w+#^]|[.,:/][0-9])" if words[-1].isdecimal() else r"(?![\w+#])"
    return re.search(before + re.escape(words) + after, text) is not None


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


def _source(verifier: str) -> bytes:
    """The source file of a verifier of your own, which the config only names; empty where there is none."""
    if not verifier.startswith("python:"):
        return b""
    module = sys.modules[verifier.removeprefix("python:").rpartition(".")[0]]
    try:
        return Path(inspect.getsourcefile(module) or "").read_bytes()
    except (TypeError, OSError):  # built in, made while running, or in a zip file
        return b""
