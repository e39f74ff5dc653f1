"""Token trees: samples folded by their common prefixes, laid end to end, each token computed once.

Axes: `T` tokens of the batch, `N` target tokens, `S` samples, `R` root trees.

A token sees its ancestors and itself. With tokens in depth-first order and `end[k]` the first place after the
subtree of token k (an Euler tour), `visible(q, k)  <=>  k <= q < end[k]`. The last shared token predicts another
token for each child, so log-probs are gathered by predictor place and never by shifting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, compress, count
from operator import ne

import numpy as np
import torch
from torch import Tensor

from upturn.types import Sample

FILL = 64
"""Tokens of a span of those that fill a layout: short, so that it counts as a shallow tree."""
SHORT = 8
"""A root is copied where it is no more than one part in so many of what its copies may hold."""


@dataclass(slots=True)
class _Node:
    ids: tuple[int, ...]
    children: dict[int, _Node] = field(default_factory=dict)
    """By the first id of the child."""
    place: int = -1
    """Place in the list of spans, once laid out."""


@dataclass(frozen=True, slots=True)
class Span:
    """A node of the laid-out tree: its own tokens are `[start, start + length)`, its subtree `[start, stop)`."""

    start: int
    length: int
    stop: int
    parent: int
    """Place of the parent in the list of spans, -1 for a root."""


@dataclass(frozen=True, slots=True)
class TokenTree:
    """The layout of a batch. All tensors are int64 on one device."""

    ids_T: Tensor
    positions_T: Tensor
    """Depth in the tree, for rotary embeddings; not the flat place."""
    ends_T: Tensor
    """First flat place after the token's subtree."""
    predictors_N: Tensor
    """Flat place whose hidden state predicts the target."""
    targets_N: Tensor
    """Id of the target token."""
    owner_N: Tensor
    """The sample each target token belongs to."""
    num_samples: int
    spans: tuple[Span, ...]
    """The nodes in depth-first order."""
    num_row_tokens: int
    """Tokens of the same samples as separate rows: the logical size."""

    def to(self, device: torch.device | str) -> TokenTree:
        """The same layout on another device."""
        tensors = {
            name: moved(getattr(self, name), device)
            for name in ("ids_T", "positions_T", "ends_T", "predictors_N", "targets_N", "owner_N")
        }
        return TokenTree(**tensors, num_samples=self.num_samples, spans=self.spans, num_row_tokens=self.num_row_tokens)


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on another device; nobody waits until it is there."""
    if torch.device(device).type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def build(samples: Sequence[Sample], *, share: bool = True, root_tokens: int | None = None) -> TokenTree:
    """Fold samples into one batch.

    share         False lays every sample out as a tree of its own (separate rows), for tests and benchmarks
    root_tokens   a tree of more tokens becomes several, where their common beginning is short
    Raises ValueError for an empty context, since nothing could predict the first target token.
    """
    for place, sample in enumerate(samples):
        if not sample.context:
            raise ValueError(f"sample {place} has an empty context")
    shared = _Node(())
    above = [shared if share else _Node(()) for _ in samples]
    lasts = [_insert(root, s.context + s.target) for root, s in zip(above, samples, strict=True)]
    top = [child for root in (above[:1] if share else above) for child in root.children.values()]
    if root_tokens is not None:
        top = [part for root in top for part in _parts(root, root_tokens)]
    return _lay_out(samples, top, lasts)


def filled(tree: TokenTree, size: int) -> TokenTree:
    """The layout with more tokens behind it, up to `size`, that see only themselves and predict nothing."""
    last = len(tree.ids_T)
    if size == last:
        return tree
    more = torch.arange(last, size, device=tree.ids_T.device)
    zeros = torch.zeros_like(more)
    spans = (Span(at, min(FILL, size - at), min(at + FILL, size), -1) for at in range(last, size, FILL))
    return replace(
        tree,
        ids_T=torch.cat([tree.ids_T, zeros]),
        positions_T=torch.cat([tree.positions_T, zeros]),
        ends_T=torch.cat([tree.ends_T, more + 1]),
        spans=(*tree.spans, *spans),
    )


def _insert(parent: _Node, ids: tuple[int, ...]) -> _Node:
    """Add one row below `parent`, splitting nodes where the row leaves them. Returns the node that the row ends with;
    it stays that, since a split leaves the old node the end of its ids."""
    at = 0
    while at < len(ids):
        node = parent.children.get(ids[at])
        if node is None:
            last = parent.children[ids[at]] = _Node(ids[at:])
            return last
        same = _common(node.ids, ids[at : at + len(node.ids)])
        if same < len(node.ids):
            begin = parent.children[ids[at]] = _Node(node.ids[:same], {node.ids[same]: node})
            node.ids, node = node.ids[same:], begin
        parent, at = node, at + same
    return parent


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How much of their beginning is the same; `other` is not the longer one."""
    return len(one) if one == other else next(compress(count(), map(ne, one, other)), len(other))


def _parts(root: _Node, most: int) -> list[_Node]:
    """The tree as trees of at most so many tokens: the root with its first children, and copies of it with the others.
    As it is where the root is long itself."""
    if len(root.ids) * SHORT > most:
        return [root]
    children, root.children = root.children, {}
    parts, room = [root], most
    for first, child in children.items():
        size = _size(child)
        if size > room and parts[-1].children:
            parts.append(_Node(root.ids))
            room = most
        parts[-1].children[first] = child
        room -= size
    return parts


def _size(node: _Node) -> int:
    return len(node.ids) + sum(_size(child) for child in node.children.values())


def _lay_out(samples: Sequence[Sample], top: list[_Node], lasts: list[_Node]) -> TokenTree:
    """The nodes in depth-first order; `lasts` are those that the samples end with."""
    nodes: list[_Node] = []
    depths: list[int] = []
    parents: list[int] = []
    stack = [(root, 0, -1) for root in reversed(top)]
    while stack:
        node, depth, parent = stack.pop()
        node.place = len(nodes)
        nodes.append(node)
        depths.append(depth)
        parents.append(parent)
        below = depth + len(node.ids)
        stack.extend([(child, below, node.place) for child in reversed(node.children.values())])
    spans = _spans([len(node.ids) for node in nodes], parents)
    table = [(s.start, s.length, s.stop, s.parent, depth) for s, depth in zip(spans, depths, strict=True)]
    starts, lengths, stops, above, first = np.array(table, np.int64).reshape(-1, 5).T
    ids_T = np.fromiter(chain.from_iterable([node.ids for node in nodes]), np.int64)
    places_T = np.arange(len(ids_T), dtype=np.int64)
    before_T = places_T - 1  # the token before in a path; nothing asks what is before a root
    before_T[starts] = (starts + lengths)[above] - 1
    targets_N = _targets(samples, lasts, spans)
    owner_N = np.repeat(np.arange(len(samples), dtype=np.int64), [len(s.target) for s in samples])
    return TokenTree(
        torch.from_numpy(ids_T),
        torch.from_numpy(places_T - np.repeat(starts - first, lengths)),
        torch.from_numpy(np.repeat(stops, lengths)),
        torch.from_numpy(before_T[targets_N]),
        torch.from_numpy(ids_T[targets_N]),
        torch.from_numpy(owner_N),
        num_samples=len(samples),
        spans=spans,
        num_row_tokens=sum(len(s.context) + len(s.target) for s in samples),
    )


def _spans(lengths: list[int], parents: list[int]) -> tuple[Span, ...]:
    stops = list(accumulate(lengths))
    starts = [0, *stops[:-1]]
    for place in range(len(stops) - 1, 0, -1):  # a subtree ends where its last child's does
        if (parent := parents[place]) >= 0:
            stops[parent] = max(stops[parent], stops[place])
    return tuple(map(Span, starts, lengths, stops, parents))


def _targets(samples: Sequence[Sample], lasts: list[_Node], spans: tuple[Span, ...]) -> np.ndarray:
    """Flat places of the target tokens. Each path is known by its last node, so all is counted backwards."""
    ends, counts, total = list[int](), list[int](), 0
    for sample, last in zip(reversed(samples), reversed(lasts), strict=True):
        place, left = last.place, len(sample.target)
        while left:
            span = spans[place]
            taken = min(left, span.length)
            ends.append(span.start + span.length + total)
            counts.append(taken)
            place, left, total = span.parent, left - taken, total + taken
    backwards = np.repeat(np.array(ends, np.int64), np.array(counts, np.int64)) - np.arange(1, total + 1)
    return backwards[::-1]
