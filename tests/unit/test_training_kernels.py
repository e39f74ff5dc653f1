"""The kernels of a training against autograd: norm, gate, rotation, attention over trees, output layer, products."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from test_fused_training import TYPES, assert_near, counted, forest, native
from torch import nn

from upturn import numerics
from upturn.models import _memory, _output_layer
from upturn.models._tree_attention import Heads, attend, attend_back
from upturn.models._tree_plan import TreePlan
from upturn.models.native import back

pytestmark = native


@pytest.mark.parametrize("dtype", TYPES)
def test_norm_has_the_gradient_of_autograd(dtype: torch.dtype):
    torch.manual_seed(0)
    x, weight, g, more = (torch.randn(*size).to(dtype) for size in ((50, 3, 20), (20,), (50, 3, 20), (50, 3, 20)))
    inputs = [part.double().requires_grad_() for part in (x, weight)]
    y = inputs[0] * (inputs[0].square().mean(-1, keepdim=True) + 1e-3).rsqrt() * inputs[1]
    g_x, g_weight = torch.autograd.grad(y, inputs, g.double())
    found = torch.empty_like(g)
    assert_near(back.norm_back(x, weight, 1e-3, g, found, more), g_weight, dtype)
    assert_near(found, g_x + more, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_gate_and_rotation_have_the_gradients_of_autograd(dtype: torch.dtype):
    torch.manual_seed(0)
    gate_up, g, heads, g_heads = (torch.randn(*s).to(dtype) for s in ((30, 40), (30, 20), (30, 2, 8), (30, 2, 8)))
    wide = gate_up.double().requires_grad_()
    product = nn.functional.silu(wide[:, :20]) * wide[:, 20:]
    found, again = back.silu_mul_back(gate_up, g)
    assert_near(found, torch.autograd.grad(product, wide, g.double())[0], dtype)
    assert_near(again, product.detach(), dtype)
    angle = torch.rand(30, 4).repeat(1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    x = heads.double().requires_grad_()
    turned = x * cos[:, None] + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin[:, None]
    expected = torch.autograd.grad(turned, x, g_heads.double())[0]
    back.rope_back_(g_heads, cos, sin)
    assert_near(g_heads, expected, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("width", [8, 32, 96])
@pytest.mark.parametrize("lengths", [(20, 9), (260, 70)])
@pytest.mark.parametrize("kv", [1, 2, 6])
def test_attention_has_the_gradient_of_autograd(
    dtype: torch.dtype, window: int | None, width: int, lengths: tuple[int, int], kv: int
):
    torch.manual_seed(0)
    tree = forest(*lengths)
    size, plan = len(tree.ids_T), TreePlan(tree, flex=False)
    qkv, g = torch.randn(size, 6 + 2 * kv, width).to(dtype), torch.randn(size, 6, width).to(dtype)
    wide = qkv.double().requires_grad_()
    q, k, v = wide.transpose(0, 1).split((6, kv, kv))
    places, depth = torch.arange(size), tree.positions_T
    seen = (places <= places[:, None]) & (places[:, None] < tree.ends_T)
    seen &= depth[:, None] - depth < (window or size)
    k, v = (part.repeat_interleave(6 // kv, 0) for part in (k, v))
    expected = ((q @ k.mT * 0.3).masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    heads = Heads(qkv, kv)
    assert_near(attend(heads, plan.units(window), 0.3), expected.detach(), dtype)
    found = attend_back(heads, g, plan.units(window), plan.copies(kv), 0.3)
    assert_near(found.all, torch.autograd.grad(expected, wide, g.double())[0], dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_without_targets_there_is_no_gradient(dtype: torch.dtype):
    hidden, weight = (torch.zeros(size, 32, dtype=dtype, requires_grad=True) for size in (0, 64))
    _output_layer.logprobs(hidden, weight, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("dtype", TYPES)
def test_the_output_layer_equals_the_plain_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    monkeypatch.setattr(_output_layer, "IDS", 40)  # the last part is smaller
    inputs = [torch.randn(30, 16).to(dtype).requires_grad_(), torch.randn(100, 16).to(dtype).requires_grad_()]
    targets, g = torch.randint(100, (30,)), torch.randn(30)
    found = _output_layer.logprobs(inputs[0], inputs[1], targets)
    expected = numerics.token_logprobs(inputs[0], targets, lambda hidden: hidden @ inputs[1].t())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*(torch.autograd.grad(y, inputs, g) for y in (found, expected)), strict=True):
        assert_near(mine, theirs, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_logits_kept_or_made_again_have_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    monkeypatch.setattr(_output_layer, "IDS", 40)  # three parts
    made, product = Counter[str](), back.product
    monkeypatch.setattr(back, "product", partial(counted, made, product))
    inputs = [torch.randn(30, 16).to(dtype).requires_grad_(), torch.randn(100, 16).to(dtype).requires_grad_()]
    found: list[tuple[torch.Tensor, ...]] = []
    counts: list[int] = []
    for free in (2**40, 0):
        monkeypatch.setattr(_memory, "free", lambda free=free: free)
        made.clear()
        out = _output_layer.logprobs(inputs[0], inputs[1], torch.arange(30)).square().sum()
        found.append(torch.autograd.grad(out, inputs, retain_graph=True))
        counts.append(made["calls"])
        found.append(torch.autograd.grad(out, inputs))  # what was kept is used up
    assert counts[1] - counts[0] == 3
    assert all(torch.equal(one, other) for again in found[1:] for one, other in zip(found[0], again, strict=True))


def test_without_gradients_no_logits_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_memory, "may_keep", lambda size, device: pytest.fail("for whom?"))
    with torch.no_grad():
        _output_layer.logprobs(torch.randn(3, 16), torch.randn(100, 16).requires_grad_(), torch.arange(3))


@pytest.mark.parametrize("size", [1, 31, 32, 200, 3000])
@pytest.mark.parametrize("rows", [40, 64, 160])
def test_weight_gradients_on_tiles_are_products(size: int, rows: int):
    torch.manual_seed(0)
    g, x = torch.randn(size, rows + 32).bfloat16()[:, 32:], torch.randn(size, 96).bfloat16()
    assert_near(back.weight_gradient(g, x), g.double().t() @ x.double(), torch.bfloat16)
