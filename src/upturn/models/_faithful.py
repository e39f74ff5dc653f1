"""Asks a model once whether it computes over a token tree what it computes over rows.

Everything here rests on two things: that tokens see each other through the attention interface of `transformers` alone,
and that logits are made of the last hidden states as `policy.head` does it. A model with a convolution, a recurrence or
attention of its own between its tokens, or with a scale behind its output layer, would train and sample from another
distribution without a word: policy and reference would be wrong alike.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from upturn import trees
from upturn.errors import ModelError, first_line
from upturn.models import policy
from upturn.models._attention import How, heads_of
from upturn.models._tree_plan import TreePlan
from upturn.types import Sample

CONTEXT, BRANCH = 6, 5
"""Tokens of the question, and of each of two answers to it: more than such a layer's convolution sees at once."""
ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Distance of log-probs, in nats and weighed by probability, that rounding may make; in other types `ROUGH`."""
ROUGH = 0.3
PROVEN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Kinds of `transformers` that need not be asked: tests do (`tests/unit/test_faithful.py`)."""
UNPLANNED = "so drafts that are sampled or learnt side by side would see each other"
_ASKED: set[str] = set()
"""Configs that were found to be faithful."""


def check(model: nn.Module, name: str) -> None:
    """Raises ModelError where log-probs of a tree are not those of rows. To be asked before plans take over."""
    config = cast(Any, model).config.get_text_config()
    known = f"{type(model)} {next(model.parameters()).dtype} {config.to_json_string()}"
    if (config.model_type in PROVEN and type(model).__module__.startswith("transformers.")) or known in _ASKED:
        return
    if why := _fault(model, int(config.vocab_size)):
        raise ModelError(
            f"model {name}",
            f"A {config.model_type} cannot be trained or sampled here: {why}.",
            "Take a model of another kind. This one can still be measured: serve it (vllm serve), name the endpoint.",
        )
    _ASKED.add(known)


@torch.no_grad()
def _fault(model: nn.Module, num_ids: int) -> str:
    """What is wrong with it, and '' where nothing is."""
    if any(isinstance(part, nn.Conv1d) for part in model.modules()):
        return f"its tokens see each other by convolutions, {UNPLANNED}"
    ids = torch.randint(num_ids, (CONTEXT + 2 * BRANCH,), generator=torch.Generator().manual_seed(0)).tolist()
    question, answers = tuple(ids[:CONTEXT]), (tuple(ids[CONTEXT:-BRANCH]), tuple(ids[-BRANCH:]))
    samples = [Sample(question, answer) for answer in answers]
    try:
        rows, (tree, plan) = _by_rows(model, samples), _by_tree(model, samples)
    except Exception as error:  # whatever a foreign forward says of a plan
        return f"its attention takes no plan ({first_line(error)})"
    if odd := plan.odd(cast(Any, model).config.get_text_config()):
        return odd
    distance = float((rows.exp() * (rows - tree).abs()).sum(-1).mean())
    if distance <= ALLOWED.get(next(model.parameters()).dtype, ROUGH):
        return ""
    return f"over a tree of drafts its log-probs are not those of each text alone ({distance:.2g} nats apart)"


def _by_rows(model: nn.Module, samples: list[Sample]) -> Tensor:
    """Log-probs of all tokens at the places that are asked for, by the model's own forward, `[N, V]`."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*sample.context, *sample.target[:-1]] for sample in samples], device=device)
    logits = cast(Any, model)(input_ids=ids, use_cache=False).logits
    return logits[:, CONTEXT - 1 :].flatten(0, 1).float().log_softmax(-1)


def _by_tree(model: nn.Module, samples: list[Sample]) -> tuple[Tensor, _Asked]:
    """The same over a tree, and what the plan was asked. Without kernels: those are asked layer by layer."""
    tree = trees.build(samples).to(next(model.parameters()).device)
    plan = _Asked(tree, flex=False)
    hidden_T = policy.hidden_states(model, tree.ids_T, tree.positions_T, plan)
    return policy.head(model, hidden_T[tree.predictors_N]).float().log_softmax(-1), plan


class _Asked(TreePlan):
    """Remembers what it was asked."""

    def __init__(self, tree: trees.TokenTree, *, flex: bool) -> None:
        super().__init__(tree, flex=flex)
        self.layers: list[int] = []
        self.windows: set[int | None] = set()
        self.heads: set[tuple[int, ...]] = set()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        self.layers.append(layer)
        self.windows.add(how.window)
        self.heads |= {(part.shape[1], part.shape[3]) for part in (k, v)}
        return super().attend(layer, q, k, v, how)

    def odd(self, config: Any) -> str:
        """What a cache of keys and values, or a window longer than this question, would stumble over."""
        if sorted(self.layers) != [*range(config.num_hidden_layers)]:
            return f"not each of its layers attends once, by the attention interface of transformers, {UNPLANNED}"
        if self.heads != {heads_of(config)}:
            return f"its keys and values are not those that its config tells of ({self.heads}, not {heads_of(config)})"
        if (window := _declared_window(config)) and window not in self.windows:
            return f"it hides tokens by its masks alone (a window of {window}), and a plan takes the place of masks"
        return ""


def _declared_window(config: Any) -> int:
    """Tokens that some layer sees at most, where that is less than all; else 0."""
    kinds = getattr(config, "layer_types", None)
    if kinds and "chunked_attention" in kinds:
        window = getattr(config, "attention_chunk_size", None)
    elif kinds is not None and "sliding_attention" not in kinds:
        window = None
    else:
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return window if window and window < config.max_position_embeddings else 0
