r"""Grade-school word problems with a number as the answer (Cobbe et al., 2021, arXiv:2110.14168).

The last stated number counts, looked for in this order: '#### n', \boxed{n}, 'the answer is n', any number.
Numbers are equal as decimals: 1,000 = $1000.00 = 1000. There is no partial credit.

Data: `question`, and `answer` that ends in '#### n', as in the hub's openai/gsm8k.
"""

from __future__ import annotations

import re
from decimal import Context, Decimal

from pydantic import Field

from upturn._model import Strict
from upturn.tasks._base import Split, Task
from upturn.tasks._files import TEST_SHARE, Columns, Table
from upturn.tasks.math import last_boxed
from upturn.types import Prompt, Score

_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = rf"(?:(?<![\w).])-)?{_UNSIGNED}"
_AFTER_HASHES = re.compile(rf"####[^\w\n]*?({_NUMBER})")
_AFTER_PHRASE = re.compile(rf"\banswer(?:\s+is\b|\s*:)[^\n]*?({_NUMBER})", re.IGNORECASE)
_ANYWHERE = re.compile(_NUMBER)
_TEX_COMMA = re.compile(r"(?<=[0-9])\{,\}(?=[0-9])")
_ORNAMENT = re.compile(r"\\?\$|\\[,!]")


class Config(Strict):
    """Where the problems are, and how they are asked."""

    data: str
    """A folder with train.jsonl or test.jsonl, one JSONL file, or a hub data set such as openai/gsm8k."""
    subset: str | None = "main"
    """The hub data set's configuration."""
    instruction: str = "Solve step by step, and end with '#### ' and the number."
    """Stands below each question."""
    refine_request: str = (
        "Check your solution step by step. Write an improved solution that ends with '#### ' and the number."
    )
    """What the user says after a draft."""
    max_new_tokens: int = Field(default=320, ge=1)
    """A length that fits nearly every good answer."""


def load(cfg: Config) -> Task:
    """Read the data; a `DataError` says what is wrong with it."""
    return Gsm8k(cfg)


class Gsm8k:
    """Problems of a file, graded by their number."""

    def __init__(self, cfg: Config) -> None:
        self.refine_request = cfg.refine_request
        self.max_new_tokens = cfg.max_new_tokens
        columns = Columns("question", "answer", cfg.instruction, gold=stated_number)
        self._table = Table(cfg.data, columns, TEST_SHARE, cfg.subset)

    def prompts(self, split: Split, start: int, count: int) -> list[Prompt]:
        """`count` prompts from place `start`; fewer at the end of the data."""
        return self._table.prompts(split, start, count)

    def grade(self, prompt: Prompt, answer: str) -> Score:
        """1 where the stated number equals the reference, else 0."""
        return grade(answer, self._table.reference(prompt))

    def vote_key(self, prompt: Prompt, answer: str) -> str:
        """The stated number."""
        return stated_number(answer)


def grade(answer: str, reference: str) -> Score:
    """1 where both state the same number, else 0."""
    number = stated_number(answer)
    if not number:
        return Score(0.0, False, "no number stated")
    right = number == stated_number(reference)
    return Score(float(right), right, "" if right else f"says {number[:40]}")


def stated_number(text: str) -> str:
    """The last stated number in one writing for equal numbers ("1000", "-0.5"); '' where there is none."""
    plain = _ORNAMENT.sub("", _TEX_COMMA.sub(",", text)).replace("−", "-")
    found = (
        _AFTER_HASHES.findall(plain)
        or _ANYWHERE.findall(last_boxed(plain))
        or _AFTER_PHRASE.findall(plain)
        or _ANYWHERE.findall(plain)
    )
    return _canonical(found[-1]) if found else ""


def _canonical(number: str) -> str:
    digits = number.replace(",", "")
    exact = Decimal(digits).normalize(Context(prec=len(digits)))
    return format(exact if exact else Decimal(0), "f")
