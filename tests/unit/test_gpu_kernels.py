"""Kernels of a GPU against torch; without a GPU too, where Triton is there and TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed"),
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU, and TRITON_INTERPRET is not 1"),
    pytest.mark.filterwarnings("default"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
TYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]  # the interpreter has no bfloat16 products
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
HEADS, KV_HEADS, WIDTH, LENGTH = 6, 2, 24, 160
RUNS = [(2, 0, 100, 1), (0, 1, 0, 5), (1, 6, 67, 5)]
"""Slot, first token, its place, and how many: a draft that goes on, a context, and a guess."""


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def is_close(found: Tensor, wanted: Tensor) -> bool:
    scale = wanted.float().abs().max()
    return bool((found.float() - wanted.float()).abs().max() <= CLOSE[found.dtype] * scale)


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    return wide if weight is None else wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


@pytest.mark.parametrize("dtype", TYPES)
def test_norm_adds_and_scales(dtype: torch.dtype) -> None:
    from upturn.models.native import gpu

    x, more, weight = numbers(5, 96, dtype=dtype), numbers(5, 96, dtype=dtype), numbers(96, dtype=dtype)
    total, out = gpu.norm(x, weight, 1e-5, more)
    assert torch.equal(total, x + more)
    assert is_close(out, rms(x + more, weight, 1e-5))
    assert is_close(gpu.norm(x, weight, 1e-5)[1], rms(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", TYPES)
def test_gate(dtype: torch.dtype) -> None:
    from upturn.models.native import gpu

    gate, up = numbers(4, 1300, dtype=dtype), numbers(4, 1300, dtype=dtype)
    assert is_close(gpu.silu_mul(torch.cat([gate, up], 1)), torch.nn.functional.silu(gate.float()) * up.float())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("cap", "window"), [(0.0, 0), (5.0, 0), (0.0, 40)])
def test_heads_turn_go_to_their_slots_and_attend(dtype: torch.dtype, normed: bool, cap: float, window: int) -> None:
    from upturn.models.native import gpu

    keys, values = (numbers(3, KV_HEADS, LENGTH, WIDTH, dtype=dtype) for _ in range(2))
    tokens = sum(run[3] for run in RUNS)
    joined = numbers(tokens, (HEADS + 2 * KV_HEADS) * WIDTH, dtype=dtype)
    cos, sin = (numbers(tokens, WIDTH, dtype=dtype) for _ in range(2))
    norms = [numbers(WIDTH, dtype=dtype) if normed else None for _ in range(2)]
    slot = torch.tensor([run[0] for run in RUNS for _ in range(run[3])], device=DEVICE)
    place = torch.tensor([run[2] + i for run in RUNS for i in range(run[3])], device=DEVICE)
    q, k, v = joined.view(tokens, -1, WIDTH).split((HEADS, KV_HEADS, KV_HEADS), 1)
    q, k = (_turned(rms(x, norm, 1e-6), cos, sin) for x, norm in zip((q, k), norms, strict=True))
    wanted_keys, wanted_values = keys.clone(), values.clone()
    wanted_keys[slot, :, place], wanted_values[slot, :, place] = k.to(dtype), v

    turn = gpu.Turn(cos, sin, norms[0], norms[1], (1e-6, 1e-6))
    gpu.turn_and_keep(joined, turn, (slot.int(), place.int()), (keys, values), HEADS)
    assert is_close(keys, wanted_keys)
    assert torch.equal(values, wanted_values)
    turned = joined.view(tokens, -1, WIDTH)[:, :HEADS]
    assert is_close(turned, q)
    out = torch.full((tokens, HEADS, WIDTH), float("nan"), dtype=dtype, device=DEVICE)
    gpu.attend(turned, _tiles(gpu), (keys, values), (WIDTH**-0.5, cap, window), out)
    assert is_close(out, _attended(turned, keys, values, (slot, place), (cap, window)))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = WIDTH // 2
    across = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos.float()[:, None] + across * sin.float()[:, None]


def _tiles(gpu: Any) -> Tensor:
    most = gpu.tile_tokens(HEADS, KV_HEADS)
    cut = [(s, f + i, p + i, min(most, c - i)) for s, f, p, c in RUNS for i in range(0, c, most)]
    return torch.tensor([*cut, (0, 0, 0, 0)], dtype=torch.int32, device=DEVICE).t().contiguous()


def _attended(q: Tensor, keys: Tensor, values: Tensor, where: tuple[Tensor, Tensor], how: tuple[float, int]) -> Tensor:
    """Token by token, in fp32."""
    (slot, place), (cap, window), rows = where, how, []
    for token in range(len(q)):
        at, last = int(slot[token]), int(place[token])
        first = max(0, last - window + 1) if window else 0
        k, v = (x[at, :, first : last + 1].float().repeat_interleave(HEADS // KV_HEADS, 0) for x in (keys, values))
        scores = torch.einsum("hd,hkd->hk", q[token].float(), k) * WIDTH**-0.5
        scores = cap * torch.tanh(scores / cap) if cap else scores
        rows.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), v))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_tokens_are_those_of_the_sampler(dtype: torch.dtype, temperature: float) -> None:
    from upturn.engines import sampling
    from upturn.models.native import gpu_sample

    logits, uniform = 3 * numbers(7, 5000, dtype=dtype), torch.rand(7, device=DEVICE)
    chosen, logprobs = gpu_sample.sample(logits, uniform, temperature)
    wanted, wanted_logprobs = sampling._choose(logits, uniform, temperature, 1.0)
    assert chosen.tolist() == wanted.tolist()
    assert torch.allclose(logprobs, wanted_logprobs, atol=1e-5)


def test_the_ends_of_a_distribution_are_tokens_of_it() -> None:
    from upturn.models.native import gpu_sample

    logits = torch.full((2, 5000), float("-inf"), device=DEVICE)
    logits[:, 7], logits[:, 4321] = 0.0, 1.0
    chosen, _ = gpu_sample.sample(logits, torch.tensor([0.0, 1 - 2**-24], device=DEVICE), 1.0)
    assert chosen.tolist() == [7, 4321]


def test_logits_that_are_no_numbers_choose_a_token() -> None:
    from upturn.models.native import gpu_sample

    logits = torch.full((2, 100), float("nan"), device=DEVICE)
    for temperature in (0.0, 1.0):
        chosen, _ = gpu_sample.sample(logits, torch.full((2,), 0.5, device=DEVICE), temperature)
        assert all(0 <= token < 100 for token in chosen.tolist())


@pytest.mark.parametrize(("width", "bytes_each", "count"), [(64, 2, 64), (128, 2, 64), (256, 2, 32), (256, 4, 16)])
def test_keys_fit_into_a_gpu(width: int, bytes_each: int, count: int) -> None:
    from upturn.models.native import gpu

    assert gpu.keys_at_once(width, bytes_each) == count
