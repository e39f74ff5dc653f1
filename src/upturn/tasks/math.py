r"""Competition problems with LaTeX answers, judged by math-verify (Hendrycks et al., 2021, arXiv:2103.03874).

The last stated answer is isolated first: the last \boxed{}, or else what follows the last 'answer is' or
'Answer:' on its line. A text that states none is wrong, and math-verify never sees it, as it would take any
formula for the answer. There is no partial credit.

Data: `problem` and `answer`, as in the hub's HuggingFaceH4/MATH-500. Needs the extra `math`.
"""

from __future__ import annotations

import logging
import re
import threading
from types import ModuleType
from typing import Any

from pydantic import Field

from upturn._model import Strict
from upturn.errors import DataError
from upturn.tasks._base import Split, Task
from upturn.tasks._files import TEST_SHARE, Columns, Table
from upturn.types import Prompt, Score

TIMEOUT = 5
"""Seconds for one parsing or comparison; without limit outside the main thread, where no signal arrives."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?=[-−+]?\.?[0-9]|\\[a-zA-Z]))")
_UNBRACED_END = re.compile(r"[.,;:!?*]*(?:[\s$]|\\[)\]]|$)")
_PHRASE = re.compile(r"\banswer(?:\s+is\b|\s*:)[\s:*]*([^\n]+)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?:[.?](?:\s.*)?|!(?:\s+[A-Z].*)?)$")  # but not the sign of a factorial: 5! = 120


class Config(Strict):
    """Where the problems are, and how they are asked."""

    data: str
    """A folder with train.jsonl or test.jsonl, one JSONL file, or a hub data set."""
    subset: str | None = None
    """The hub data set's configuration."""
    problem_column: str = "problem"
    """The field with the question."""
    answer_column: str = "answer"
    """The field with the final answer, in LaTeX without dollar signs."""
    instruction: str = r"Solve step by step, and put the final answer in \boxed{}."
    """Stands below each question."""
    refine_request: str = r"Check your solution step by step. Write an improved solution that ends with \boxed{}."
    """What the user says after a draft."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """A length that fits nearly every good answer."""


def load(cfg: Config) -> Task:
    """Read the data; a `DataError` says what is wrong with it, or that math-verify is not installed."""
    math_verify()
    return Math(cfg)


class Math:
    """Problems of a file, graded by math-verify."""

    def __init__(self, cfg: Config) -> None:
        self.refine_request = cfg.refine_request
        self.max_new_tokens = cfg.max_new_tokens
        columns = Columns(cfg.problem_column, cfg.answer_column, cfg.instruction)
        self._table = Table(cfg.data, columns, TEST_SHARE, cfg.subset)
        self.key = self._table.key

    def prompts(self, split: Split, start: int, count: int) -> list[Prompt]:
        """`count` prompts from place `start`; fewer at the end of the data."""
        return self._table.prompts(split, start, count)

    def grade(self, prompt: Prompt, answer: str) -> Score:
        """1 where the stated answer equals the reference, else 0."""
        return grade(answer, self._table.reference(prompt))

    def vote_key(self, prompt: Prompt, answer: str) -> str:
        """The stated answer in sympy's writing."""
        return key(answer)


def math_verify() -> ModuleType:
    """The package, imported when first used, and silenced; a `DataError` where it is absent."""
    try:
        import math_verify
    except ModuleNotFoundError as error:
        what = "Judging mathematics needs the package 'math-verify'."
        raise DataError("task math", what, "Install it with: pip install 'upturn[math]'") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


def grade(answer: str, reference: str) -> Score:
    """1 where the answer's last stated answer equals the reference (LaTeX without dollar signs), else 0."""
    stated = stated_answer(answer)
    if not stated:
        return Score(0.0, False, "no answer stated")
    limit = _time_limit()
    right = math_verify().verify(_parse(f"${reference}$"), _parse(stated), timeout_seconds=limit)
    return Score(float(right), right, "" if right else f"says {stated.strip('$')[:40]}")


def key(answer: str) -> str:
    """The stated answer in sympy's writing, or as it stands where it is no formula; '' without one."""
    stated = stated_answer(answer)
    parsed = _parse(stated) if stated else []
    return str(parsed[0]) if parsed else stated.strip("$")


def stated_answer(text: str) -> str:
    r"""The last \boxed{} as $...$, or else the words after the last 'answer is' or 'Answer:'; or ''."""
    if boxed := last_boxed(text):
        return f"${boxed}$"
    phrases = _PHRASE.findall(text)
    return _SENTENCE_END.sub("", phrases[-1]).strip(" *") if phrases else ""


def last_boxed(text: str) -> str:
    r"""What stands in the last \boxed{} with balanced braces, or \boxed 5 without; '' where there is none."""
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        if text[start - 1] != "{":
            return _UNBRACED_END.split(text[start:], maxsplit=1)[0]
        depth = 1
        for end in range(start, len(text)):
            escaped = text[end - 1] == "\\"
            depth += 0 if escaped else (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[start:end].strip()
    return ""


def _parse(text: str) -> list[Any]:
    return math_verify().parse(f"Answer: {text.replace('−', '-')}", parsing_timeout=_time_limit())


def _time_limit() -> int | None:
    return TIMEOUT if threading.current_thread() is threading.main_thread() else None
