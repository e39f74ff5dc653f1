"""Slots and joined weights of a GPU's engine, as far as a CPU can tell."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from upturn.engines import _graphs, sampling
from upturn.engines._graphs import GpuSlots
from upturn.engines._slots import Slots
from upturn.errors import ModelError
from upturn.models import _common, _gpu_layer, _slow
from upturn.models._attention import How

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
CONFIG = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def plain_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    from upturn.engines import _slots

    monkeypatch.setattr(_slots.ops, "usable", lambda like: False)


def test_copies_that_wait_end_as_those_done_at_once(plain_layout: None) -> None:
    rng, like = random.Random(0), torch.empty(0)
    late, once = GpuSlots(CONFIG, 6, like, 32), Slots(CONFIG, 7, like, 32)
    for slots in (late, once):
        torch.manual_seed(0)
        slots.keys.normal_()
        slots.values.normal_()
    for _ in range(60):
        (source, target), (first, last) = rng.sample(range(6), 2), sorted(rng.sample(range(32), 2))
        for slots in (late, once):
            slots.copy(source, target, first, last)
    late.flush()
    assert torch.equal(late.keys, once.keys)
    assert torch.equal(late.values, once.values)


def test_a_large_cache_grows_by_steps(plain_layout: None, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = GpuSlots(CONFIG, 2, torch.empty(0), 64)
    slots.reserve(65)
    assert slots.length == 128
    monkeypatch.setattr(_graphs, "SMALL", 0)
    slots.reserve(129)
    assert slots.length == 160


def test_a_nucleus_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """To choose from it waits for the device, and a capture that fails would keep its memory."""
    said: list[str] = []
    monkeypatch.setattr(_slow.progress, "say", said.append)
    passes: Any = _graphs.GraphPasses(nn.Module(), GpuSlots(CONFIG, 2, torch.empty(0), 64), sampling.Config(top_p=0.9))
    size = _graphs._Size(torch.empty(0), 8, 8)
    for _ in range(_graphs.SEEN + 1):
        passes._capture(size)
    assert size.replay is None
    assert len(said) == 1
    assert "top_p" in said[0]


def test_joined_weights_follow_those_of_the_layers() -> None:
    layer: Any = LlamaForCausalLM(CONFIG).model.layers[0]
    made = _gpu_layer.GpuLayer(layer, How(0.5, None, None))
    heads = made._joined[0]
    x = torch.randn(3, 32)
    with torch.no_grad():
        layer.self_attn.k_proj.weight.mul_(2)
    made.refresh()
    parts = [part(x) for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)]
    torch.testing.assert_close(heads(x), torch.cat(parts, 1))
    assert made.is_of(layer)
    layer.self_attn.k_proj = nn.Linear(32, 16, bias=False)
    assert not made.is_of(layer)


def test_layers_that_changed_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(CONFIG)
    monkeypatch.setattr(_gpu_layer, "_computes_the_same", lambda layer: How(0.5, None, None))
    monkeypatch.setattr(_gpu_layer._memory, "free_on", lambda device: 2**30)
    held = _gpu_layer.gpu_layers(model, {})
    layers: list[Any] = _common.layers_of(model)
    first, second = layers
    before = held[second]
    first.self_attn.q_proj = nn.Sequential(nn.Linear(32, 32))
    again = _gpu_layer.gpu_layers(model, held)
    assert again == {second: before}


def test_without_room_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(_gpu_layer._memory, "free_on", lambda device: 1000)
    monkeypatch.setattr(_gpu_layer._slow.progress, "say", said.append)
    model = LlamaForCausalLM(CONFIG)
    assert not _gpu_layer.gpu_layers(model, {})
    assert not _gpu_layer.gpu_layers(model, {})
    assert len(said) == 1, "once for all runs"


def test_heads_that_the_config_does_not_promise_are_refused() -> None:
    keys = torch.zeros(1, 3, 2, 64, 8)
    place = torch.zeros(1, dtype=torch.int32)
    plan = _gpu_layer.KernelPlan(keys, keys, place, place, torch.zeros(4, 1, dtype=torch.int32), heads=4)
    k = torch.zeros(1, 2, 1, 16)
    with pytest.raises(ModelError, match="promises 4 and 2"):
        plan.attend(0, torch.zeros(1, 4, 1, 16), k, k, How(0.5, None, None))
