"""Policy gradient on groups of drafts: REINFORCE, RLOO (arXiv:2402.14740), GRPO (arXiv:2402.03300), DAPO, SCoRe.

What it does   Makes a draft likelier in its context by its advantage, and holds the policy near the reference.
Equation       ratio = policy(t) / old(t) for each token t;  old is the model that sampled the drafts
               loss  = -min(ratio A, clamp(ratio, 1 - clip, 1 + clip_high) A) + kl(turn) ratio k3
               k3    = reference(t)/policy(t) - log(reference(t)/policy(t)) - 1, an estimate of KL(policy | reference)
               token          summed over tokens, per token         (DAPO, arXiv:2503.14476)
               sequence_mean  each draft's mean over its tokens     (GRPO)
               sequence_sum   each draft's sum over its tokens      (REINFORCE, RLOO, SCoRe, arXiv:2409.12917)
Needs          groups of drafts with advantages A; old log-probs; reference log-probs where a `kl` is above 0.
Differs        k3 is weighted by the ratio (arXiv:2512.02556). Without it, as in GRPO's paper and by TRL's default
               (`use_bias_correction_kl: false`), its gradient is that of KL(reference | policy), and training rests
               elsewhere than at reference exp(reward / kl). TRL logs entropy; log-probs of targets do not tell it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from upturn._model import Strict
from upturn.numerics import sum_by_sample
from upturn.objectives._base import Batch, Loss, values

USES_OLD = True
Coefficient = Annotated[float, Field(ge=0)]


class Config(Strict):
    """Settings; what TRL calls otherwise is named."""

    clip: float | None = Field(default=0.2, gt=0, lt=1)
    """TRL's `epsilon`: a bad draft's tokens are left alone once their ratio is below 1 - clip. None: plain ratios,
    whose gradient at the start is REINFORCE's."""
    clip_high: float | None = Field(default=None, gt=0)
    """TRL's `epsilon_high`: a good draft's tokens are left alone above 1 + clip_high. None: as `clip`."""
    kl: Coefficient | Annotated[tuple[Coefficient, ...], Field(min_length=1)] = 0.0
    """TRL's `beta`: weight of the KL term. Several: one for each turn, the last for all later turns."""
    use_bias_correction_kl: bool = True
    """Whether k3 is weighted by the ratio, which makes its gradient that of KL(policy | reference)."""
    loss_agg: Literal["token", "sequence_mean", "sequence_sum"] = "token"
    """TRL's `loss_type`: dapo, grpo, and (without its constant) dr_grpo."""

    @model_validator(mode="after")
    def _clips(self) -> Config:
        if self.clip is None and self.clip_high is not None:
            raise ValueError("clip_high has no effect without clip")
        return self


def needs(cfg: Config) -> None:
    """No rows: it learns from groups."""
    return None


def uses_reference(cfg: Config) -> bool:
    """Where some turn has a KL term."""
    return any(_coefficients(cfg))


def loss(logprobs_N: Tensor, batch: Batch, cfg: Config) -> Loss:
    """Policy loss and KL term over tokens, aggregated; metrics are means over tokens."""
    advantage_N = values(batch)[batch.owner_N]
    ratio_N = _ratio(logprobs_N, batch)
    loss_N, shown_N = _policy_loss(ratio_N, advantage_N, cfg)
    if uses_reference(cfg):
        kl_N = _k3(logprobs_N, batch)
        weight_N = _coefficient_S(batch, cfg)[batch.owner_N]
        loss_N = loss_N + weight_N * (ratio_N * kl_N if cfg.use_bias_correction_kl else kl_N)
        shown_N["kl"] = kl_N.detach()
    per_token = cfg.loss_agg == "token"
    total = loss_N.sum() if per_token else _per_draft(loss_N, batch, mean=cfg.loss_agg == "sequence_mean").sum()
    metrics = {n: v.sum() if per_token else _per_draft(v, batch, mean=True).sum() for n, v in shown_N.items()}
    return Loss(total, float(len(logprobs_N) if per_token else len(batch.num_tokens_S)), metrics)


def _ratio(logprobs_N: Tensor, batch: Batch) -> Tensor:
    if batch.old_N is None:
        raise ValueError("policy_gradient needs the log-probs of the old model, and the batch has none")
    return (logprobs_N - batch.old_N).exp()


def _policy_loss(ratio_N: Tensor, advantage_N: Tensor, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each token without its KL term, and what is shown of it."""
    plain_N, shown_N = ratio_N * advantage_N, {"advantages": advantage_N}
    if cfg.clip is None:
        return -plain_N, shown_N
    low, high = 1 - cfg.clip, 1 + (cfg.clip_high or cfg.clip)
    below_N, above_N = (ratio_N < low) & (advantage_N < 0), (ratio_N > high) & (advantage_N > 0)
    for name, clipped_N in (("low", below_N), ("high", above_N), ("region", below_N | above_N)):
        shown_N[f"clip_ratio/{name}_mean"] = clipped_N.to(ratio_N.dtype)
    return -plain_N.minimum(ratio_N.clamp(low, high) * advantage_N), shown_N


def _k3(logprobs_N: Tensor, batch: Batch) -> Tensor:
    """Estimate of KL(policy | reference) at each token, never below 0 (Schulman, 2020)."""
    if batch.reference_N is None:
        raise ValueError("the KL term of policy_gradient needs reference log-probs, and the batch has none")
    log_ratio_N = batch.reference_N - logprobs_N
    return log_ratio_N.exp() - log_ratio_N - 1


def _coefficients(cfg: Config) -> tuple[float, ...]:
    return cfg.kl if isinstance(cfg.kl, tuple) else (cfg.kl,)


def _coefficient_S(batch: Batch, cfg: Config) -> Tensor:
    """KL weight of each draft, by its turn."""
    assert batch.turn_S is not None
    per_turn = values(batch).new_tensor(_coefficients(cfg))
    return per_turn[(batch.turn_S - 1).clamp(max=len(per_turn) - 1)]


def _per_draft(values_N: Tensor, batch: Batch, *, mean: bool) -> Tensor:
    """Sum or mean over the tokens of each draft, `[S]`."""
    sums_S = sum_by_sample(values_N, batch.owner_N, len(batch.num_tokens_S))
    return sums_S / batch.num_tokens_S if mean else sums_S
