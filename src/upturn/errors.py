"""What a user can cause, and therefore mend.

    UpturnError            exit code 2, one clear message, no traceback
    ├── ConfigError        a recipe file or an override
    ├── DataError          a data set, a prompt, a verifier's input
    │   └── NothingToLearn drafts of which a selection makes no example
    ├── ModelError         a model folder, a tokenizer, a chat template
    └── RunError           a run folder, the disk, a training that cannot go on

Every message says where, what, and how to mend it, in that order. `assert` is for what only we can mend.
"""

from __future__ import annotations

import os
import re
import shutil

_TELL_IN_TEXT = ("SafetensorError", "Exception")
"""Kinds of errors of safetensors and of tokenizers; a name loads neither."""


class UpturnError(Exception):
    """Something the user can mend."""

    def __init__(self, where: str, what: str, mend: str) -> None:
        super().__init__(f"{where}\n    {what}\n    {mend}")
        self.where, self.what, self.mend = where, what, mend


class ConfigError(UpturnError):
    """A recipe file or an override is wrong."""


class DataError(UpturnError):
    """A data set, prompt or verifier cannot be used."""


class NothingToLearn(DataError):
    """No draft tells what is better."""


class ModelError(UpturnError):
    """A model, tokenizer or chat template cannot be used."""


class RunError(UpturnError):
    """A run cannot start or go on."""


def first_line(error: Exception) -> str:
    """The kind of an error that is not ours, and the beginning of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else 'no message'}"


def told_by_system(error: Exception) -> OSError | None:
    """The system's error that an error is, or tells in its text: a copy of many files does, and libraries in Rust."""
    is_told = isinstance(error, shutil.Error) or type(error).__name__ in _TELL_IN_TEXT
    if not is_told:
        return error if isinstance(error, OSError) else None
    found = re.search(r"(?:os error|code:|\[Errno) (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None
