"""A causal language model seen through the two things upturn asks of it: log-probs of a tree, and next-token logits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from upturn.models import _attention, _graphed, _output_layer
from upturn.models._attention import use_plans
from upturn.models._graphed import kept as captured_layers
from upturn.models._tree_plan import TreePlan
from upturn.models.fused_training import fused_training
from upturn.numerics import HEAD_CHUNK, token_logprobs
from upturn.trees import TokenTree

__all__ = ["captured_layers", "head", "hidden_states", "tree_kl", "tree_logprobs", "use_plans"]


def hidden_states(model: nn.Module, ids_T: Tensor, positions_T: Tensor, plan: _attention.Plan) -> Tensor:
    """Last hidden states after the final norm, `[T] -> [T, d]`, attention given by the plan."""
    use_plans(model)  # any other implementation would ignore the plan without a word
    backbone = cast(Any, model).get_decoder()
    out = backbone(
        input_ids=ids_T[None],
        position_ids=positions_T[None],
        use_cache=False,
        upturn_plan=plan,
    )
    return out.last_hidden_state[0]


def head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits of hidden states, with the model's own soft cap or scale, `[..., d] -> [..., V]`."""
    return _output_layer.bent(model, cast(Any, model).get_output_embeddings()(hidden))


def tree_logprobs(model: nn.Module, tree: TokenTree, *, flex: bool | None = None) -> Tensor:
    """Log-probability of every target token of a tree, `[N]` fp32."""
    hidden_T = _tree_states(model, tree, flex=flex)
    hidden_N = hidden_T[tree.predictors_N]
    if _output_layer.usable(model, hidden_N):
        return _output_layer.logprobs(hidden_N, cast(Any, model).get_output_embeddings().weight, tree.targets_N)
    return token_logprobs(hidden_N, tree.targets_N, lambda h: head(model, h))


def _tree_states(model: nn.Module, tree: TokenTree, *, flex: bool | None = None) -> Tensor:
    """Last hidden states of every token of a tree, `[T, d]`, and of tokens that may fill it up."""
    tree = _graphed.padded(tree, model)
    plan = TreePlan(tree, flex=flex)
    use_plans(model)  # before the layers are tried
    with fused_training(model, plan):
        return hidden_states(model, tree.ids_T, tree.positions_T, plan)


@torch.no_grad()  # tensors of the inference mode would have all layers compiled anew on CUDA
def tree_kl(model: nn.Module, other: nn.Module, tree: TokenTree) -> Tensor:
    """KL(model || other) of the next-token distributions before every target token, `[N]` nats, fp32."""
    hidden = [_tree_states(m, tree)[tree.predictors_N] for m in (model, other)]
    parts = []
    for mine_N, other_N in zip(*(h.split(HEAD_CHUNK) for h in hidden), strict=True):
        logp, logq = (head(m, h).float().log_softmax(-1) for m, h in ((model, mine_N), (other, other_N)))
        parts.append((logp.exp() * (logp - logq)).sum(-1))
    return torch.cat(parts)
