"""The kernels of train.c, tiles.c, matmul.c and tree.c as functions of tensors: what training needs besides `ops`.

Axes: `T` tokens, `d` width of the model, `H` heads, `D` width of a head, `B` units of a group, `Q` and `K` their
queries and keys, `N` targets.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from upturn.models.native import build, ops

_SIGNATURES = {
    "norm_back": "iiiii" + "ppf" + "pppp" + "i",
    "silu_mul_back": "iipppp",
    "rope_back": "iiiippp",
    "spread": "iiiiippp",
    "unspread": "iiiiippp",
    "collect": "iiiipppp" + "p",
    "masked_softmax": "iiiippfp",
    "logits_seen": "iiippppp",
    "logits_back": "iiipppp",
    "add_gradient": "ippi",
    "columns_product": "iiiiippp",
    "has_matmul": "",
    "matmul": "iii" + "piipii" + "pipi",
    "squares": "ii" + "ppp",
    "has_tree_attend": "",
    "tree_attend": "ip" + "iiii" + "pf" + "pppp",
    "adamw": "i" + "pp" + "pp" + "ppp" + "fffffff",
}
_ANSWERING = ("masked_softmax", "columns_product", "has_matmul", "matmul", "has_tree_attend", "tree_attend")
PARTS = 16
"""Sums over tokens are made in so many parts, whatever the number of threads."""
PIECE = 4096
"""Squares of so many numbers are summed in fp32, those sums exactly."""
MOST_WIDTH = 512
"""The widest head that `collect` takes."""


def norm_back(x: Tensor, weight: Tensor, eps: float, g: Tensor, out: Tensor, more: Tensor | None = None) -> Tensor:
    """The gradient of `x [T, H, D]` into `out`, plus `more`, given that of its norm; returns that of the weight.

    `g`, `more` and `out` lie alike and may be one.
    """
    size, heads, width = x.shape
    sums = torch.zeros(PARTS, width)
    past = None if more is None else more.data_ptr()
    args = (x.data_ptr(), weight.data_ptr(), eps, g.data_ptr(), past, out.data_ptr(), sums.data_ptr(), PARTS)
    _library(x.dtype).norm_back(size, heads, width, x.stride(0), g.stride(0), *args)
    return sums.sum(0).to(weight.dtype)


def silu_mul_back(gate_up: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `gate_up [T, 2 f]` given that of SiLU times product, `[T, f]`, and the product itself."""
    back, product = torch.empty_like(gate_up), torch.empty_like(g)
    size, width = g.shape
    args = (gate_up.data_ptr(), g.data_ptr(), back.data_ptr(), product.data_ptr())
    _library(g.dtype).silu_mul_back(size, width, *args)
    return back, product


def rope_back_(g: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The gradient before the rotary embedding in place of the one behind it, `g [T, H, D]`."""
    size, heads, width = g.shape
    _library(g.dtype).rope_back(size, heads, width, g.stride(0), g.data_ptr(), cos.data_ptr(), sin.data_ptr())


def spread(x: Tensor, places: Tensor) -> Tensor:
    """The rows of `x [T, H, D]` named by `places [B, L]`, as `[B, H, L, D]`; 0 where a place is -1."""
    units, length = places.shape
    _, heads, width = x.shape
    out = x.new_empty(units, heads, length, width)
    args = (x.stride(0), x.data_ptr(), places.data_ptr(), out.data_ptr())
    _library(x.dtype).spread(units, length, heads, width, *args)
    return out


def unspread(x: Tensor, places: Tensor, out: Tensor) -> None:
    """Rows of `x [B, H, L, D]` to their places in `out [T, H, D]`; none is named twice, and -1 is left out."""
    units, heads, length, width = x.shape
    args = (out.stride(0), x.data_ptr(), places.data_ptr(), out.data_ptr())
    _library(x.dtype).unspread(units, length, heads, width, *args)


def collect(x: Tensor, origin: tuple[Tensor, Tensor, Tensor], out: Tensor) -> None:
    """Into each row of `out [T, H, D]` the fp32 sum of its copies in `x [rows, D]`.

    `origin`: where the copies of a row begin in the list `[T + 1]`; their rows for head 0, and the rows between heads.
    """
    size, heads, width = out.shape
    first, rows, steps = (part.data_ptr() for part in origin)
    _library(x.dtype).collect(size, heads, width, out.stride(0), x.data_ptr(), first, rows, steps, out.data_ptr())


def softmax_(scores: Tensor, seen: Tensor, scale: float, g: Tensor | None = None) -> None:
    """Scores `[B, H, Q, K]` become their softmax over the `seen [B, Q, K]`; `g`, its gradient, that of the scores."""
    back = None if g is None else g.data_ptr()
    args = (scores.data_ptr(), seen.data_ptr(), scale, back)
    if _library(scores.dtype).masked_softmax(*scores.shape, *args):
        raise MemoryError("softmax found no memory for a row")


@cache
def has_tree_attend(dtype: torch.dtype) -> bool:
    """Whether `tree_attend` takes numbers of this type here: on tiles where they are compiled for, or with AVX2."""
    return bool(_library(dtype).has_tree_attend())


def tree_attend(
    x: Tensor,
    kv_heads: int,
    units: Tensor,
    scale: float,
    out: Tensor,
    gradient: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Attention of units over `x [T, H + 2 Hkv, D]` into `out [T, H, D]`; `units` as in tree.c; widths are multiples
    of 32.

    gradient   where it is there, that of the result, `[T, H, D]`, and two `[rows, D]` that get those of the copies of
               keys and of values; `out` is like `x` then and gets that of the queries in their places
    """
    heads, width = x.shape[1] - 2 * kv_heads, x.shape[2]
    g, keys, values = (None, None, None) if gradient is None else (part.data_ptr() for part in gradient)
    args = (heads, kv_heads, width, x.stride(0), x.data_ptr(), scale, g, out.data_ptr(), keys, values)
    if _library(x.dtype).tree_attend(len(units), units.data_ptr(), *args):
        raise MemoryError("attention over a tree found no memory for its scratch space")


def logits_seen(logits: Tensor, first: int, targets: Tensor, sums: tuple[Tensor, Tensor, Tensor]) -> None:
    """Take in logits `[N, width]` of ids from `first` on: largest, sum of exponentials, the target's; `[N]` fp32."""
    args = (part.data_ptr() for part in (logits, targets, *sums))
    _library(logits.dtype).logits_seen(*logits.shape, first, *args)


def logits_back_(logits: Tensor, first: int, targets: Tensor, log_total: Tensor, g: Tensor) -> None:
    """The logits become their gradient, given that of the target's log-prob, `[N]` fp32."""
    args = (part.data_ptr() for part in (logits, targets, log_total, g))
    _library(logits.dtype).logits_back(*logits.shape, first, *args)


def product(x: Tensor, y: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """`x @ y + bias`, `[m, d], [d, n], [n] -> [m, n]`, into `out` where it is given: our own where torch's is slow."""
    if not has_matmul(x.dtype):
        return torch.mm(x, y, out=out) if bias is None else torch.addmm(bias, x, y, out=out)
    out = x.new_empty(len(x), y.shape[1]) if out is None else out
    _matmul(x, y, None if bias is None else bias.contiguous(), out, adds=False)
    return out


def add_product_(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`x @ y` is added to `total [m, n]`."""
    if not has_matmul(x.dtype):
        return torch.addmm(total, x, y, out=total)
    _matmul(x, y, None, total, adds=True)
    return total


def bmm(x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`x @ y`, `[B, m, d], [B, d, n] -> [B, m, n]`, for many small products."""
    if not has_matmul(x.dtype):
        return torch.bmm(x, y, out=out)
    found = torch.bmm(x.float(), y.float())
    return found.to(x.dtype) if out is None else out.copy_(found)


@cache
def has_matmul(dtype: torch.dtype) -> bool:
    """Whether our own products of numbers of this type are faster than torch's here."""
    return bool(_library(dtype).has_matmul()) and not ops.torch_has_bf16()


def _matmul(x: Tensor, y: Tensor, bias: Tensor | None, out: Tensor, *, adds: bool) -> None:
    fit = x.shape[1] == len(y) and out.shape == (len(x), y.shape[1]) and (bias is None or bias.shape == out.shape[1:])
    if not fit or out.stride(1) != 1 or {part.dtype for part in (x, y, out)} != {x.dtype}:
        raise ValueError(f"a product of {x.shape} and {y.shape} into {out.shape}, strides {out.stride()}")
    added = None if bias is None else bias.data_ptr()
    args = (x.data_ptr(), *x.stride(), y.data_ptr(), *y.stride(), added, int(adds), out.data_ptr(), out.stride(0))
    if _library(x.dtype).matmul(len(x), y.shape[1], x.shape[1], *args):
        raise MemoryError("a product found no memory for its factors")


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """`g.T @ x`, `[T, o], [T, i] -> [o, i]`."""
    (size, rows), columns = g.shape, x.shape[1]
    if g.dtype == torch.bfloat16 and g.stride(1) == x.stride(1) == 1:
        out = g.new_empty(rows, columns)
        args = (g.stride(0), x.stride(0), g.data_ptr(), x.data_ptr(), out.data_ptr())
        if not _library(g.dtype).columns_product(size, rows, columns, *args):
            return out
    return product(g.t(), x)


def add_gradient(g: Tensor, total: Tensor, *, is_first: bool) -> None:
    """Add a gradient to its fp32 sum, or begin the sum."""
    _library(g.dtype).add_gradient(g.numel(), g.data_ptr(), total.data_ptr(), int(is_first))


def norm_of(grad: Tensor) -> float:
    """The root of the sum of squares of a gradient, in fp32 or bf16, summed alike on any number of threads."""
    pieces = torch.empty(-(-grad.numel() // PIECE))
    _library(grad.dtype).squares(grad.numel(), PIECE, *_by_type(grad), pieces.data_ptr())
    return math.sqrt(math.fsum(pieces.tolist()))


def adamw(weight: Tensor, low: Tensor | None, state: tuple[Tensor, Tensor, Tensor], numbers: tuple[float, ...]) -> None:
    """One update by the gradient and the first moment, each in fp32 or as the weight, and the second one, in fp32.

    low       int16, the lower half of the fp32 value behind a bf16 weight
    numbers   see train.c
    """
    more = None if low is None else low.data_ptr()
    grad, first, second = state
    args = (*_by_type(grad), *_by_type(first), second.data_ptr())
    _library(weight.dtype).adamw(weight.numel(), weight.data_ptr(), more, *args, *numbers)


def _by_type(x: Tensor) -> tuple[int | None, int | None]:
    """Where numbers lie, as those kernels take them that know both types."""
    return (None, x.data_ptr()) if x.dtype == torch.float32 else (x.data_ptr(), None)


@cache
def _library(dtype: torch.dtype) -> Any:
    return build.bound(dtype, _SIGNATURES, _ANSWERING)
