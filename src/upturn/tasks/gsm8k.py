r"""Grade-school word problems with a number as the answer (Cobbe et al., 2021, arXiv:2110.14168).

The last stated number counts, looked for in this order: '#### n', \boxed{n}, 'the answer is n', any number.
Of an equation, as in 'the answer is 6 * 7 = 42', it is the number behind the last '='.
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
_ASIDE = r"[.?]\s|!\s+(?-i:[A-Z])|(?<=\w)\s+\("
"""Ends a sentence, or leaves it for a remark in parentheses."""


def _behind(marker: str, gap: str) -> re.Pattern[str]:
    """Finds the number behind a marker and, of an equation that begins there, the number behind the last '='."""
    own = rf"(?!{marker})"  # what follows the next marker is found from there; else long answers take quadratic time
    pattern = rf"""
        {marker} (?:{own}{gap})*? ({_NUMBER})
        (?:
            (?:{own}(?!{_ASIDE})[^\n])* =
            (?:{own}(?!{_ASIDE})[^\n=0-9])*? ((?>{_NUMBER}))
            (?! \s*(?:[-+*/×·^x]|\\times|\\cdot)\s*[0-9(] )    # "42 = 6 * 7" states 42
        )?
    """
    return re.compile(pattern, re.VERBOSE | re.IGNORECASE)


_AFTER_HASHES = _behind(r"\#{4}", r"[^\w\n]")
_AFTER_PHRASE = _behind(r"\banswer(?:\s+is\b|\s*:)", r"[^\n]")
_ANYWHERE = re.compile(_NUMBER)
_TEX_COMMA = re.compile(r"(?<=[0-9])\{,\}(?=[0-9])")
_ORNAMENT = re.compile(r"\\?\$|\\[,!]")
_NUMBER_END = re.compile(r"[(\n;]|[.,!?]\s|\s(?!x)[a-z]", re.IGNORECASE)
"""Where what belongs to a number ends: 18 eggs for 7 days; but not 3/4, 1 000 or 2 x 10."""
_FORMULA = re.compile(r"[√π¼-¾⅐-⅞]|[0-9][⁰¹²³⁴-⁹]|\^\{?[0-9]|-\s+[0-9]|\\(?:[dt]?frac|sqrt|pi)(?![a-z])")
"""One number is written here, and another is meant."""


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
        self.key = self._table.key

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
    plain = _bare(text)
    found = (
        [result or first for first, result in _AFTER_HASHES.findall(plain)]
        or _ANYWHERE.findall(last_boxed(plain))
        or [result or first for first, result in _AFTER_PHRASE.findall(plain)]
        or _ANYWHERE.findall(plain)
    )
    return _canonical(found[-1]) if found else ""


def one_number(text: str) -> str:
    """The number of a reference, which must hold only one, or state one; '' for no text, else a `ValueError`.

    Of "3/4", "1e6" or "12 (see page 3)" `stated_number` would take a piece, and every right answer would be wrong.
    """
    plain = _bare(text)
    statement = (
        _statement(_AFTER_HASHES, plain)
        or last_boxed(plain).rpartition("=")[2]
        or _statement(_AFTER_PHRASE, plain)
        or plain.strip()
    )
    if not statement:
        return ""
    numbers = _ANYWHERE.findall(statement)
    if len(numbers) != 1 or _FORMULA.search(statement):
        raise ValueError(f"The answer '{text.strip()[-60:]}' is not exactly one number.")
    return _canonical(numbers[0])


def _statement(marker: re.Pattern[str], text: str) -> str:
    """From the last marker, or the '=' that counts behind it, to the end of what belongs to the number; or ''."""
    begin = end = 0
    for match in marker.finditer(text):
        begin = match.start() if match[2] is None else text.rindex("=", 0, match.start(2))
        after = _NUMBER_END.search(text, match.end(1) if match[2] is None else match.end(2))
        end = after.start() if after else len(text)
    return text[begin:end]


def _bare(text: str) -> str:
    """The text without the ornaments of numbers."""
    return _ORNAMENT.sub("", _TEX_COMMA.sub(",", text)).replace("−", "-")


def _canonical(number: str) -> str:
    digits = number.replace(",", "")
    exact = Decimal(digits).normalize(Context(prec=len(digits)))
    return format(exact if exact else Decimal(0), "f")
