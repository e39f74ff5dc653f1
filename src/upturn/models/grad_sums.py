"""Where an optimizer that sums gradients itself gets some of them in parts, so that none exists beside its sum.

The largest weight is the one of the output layer, and its gradient is made while all activations are still held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

Parts = Iterable[Tensor]
"""A gradient cut along its first axis, in order."""
Add = Callable[[Parts], None]
_OPEN: list[dict[int, Add]] = []


@contextmanager
def into(sums: Mapping[Tensor, Add]) -> Iterator[None]:
    """Inside, the gradients of these weights may be added by the functions instead of returned to autograd."""
    _OPEN.append({id(weight): add for weight, add in sums.items()})
    try:
        yield
    finally:
        _OPEN.pop()


def adder(weight: Tensor) -> Add | None:
    """What takes the gradient of a weight, if there is such a thing now."""
    return _OPEN[-1].get(id(weight)) if _OPEN else None
