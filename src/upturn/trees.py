"""Token trees: samples folded by their common prefixes, laid end to end, each token computed once.

Axes: `T` tokens of the batch, `N` target tokens, `S` samples, `R` root trees.

A token sees its ancestors and itself. With tokens in depth-first order and `end[k]` the first place after the
subtree of token k (an Euler tour), `visible(q, k)  <=>  k <= q < end[k]`. The last shared token predicts another
token for each child, so log-probs are gathered by predictor place and never by shifting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from upturn.types import Sample

SHORT = 8
"""A root is copied where it is no more than one part in so many of what its copies may hold."""


@dataclass(slots=True)
class _Node:
    ids: tuple[int, ...]
    children: dict[int, _Node] = field(default_factory=dict)
    """By the first id of the child."""
    start: int = -1
    """Flat place of the first id, once laid out."""


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
    for root, sample in zip(above, samples, strict=True):
        _insert(root, sample.context + sample.target)
    paths = [_path(root, s.context + s.target) for root, s in zip(above, samples, strict=True)]
    top = [child for root in (above[:1] if share else above) for child in root.children.values()]
    if root_tokens is not None:
        parts = {id(root): _parts(root, root_tokens) for root in top}
        paths = [[_part_of(path, parts[id(path[0])]), *path[1:]] for path in paths]
        top = [part for root in top for part in parts[id(root)]]
    return _lay_out(samples, top, paths)


def filled(tree: TokenTree, size: int) -> TokenTree:
    """The layout with more tokens behind it, up to `size`; each is a tree of its own, and predicts nothing."""
    last = len(tree.ids_T)
    more = torch.arange(last, size, device=tree.ids_T.device)
    zeros, alone = torch.zeros_like(more), tuple(Span(place, 1, place + 1, -1) for place in range(last, size))
    return replace(
        tree,
        ids_T=torch.cat([tree.ids_T, zeros]),
        positions_T=torch.cat([tree.positions_T, zeros]),
        ends_T=torch.cat([tree.ends_T, more + 1]),
        spans=tree.spans + alone,
    )


def _insert(parent: _Node, ids: tuple[int, ...]) -> None:
    """Add one row below `parent`, splitting nodes where the row leaves them."""
    at = 0
    while at < len(ids):
        node = parent.children.get(ids[at])
        if node is None:
            parent.children[ids[at]] = _Node(ids[at:])
            return
        same = _common(node.ids, ids, at)
        if same < len(node.ids):
            rest = _Node(node.ids[same:], node.children)
            node.ids, node.children = node.ids[:same], {rest.ids[0]: rest}
        parent, at = node, at + same


def _common(node_ids: tuple[int, ...], ids: tuple[int, ...], at: int) -> int:
    limit = min(len(node_ids), len(ids) - at)
    same = 0
    while same < limit and node_ids[same] == ids[at + same]:
        same += 1
    return same


def _path(root: _Node, ids: tuple[int, ...]) -> list[_Node]:
    path, at, node = [], 0, root
    while at < len(ids):
        node = node.children[ids[at]]
        path.append(node)
        at += len(node.ids)
    return path


def _parts(root: _Node, most: int) -> list[_Node]:
    """The tree as trees of at most so many tokens, with a copy of the root each; as it is where that is long itself."""
    if len(root.ids) * SHORT > most:
        return [root]
    parts, room = [_Node(root.ids)], most
    for first, child in root.children.items():
        size = _size(child)
        if size > room and parts[-1].children:
            parts.append(_Node(root.ids))
            room = most
        parts[-1].children[first] = child
        room -= size
    return parts


def _part_of(path: list[_Node], parts: list[_Node]) -> _Node:
    """The copy of a root that a path goes through."""
    return next(part for part in parts if len(path) == 1 or path[1].ids[0] in part.children)


def _size(node: _Node) -> int:
    return len(node.ids) + sum(_size(child) for child in node.children.values())


def _lay_out(samples: Sequence[Sample], top: list[_Node], paths: list[list[_Node]]) -> TokenTree:
    ids: list[int] = []
    positions: list[int] = []
    nodes: list[tuple[_Node, int]] = []  # with the place of the parent
    stack = [(root, 0, -1) for root in reversed(top)]
    while stack:
        node, depth, parent = stack.pop()
        node.start = len(ids)
        ids.extend(node.ids)
        positions.extend(range(depth, depth + len(node.ids)))
        children = reversed(node.children.values())
        stack.extend((child, depth + len(node.ids), len(nodes)) for child in children)
        nodes.append((node, parent))
    stops = [node.start + len(node.ids) for node, _ in nodes]
    for place in range(len(nodes) - 1, 0, -1):  # a subtree ends where its last child's does
        parent = nodes[place][1]
        if parent >= 0:
            stops[parent] = max(stops[parent], stops[place])
    spans = tuple(
        Span(node.start, len(node.ids), stop, parent) for (node, parent), stop in zip(nodes, stops, strict=True)
    )
    ends = [span.stop for span in spans for _ in range(span.length)]
    predictors, targets, owner = _gather(samples, paths)
    return TokenTree(
        torch.tensor(ids),
        torch.tensor(positions),
        torch.tensor(ends),
        torch.tensor(predictors, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(owner, dtype=torch.long),
        num_samples=len(samples),
        spans=spans,
        num_row_tokens=sum(len(s.context) + len(s.target) for s in samples),
    )


def _gather(samples: Sequence[Sample], paths: list[list[_Node]]) -> tuple[list[int], list[int], list[int]]:
    predictors: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for index, (sample, path) in enumerate(zip(samples, paths, strict=True)):
        places = [place for node in path for place in range(node.start, node.start + len(node.ids))]
        first = len(sample.context)
        predictors.extend(places[first - 1 : -1] if sample.target else [])
        targets.extend(sample.target)
        owner.extend([index] * len(sample.target))
    return predictors, targets, owner
