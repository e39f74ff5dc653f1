"""Pairs -> samples -> one packed batch: which rows an objective needs, and where each stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from upturn import trees
from upturn.models.chat import Chat
from upturn.objectives._base import CONTEXTS, SIDES, Batch, Row
from upturn.types import Pair, Sample

Rows = tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """The samples of some pairs as one token tree, with what an objective reads."""

    tree: trees.TokenTree
    batch: Batch


def order(needs: frozenset[Row]) -> Rows:
    """The needed rows in one fixed order."""
    return tuple((context, side) for context in CONTEXTS for side in SIDES if (context, side) in needs)


def samples_of(pair: Pair, rows: Rows, chat: Chat) -> list[Sample]:
    """The samples of one pair. Targets are the sampled ids; only the last answer is a target."""
    shown = {"direct": (), "improve": (pair.rejected,), "keep": (pair.chosen,)}
    contexts = {c: chat.context(pair.prompt.text, shown[c]) for c in {context for context, _ in rows}}
    return [Sample(contexts[context], getattr(pair, side).token_ids) for context, side in rows]


def tree_size(samples: Sequence[Sample]) -> int:
    """Tokens of the samples once folded."""
    return len(trees.build(samples).ids_T)


def pack(
    groups: Sequence[Sequence[Sample]],
    rows: Rows,
    p: Sequence[float],
    reference: Sequence[Sequence[float]] | None,
    *,
    share: bool = True,
) -> Packed:
    """One batch of several pairs, each given as its samples in the order of `rows`."""
    flat = [sample for group in groups for sample in group]
    tree = trees.build(flat, share=share)
    first = torch.arange(len(groups)) * len(rows)
    batch = Batch(
        owner_N=tree.owner_N,
        num_tokens_S=torch.tensor([len(sample.target) for sample in flat]),
        rows={row: first + place for place, row in enumerate(rows)},
        p_P=torch.tensor(p, dtype=torch.float32),
        reference_S=None if reference is None else torch.tensor([v for r in reference for v in r]),
    )
    return Packed(tree, batch)


def to_device(packed: Packed, device: torch.device) -> Packed:
    """The same batch on another device."""
    if device.type == "cpu":
        return packed
    old = packed.batch
    batch = Batch(
        owner_N=old.owner_N.to(device),
        num_tokens_S=old.num_tokens_S.to(device),
        rows={row: where.to(device) for row, where in old.rows.items()},
        p_P=old.p_P.to(device),
        reference_S=None if old.reference_S is None else old.reference_S.to(device),
    )
    return Packed(packed.tree.to(device), batch)
