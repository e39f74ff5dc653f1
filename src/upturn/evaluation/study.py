"""What is known about one measured model, and about a run: the records that `report`, `diagnose` and `compare` show.

Every number says how many prompts it rests on and how its interval was made. The formulas are in docs/measures.md;
the functions that fill these records are in the other files of this room.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from upturn._model import Strict
from upturn.evaluation.stats import Estimate
from upturn.evaluation.summary import Label, Stage, TrainingRow
from upturn.evaluation.turns import Gain, Transition, TurnRow


class Tested(Strict):
    """A transition with its p-value corrected for all the pairs of turns that were looked at."""

    flips: Transition
    p_holm: float
    """McNemar's exact p after Holm's correction over the family."""


class Revision(Strict):
    """What one refinement did to the drafts it was shown."""

    first: int
    """Turn of the draft that was shown."""
    last: int
    """Turn of the refinement."""
    n: int
    """Prompts with both."""
    fixed: Estimate | None
    """Share right after, of the drafts wrong before and judged after (so many is its `n`); null where there is none."""
    broken: Estimate | None
    """Share wrong after, of the drafts right before and judged after (so many is its `n`); null where there is none."""
    copied: float
    """Share of drafts repeated to the letter."""
    copied_right: float | None
    """The same among drafts that were right before; null where none was."""
    copied_wrong: float | None
    """The same among drafts that were wrong before; null where none was."""
    edit_distance: float
    """Mean word edit distance (Levenshtein) over the length of the longer of the two, 0 to 1."""


class Path(Strict):
    """One way through the turns."""

    pattern: str
    """A letter per turn: r right, w wrong; 'wrrr' was wrong once and right ever after. Fewer where it ended early."""
    count: int
    """Prompts that went this way."""


Method = Literal["refine", "majority", "best of n", "resample"]
RuleName = Literal["fixed", "unchanged", "agreement", "oracle"]


class CostPoint(Strict):
    """Accuracy at a price."""

    method: Method
    """refine: turn k of the chain. majority: vote of k direct answers, where answers can vote. best of n: the best of k
    direct answers by the training scorer, where that is not the verifier (whose best of k is pass@k); of all
    of them only where that scorer may have looked at the others. resample: the k-th of k direct answers, what a chain
    of fresh answers would end with."""
    k: int
    """Turns, or direct answers: the first k of them."""
    accuracy: Estimate
    tokens: float
    """Generated tokens per prompt, all k drafts together."""
    prompt_tokens: float
    """Context tokens per prompt, all k drafts together; cached ones count."""


class StopRule(Strict):
    """When to stop refining, and what it gives."""

    name: RuleName
    """fixed: after `turns`. unchanged: at the first draft that repeats the one before. agreement: at the first draft
    whose final answer equals the one before's (left out where drafts have no final answer). oracle: at the first right
    draft (knows the truth: an upper bound)."""
    turns: int
    """The most turns it may take."""
    accuracy: Estimate
    tokens: float
    """Generated tokens per prompt."""
    mean_turns: float
    """Turns really taken, on average."""


class PassAt(Strict):
    """The chance that k direct answers hold a right one."""

    k: int
    share: Estimate


class Ceilings(Strict):
    """What a perfect chooser, the scorer, or the truth would make of the same drafts."""

    pass_at: tuple[PassAt, ...]
    """pass@k of the parallel direct answers."""
    verification_gap: Estimate | None
    """Generation-verification gap, in shares: best of n by the training scorer minus the mean direct answer
    (arXiv:2412.02674). With the verifier as scorer it is pass@n - pass@1."""
    relative_gap: float | None
    """The gap over the room above the mean direct answer; null where there is no room."""
    refinement_gap: Estimate | None
    """Refinement gap, in shares: last turn of the chain minus the vote of as many direct answers as its model was
    asked for, same prompts (arXiv:2509.00084); null where there are fewer direct answers, or answers cannot vote."""


class Drift(Strict):
    """How far a model has moved, and what it lost on the way. Over first-turn drafts unless said otherwise."""

    kl_start: float | None
    """Nats per token: KL(model || first measured model), exact per position, along turn 1 of the model's own chains."""
    kl_previous: float | None
    """The same against the model measured before."""
    length: float
    """Mean generated tokens of a direct answer, over all of them."""
    length_last: float
    """Mean tokens of the answer of the last turn, without critiques; a kept answer is as long as when it was made."""
    distinct: tuple[float | None, ...]
    """Share of distinct word n-grams, n = 1, 2, 3, over all direct answers together; null where none is so long.
    It falls with the number of answers: compare models that were measured alike."""
    entropy: float | None
    """Nats per token: mean negative log-probability of the sampled tokens under the model; the entropy itself at
    temperature 1. Null where an endpoint tells no log-probs."""
    identical: float | None
    """Share of pairs of parallel direct answers to one prompt that read the same, mean over prompts."""
    pass_large: PassAt | None
    """pass@k at the largest k that was measured."""
    reward: float | None
    """Mean score of the last turn by the scorer that trained the model, where that is not the verifier."""
    reward_first: float | None
    """The same of the first turn."""


class Progress(Strict):
    """What a model gained over the one measured before it, behind the same upstream model if any, on the same prompts.
    In shares, except the reward."""

    before: Label
    """The model measured before."""
    direct: Estimate
    """First turn against first turn."""
    last: Estimate
    """Last turn against last turn."""
    gain: Estimate
    """Refinement gain against refinement gain."""
    pass_large: PassAt | None
    """Change of pass@k at the largest k that both have."""
    reward: Estimate | None
    """Change of the training scorer's value of the last turn."""


class ModelStudy(Strict):
    """One measured model."""

    label: Label
    iteration: int
    n: int
    """Held-out prompts."""
    judged: bool
    """Whether a verifier judged any answer. Where it judged none, all that asks what is right is left out (null, or
    empty): accuracies of turns say nothing, and only rewards compare turns."""
    turns: tuple[TurnRow, ...]
    gain: Gain | None
    """Refinement gain: the last turn against the first turn of this model."""
    direct_gain: Gain | None
    """The first turn against the first turn of the model before training, on the same prompts."""
    direct_p: float | None
    """McNemar's exact two-sided p of that comparison; null where there is none."""
    base: Label | None
    """The model before training; null for itself. Behind an upstream model: the one measured behind the same."""
    tests: tuple[Tested, ...]
    """All pairs of turns."""
    revisions: tuple[Revision, ...]
    """All neighbouring turns, then the first against the last where that is another pair."""
    paths: tuple[Path, ...]
    """Most frequent first; all 2^T are counted, those with none are left out."""
    costs: tuple[CostPoint, ...]
    stops: tuple[StopRule, ...]
    ceilings: Ceilings | None
    """Null where no parallel answers were sampled."""
    control: Gain | None
    """Resample-only chain: fresh answers in place of refinements, against the chain's first turn. The null that churn
    alone would give; on the same prompts gain = control + excess."""
    excess: Estimate | None
    """Last turn of the chain minus the mean direct answer on the same prompts, in shares: what refining gives beyond
    fresh answers."""
    drift: Drift
    progress: Progress | None
    """Null for the first measured model, and for the first one behind each upstream model."""


class Advice(Strict):
    """Whether another iteration is likely to pay."""

    go_on: Literal["yes", "no", "unclear"]
    reasons: tuple[str, ...]
    """One sentence each, with its numbers."""


class Verdict(Strict):
    """Can this model refine?"""

    kind: Literal["refines", "churns", "copies", "answers", "harms", "unclear"]
    """refines: later turns are right more often, by more than fresh answers would explain. churns: drafts change, for
    better as often as for worse. copies: drafts hardly change. answers: only the first turn gained. harms: later
    turns are right less often."""
    sentence: str
    """The verdict with its numbers."""


class Study(Strict):
    """A run as it is shown."""

    name: str
    recipe: str
    model: str
    task: str
    seed: int
    status: str
    models: tuple[ModelStudy, ...]
    training: tuple[TrainingRow, ...] = ()
    stages: tuple[Stage, ...] = ()
    advice: Advice | None = Field(default=None)
    """Null where nothing was trained, or no verifier judged."""
    verdict: Verdict | None = None
    """About the last model; null where nothing was measured, or no verifier judged."""
