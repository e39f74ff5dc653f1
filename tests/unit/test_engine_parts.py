"""What the engine does between two passes, against the plain way to say it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from upturn.engines import _graphs, _slots, sampling
from upturn.engines._passes import told
from upturn.engines._propose import Copying, begin
from upturn.engines._requests import Held, Slot, shared
from upturn.engines._slots import Slots
from upturn.models import load

few_tokens = st.lists(st.integers(0, 3), max_size=12)


@given(few_tokens, st.lists(few_tokens, min_size=1, max_size=3), st.integers(1, 4))
def test_a_pointer_follows_a_run_as_it_follows_each_token(output: list[int], drafts: list[list[int]], new: int) -> None:
    whole, single = begin(drafts, ()), begin(drafts, ())
    for size in range(1, len(output) + 1):
        single = single.follow(output[:size])
    for size in range(0, len(output), new):
        run = output[: size + new]
        whole = whole.follow(run, len(run) - size)
    assert whole == single
    assert [Copying(whole).ahead(most) for most in range(14)] == [len(whole.proposal(most)) for most in range(14)]


@given(st.lists(few_tokens, min_size=1, max_size=6), st.lists(few_tokens, min_size=1, max_size=6), st.data())
def test_the_first_slot_that_holds_most_is_found(held: list[list[int]], asked: list[list[int]], data) -> None:
    slots = [Slot(prompt=place % 4, ids=ids) for place, ids in enumerate(held)]
    index = Held(slots)
    for prompt, wanted in enumerate(asked):
        row = data.draw(st.integers(0, len(slots) - 1))
        mine = [place for place, slot in enumerate(slots) if slot.prompt == prompt]
        assert index.of(prompt) == mine
        sizes = {place: shared(slots[place].ids, wanted) for place in [row, *(mine or range(len(slots)))]}
        best = max(sizes.values())
        donor = row if sizes[row] == best else min(place for place, size in sizes.items() if size == best)
        assert index.longest_shared(wanted, row, mine) == (sizes[row], donor, best)
        slots[row].ids, slots[row].prompt = wanted, prompt
        index.changed(row)


def test_log_probs_are_rounded_as_round_does() -> None:
    halves = torch.arange(-64, 64) / 128  # their seventh place may be a tie
    logprobs = torch.cat([-torch.rand(2000) * 20, -torch.rand(2000) * 1e-5, halves, torch.tensor([-torch.inf])])
    _, rounded = told(torch.zeros(len(logprobs), dtype=torch.int32), logprobs)
    assert rounded == [round(value, 6) for value in logprobs.tolist()]


def test_uniform_numbers_are_those_of_numpys_default_generator() -> None:
    words = np.frombuffer(hashlib.sha256(b"3/p/1").digest(), dtype=np.uint64)
    assert sampling.uniforms(3, "p/1", 40).tolist() == np.random.default_rng(words).random(40).tolist()
    assert sampling.uniforms(3, "p/1", 43)[:40].tolist() == sampling.uniforms(3, "p/1", 40).tolist()


def test_a_step_moved_on_is_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_graphs, "kernels", lambda: SimpleNamespace(tile_tokens=lambda heads, kv_heads: 4))
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_attention_heads=9))
    cache = SimpleNamespace(size=9, heads=3, keys=torch.zeros(1))
    passes = _graphs.GraphPasses(SimpleNamespace(config=config), cache, sampling.Config())  # type: ignore[arg-type]
    size, numbers = passes._size(3, 3), np.array([0.1, 0.5, 1.0])
    columns = np.array([[4, 0, 7], [30, 2, 5], [1, 1, 1], [1, 1, 1]])
    moved = passes._packed(size, columns, numbers)
    columns[1] += 1
    fresh = passes._packed(size, columns, numbers)
    assert moved.tolist() != fresh.tolist()
    size.move_on(moved, 3)
    assert moved.tolist() == fresh.tolist()


def test_a_gpu_has_as_many_slots_as_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load.load(str(tiny.save(tmp_path / "model")), "float32", device="cpu").model
    assert _slots.usual(model, lambda: 10**9) == _slots.USUAL["cpu"]
    config: Any = model.config
    cache = Slots(config, 7, torch.empty((), device="meta"), 256)  # a third of the room is what 7 slots take
    like = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 4)
    away: Any = SimpleNamespace(parameters=lambda: iter([like]), config=config)
    monkeypatch.setattr(_slots, "free_on", lambda device: 3 * (cache.keys.nbytes + cache.values.nbytes))
    config.max_position_embeddings = 512
    assert _slots.usual(away, lambda: 256) == 7
    # no slot holds more than the model can read
    assert _slots.usual(away, lambda: 512) == _slots.usual(away, lambda: 10**9) == 3
    monkeypatch.setattr(_slots, "free_on", lambda device: 0)
    assert _slots.usual(away, lambda: 256) == 1
    monkeypatch.setattr(_slots, "free_on", lambda device: 2**50)
    assert _slots.usual(away, lambda: 256) == _slots.USUAL["cuda"]
