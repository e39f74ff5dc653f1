"""What lies beside a saved model: its card, and how it was trained to refine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from upturn import __version__
from upturn._model import Strict, problems
from upturn.errors import ModelError
from upturn.evaluation.summary import Summary
from upturn.evaluation.turns import TurnRow
from upturn.types import GENERIC_CRITIQUE, Requests

CITATION = """@article{zeng2025evolve,
  title   = {Evolving LLMs' Self-Refinement Capability via Synergistic Training-Inference Optimization},
  journal = {arXiv preprint arXiv:2502.05605},
  year    = {2025}
}"""


REFINING = "refining.json"
"""Name of the file that holds `Refining`."""


class Refining(Strict):
    """How a model is led to refine: as it was measured in its run, or what fits any model."""

    strategy: dict[str, Any] = Field(default_factory=lambda: {"name": "chain"})
    """Its name and settings."""
    refine: str = "Improve your answer. Reply with the improved answer only."
    """What the user says to get a better answer."""
    critique: str = GENERIC_CRITIQUE
    """What the user says to get a critique."""
    layout: Literal["auto", "conversation", "quoted"] = "auto"

    @property
    def requests(self) -> Requests | None:
        """What the user says; None where the file was not there, and a task may speak for itself."""
        return Requests(self.refine, self.critique) if "refine" in self.model_fields_set else None


def refining(folder: Path) -> Refining:
    """What a published model was trained for; the defaults for any other. Raises ModelError for a broken file."""
    path = folder / REFINING
    if not path.is_file():
        return Refining()
    try:
        return Refining.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise ModelError(str(path), f"It cannot be read: {problems(error)}.", "Mend or delete it.") from error
    except OSError as error:
        mend = "See that it is a file that you may read."
        raise ModelError(str(path), f"It cannot be read: {error.strerror or error}.", mend) from error


def stage(label: str, objective: dict[str, Any], num_pairs: int) -> str:
    """Card of a model inside a run."""
    front = "---\nlibrary_name: transformers\ntags: [upturn, self-refinement]\n---\n"
    text = f"# {label}\n\nTrained by upturn {__version__} on {num_pairs} pairs.\n\n"
    return f"{front}{text}```json\n{json.dumps(objective, indent=2)}\n```\n"


def _right(turn: TurnRow) -> str:
    """Share of right answers in percent; a dash where no verifier judged."""
    return "–" if turn.mean_score is None else f"{100 * turn.accuracy:.1f}"


def final(summary: Summary, about: str) -> str:
    """Card of the published model, with its turn table."""
    last = summary.measurements[-1] if summary.measurements else None
    turns = len(last.turns) if last else 0
    head = "| model | " + " | ".join(f"turn {t + 1}" for t in range(turns)) + " |\n|---" * 1
    rows = [f"| {m.label} | " + " | ".join(map(_right, m.turns)) + " |" for m in summary.measurements]
    table = "\n".join([head + "|---" * turns + "|", *rows])
    n = last.n if last else 0
    return f"""---
base_model: {summary.model}
library_name: transformers
tags: [upturn, self-refinement, {summary.recipe}]
---

# {summary.name}

A model trained with the upturn recipe `{summary.recipe}` on the task `{summary.task}` to refine its own answers.

{about}

## Accuracy by turn, in percent ({n} held-out prompts, seed {summary.seed})

{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

or `upturn refine --model path/to/this/folder "your question"`, which refines as the model was trained to
(`refining.json`).

Made with upturn {__version__}.

## Citation

```bibtex
{CITATION}
```
"""
