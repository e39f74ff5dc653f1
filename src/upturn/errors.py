"""What a user can cause, and therefore mend.

    UpturnError            exit code 2, one clear message, no traceback
    ├── ConfigError        a recipe file or an override
    ├── DataError          a data set, a prompt, a verifier's input
    ├── ModelError         a model folder, a tokenizer, a chat template
    └── RunError           a run folder, the disk, a training that cannot go on

Every message says where, what, and how to mend it, in that order. `assert` is for what only we can mend.
"""

from __future__ import annotations


class UpturnError(Exception):
    """Something the user can mend."""

    def __init__(self, where: str, what: str, mend: str) -> None:
        super().__init__(f"{where}\n    {what}\n    {mend}")
        self.where, self.what, self.mend = where, what, mend


class ConfigError(UpturnError):
    """A recipe file or an override is wrong."""


class DataError(UpturnError):
    """A data set, prompt or verifier cannot be used."""


class ModelError(UpturnError):
    """A model, tokenizer or chat template cannot be used."""


class RunError(UpturnError):
    """A run cannot start or go on."""
