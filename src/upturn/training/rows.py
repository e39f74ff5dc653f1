"""Pairs or groups -> samples -> one packed batch: which samples an objective reads, and where each stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upturn import trees
from upturn.errors import DataError
from upturn.models.chat import Chat
from upturn.numerics import sum_by_sample
from upturn.objectives._base import CONTEXTS, SIDES, Batch, Context, Row, Side
from upturn.types import Draft, Example, Group, Pair, Sample, written_critique

Rows = tuple[Row, ...]
SHOWN: dict[Context, Side] = {"improve": "rejected", "keep": "chosen"}
"""The side whose answer a context shows."""


@dataclass(frozen=True, slots=True)
class Packed:
    """The samples of some examples as one token tree, with what an objective reads."""

    tree: trees.TokenTree
    batch: Batch


@dataclass(frozen=True, slots=True)
class Cached:
    """Log-probs of some examples' target tokens under models that do not learn, `[N]` each, in the packed order."""

    reference_N: Tensor | None = None
    old_N: Tensor | None = None


def order(needs: frozenset[Row] | None) -> Rows:
    """The needed rows in one fixed order; none for groups."""
    return tuple((context, side) for context in CONTEXTS for side in SIDES if (context, side) in (needs or ()))


def samples_of(example: Example, rows: Rows, chat: Chat) -> list[Sample]:
    """The samples of one example. Targets are the sampled ids; only the last answer is a target."""
    if isinstance(example, Group):
        return _drafts(example, chat)
    question, critiques = example.prompt.text, any(context == "critique" for context, _ in rows)
    samples: list[Sample] = []
    for context, side in rows:
        answer = getattr(example, side)
        if context == "critique":
            said = _critique(example, side)
            samples.append(Sample(chat.context(question, (answer,), kind="critique"), chat.target(said)))
        else:
            shown = () if context == "direct" else _shown(example, SHOWN[context], critiques=critiques)
            samples.append(Sample(chat.context(question, shown), chat.target(answer)))
    return samples


def _shown(pair: Pair, side: Side, *, critiques: bool) -> tuple[Draft, ...]:
    """A side's answer, and what is said of it."""
    answer: Draft = getattr(pair, side)
    return (answer, _critique(pair, side)) if critiques else (answer,)


def _critique(pair: Pair, side: Side) -> Draft:
    """What the verifier says of a side's answer."""
    answer: Draft = getattr(pair, side)
    if not (said := getattr(pair, f"{side}_critique")):
        raise DataError(
            f"prompt {pair.prompt.id}",
            "The objective learns critiques, and the scorer gave none.",
            "Set nll.critique to 0 and refine by another strategy, or use a task whose verifier gives critiques: "
            "keywords with scorer exact does.",
        )
    return written_critique(answer, said)


def _drafts(group: Group, chat: Chat) -> list[Sample]:
    """Each draft that has a value, in its own context."""
    by_index = {draft.index: draft for draft in group.attempt.drafts}
    learnt = [d for d, value in zip(group.attempt.drafts, group.values, strict=True) if value is not None]
    if any(draft.critique or draft.kept for draft in learnt):
        raise DataError(
            f"prompt {group.attempt.prompt.id}",
            "An answer that followed a critique cannot be learnt from: its context lacks the critique's tokens.",
            "Sample with a strategy without critiques.",
        )
    question = group.attempt.prompt.text
    contexts = (chat.context(question, [by_index[i] for i in d.parents], d.request, d.kind) for d in learnt)
    return [Sample(context, chat.target(draft)) for context, draft in zip(contexts, learnt, strict=True)]


def tree_size(samples: Sequence[Sample]) -> int:
    """Tokens of the samples once folded."""
    return len(trees.build(samples).ids_T)


def num_targets(samples: Sequence[Sample]) -> int:
    """Target tokens of the samples."""
    return sum(len(sample.target) for sample in samples)


def pack(
    groups: Sequence[Sequence[Sample]],
    rows: Rows,
    examples: Sequence[Example],
    cached: Cached = Cached(),
    *,
    share: bool = True,
    root_tokens: int | None = None,
) -> Packed:
    """One batch of several examples, each given as its samples: in the order of `rows`, or of its drafts. What `share`
    and `root_tokens` say: see `trees.build`."""
    flat = [sample for group in groups for sample in group]
    tree = trees.build(flat, share=share, root_tokens=root_tokens)
    first, reference_N = torch.arange(len(groups)) * len(rows), cached.reference_N
    batch = Batch(
        owner_N=tree.owner_N,
        num_tokens_S=torch.bincount(tree.owner_N, minlength=len(flat)),
        rows={row: first + place for place, row in enumerate(rows)},
        p_P=torch.tensor([e.p for e in examples if isinstance(e, Pair)], dtype=torch.float32),
        reference_N=reference_N,
        reference_S=None if reference_N is None else sum_by_sample(reference_N, tree.owner_N, len(flat)),
        old_N=cached.old_N,
    )
    return Packed(tree, batch if rows else _with_values(batch, [e for e in examples if isinstance(e, Group)]))


def _with_values(batch: Batch, groups: Sequence[Group]) -> Batch:
    """What is known of each draft of the groups."""
    known = [
        (value, draft.turn, place)
        for place, group in enumerate(groups)
        for draft, value in zip(group.attempt.drafts, group.values, strict=True)
        if value is not None
    ]
    value, turn, group = zip(*known, strict=True)
    return replace(
        batch,
        value_S=torch.tensor(value, dtype=torch.float32),
        turn_S=torch.tensor(turn),
        group_S=torch.tensor(group),
    )


def root_tokens(device: torch.device) -> int | None:
    """How long trees should be on a device. On CUDA one program sums the gradients of 128 keys over all that see them:
    with one template above all examples it would take longer than everything else."""
    return 1024 if device.type == "cuda" else None


def to_device(packed: Packed, device: torch.device) -> Packed:
    """The same batch on another device."""
    if device.type == "cpu":
        return packed
    batch = packed.batch
    names = ("owner_N", "num_tokens_S", "p_P", "reference_S", "reference_N", "old_N", "value_S", "turn_S", "group_S")
    tensors = {name: trees.moved(value, device) for name in names if (value := getattr(batch, name)) is not None}
    rows = {row: trees.moved(where, device) for row, where in batch.rows.items()}
    return Packed(packed.tree.to(device), replace(batch, rows=rows, **tensors))
