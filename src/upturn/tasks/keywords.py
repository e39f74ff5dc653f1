"""One sentence of at most N words that uses the given words: generated without end, judged exactly.

A word counts only as it was given, in any case but not inflected ("runs" is not "run", "dog's" is not "dog"), and only
where it is used: alone in quotation marks (the word "dog") it is mentioned, which solves nothing.
Words are runs of letters and digits, so that "sea-green" is two; the limit counts the same words.

The critique goes through the words one by one, with what is to be done: "Words: snow yes, uncle no. So add uncle."

The value is a product, and exactly 1 where the answer is right:
    share of the words used * 1 / sentences * limit / words (if too long)
    * 1/2 (if there is no end mark) * 1/2 (if there is nothing but the given words)
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Sequence

from pydantic import Field, model_validator

from upturn._model import Strict
from upturn.tasks._base import Split, Task
from upturn.tasks._words import WORDS
from upturn.types import Prompt, Score

TEST_SHARE = 0.2
"""Share of all word combinations that are kept for the test split, whatever the seed."""

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_MENTION = re.compile(r"""["“'‘]\s*[^\W_]+\s*[.,;:]?["”'’](?![^\W_])""")
_ABBREVIATION = re.compile(r"\b(Mr|Mrs|Ms|Dr|St|[A-Z])\.(?=\s)")
_CLOSED = r"[\"'”’)\]*]*"
_END = re.compile(rf"[.!?…]+{_CLOSED}$")
_BREAK = re.compile(
    rf"""
    \s*\n\s*                               # a new line begins a new sentence
    | (?<=[.!?…])[\"'”’)\]]+\s+(?![a-z])   # "Stop!" He left.   (but not: "Stop!" he said.)
    | (?<=[.!?…])\s+                       # Stop. he left.
    | (?<=[a-z][.!?…]){_CLOSED}(?=[A-Z])   # Stop.He left.
    """,
    re.VERBOSE,
)


class Config(Strict):
    """How the prompts are made."""

    num_words: int = Field(default=3, ge=1, le=6)
    """How many words must be used."""
    max_words: int = Field(default=15, ge=2)
    """The sentence's limit, in words."""
    seed: int = 0
    """Another seed gives other prompts; no seed moves a prompt text from one split to the other."""
    refine_request: str = (
        "Check your sentence: it must use all the given words, be one sentence, and stay within the "
        "word limit. Write an improved sentence only."
    )
    """What the user says after a draft."""
    critique_request: str = "Check the sentence word by word. If all is well, write: no changes needed."
    """What the user says to get a draft criticised."""

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.max_words <= self.num_words:
            raise ValueError("max_words must be greater than num_words, or no sentence can be right.")
        return self


def load(cfg: Config) -> Task:
    """The task; it holds no state."""
    return Keywords(cfg)


class Keywords:
    """Prompts drawn by (seed, split, place)."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.refine_request, self.critique_request = cfg.refine_request, cfg.critique_request
        self.max_new_tokens = max(48, 24 + 6 * cfg.num_words)  # a critique names each word

    def prompts(self, split: Split, start: int, count: int) -> list[Prompt]:
        """`count` prompts from place `start`; never fewer."""
        return [self._prompt(split, place) for place in range(start, start + count)]

    def grade(self, prompt: Prompt, answer: str) -> Score:
        """Whether the answer is one sentence with all the words within the limit, and how far it got."""
        asked = re.findall(r'"(\w+)"', prompt.text)
        words = _WORD.findall(answer.lower())
        if not words:
            return Score(0.0, False, "empty", critique="It is empty. So write a sentence.")
        used = _WORD.findall(_MENTION.sub(" ", answer.lower()))
        missing = [word for word in asked if word not in used]
        sentences = num_sentences(answer)
        judged = [
            (f"missing: {', '.join(missing)}", 1 - len(missing) / max(1, len(asked)), f"add {' and '.join(missing)}"),
            (f"{sentences} sentences", 1 / sentences, "make it one sentence"),
            (f"{len(words)} words", min(1.0, self.cfg.max_words / len(words)), "make it shorter"),
            ("no end mark", 1.0 if _END.search(answer.rstrip()) else 0.5, "end it with a full stop"),
            ("only a list", 1.0 if set(words) - set(asked) else 0.5, "make it a sentence"),
        ]
        value = math.prod(factor for _, factor, _ in judged)
        faults = [(fault, mend) for fault, factor, mend in judged if factor < 1]
        found = ", ".join(f"{word} {'no' if word in missing else 'yes'}" for word in asked)
        so = f"So {'; '.join(mend for _, mend in faults)}." if faults else "No changes needed."
        note = "; ".join(fault for fault, _ in faults)
        return Score(value, value == 1.0, note, critique=f"Words: {found}. {so}")

    def vote_key(self, prompt: Prompt, answer: str) -> str:
        """The words in lower case, without punctuation."""
        return " ".join(_WORD.findall(answer.lower()))

    def _prompt(self, split: Split, place: int) -> Prompt:
        rng = random.Random(f"{self.cfg.seed} {split} {place}")
        words = rng.sample(WORDS, self.cfg.num_words)
        while _split_of(words) != split:
            words = rng.sample(WORDS, self.cfg.num_words)
        text = f"Write one sentence of at most {self.cfg.max_words} words that uses the {_listed(words)}."
        return Prompt(f"keywords-{split}-{self.cfg.seed}-{place}", text)


def num_sentences(text: str) -> int:
    """Sentences in a text; a piece without a word, such as a lone "...", is none."""
    pieces = _BREAK.split(_ABBREVIATION.sub(r"\1", text.strip()))
    return sum(1 for piece in pieces if _WORD.search(piece))


def _split_of(words: Sequence[str]) -> Split:
    """By the set of words, so that no reordering of a test prompt is trained on."""
    digest = hashlib.sha256(" ".join(sorted(words)).encode()).digest()
    return "test" if int.from_bytes(digest[:8]) < TEST_SHARE * 2**64 else "train"


def _listed(words: Sequence[str]) -> str:
    quoted = [f'"{word}"' for word in words]
    if len(quoted) == 1:
        return f"word {quoted[0]}"
    return f"words {', '.join(quoted[:-1])} and {quoted[-1]}"
