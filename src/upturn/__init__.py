"""upturn: make language models able to improve their own answers, and prove it.

What most uses need, by one name each. Nothing heavy is imported before it is asked for.

    load_model, load_chat, use_plans     a model with its tokenizer; its chat template; attention by plan
    Engine, Sampling                     sample drafts by any strategy
    build_tree, tree_logprobs            samples -> one token tree -> log-probs of its targets
    Prompt, Draft, Attempt, Score, Pair, Sample, Requests
                                         the nouns: plain frozen records
    turn_table, transitions, gain        what changes from turn to turn
    run, evaluate                        a recipe from its config; the turn table of any model

Strategies, tasks, scorers, selection rules and objectives are modules: `from upturn.strategies import chain`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from upturn.engines.local import Local as Engine
    from upturn.engines.sampling import Config as Sampling
    from upturn.evaluation.turns import gain, transitions, turn_table
    from upturn.lab.session import evaluate, run
    from upturn.models.chat import load as load_chat
    from upturn.models.load import load as load_model
    from upturn.models.policy import tree_logprobs, use_plans
    from upturn.trees import build as build_tree
    from upturn.types import Attempt, Draft, Pair, Prompt, Requests, Sample, Score

__all__ = [
    "Attempt",
    "Draft",
    "Engine",
    "Pair",
    "Prompt",
    "Requests",
    "Sample",
    "Sampling",
    "Score",
    "__version__",
    "build_tree",
    "evaluate",
    "gain",
    "load_chat",
    "load_model",
    "run",
    "transitions",
    "tree_logprobs",
    "turn_table",
    "use_plans",
]

_PLACES = {
    "Attempt": "types:Attempt",
    "Draft": "types:Draft",
    "Engine": "engines.local:Local",
    "Pair": "types:Pair",
    "Prompt": "types:Prompt",
    "Requests": "types:Requests",
    "Sample": "types:Sample",
    "Sampling": "engines.sampling:Config",
    "Score": "types:Score",
    "build_tree": "trees:build",
    "evaluate": "lab.session:evaluate",
    "gain": "evaluation.turns:gain",
    "load_chat": "models.chat:load",
    "load_model": "models.load:load",
    "run": "lab.session:run",
    "transitions": "evaluation.turns:transitions",
    "tree_logprobs": "models.policy:tree_logprobs",
    "turn_table": "evaluation.turns:turn_table",
    "use_plans": "models.policy:use_plans",
}
"""Public name -> module and name within it."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module 'upturn' has no attribute '{name}'")
    module, _, inner = _PLACES[name].partition(":")
    value = getattr(importlib.import_module(f"upturn.{module}"), inner)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
