"""What work costs, counted and not timed: forward passes, tokens computed, bytes kept for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from upturn.engines import local, sampling
from upturn.engines._slots import BEGIN, GROW, GROW_SHARE, Slots
from upturn.models import chat, load, policy
from upturn.objectives import evolve
from upturn.strategies import chain
from upturn.training import plan, train
from upturn.training import rows as packing
from upturn.types import Draft, Pair, Prompt, Requests


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> load.Loaded:
    return load.load(str(tiny_model), "float32", device="cpu")


def talk(loaded: load.Loaded) -> chat.Chat:
    return chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))


def engine_after(loaded: load.Loaded, prompts: int, *, speculate: bool = False) -> tuple[local.Local, list[Draft]]:
    """The engine and all drafts of chains of three turns, in eight slots."""
    cfg = sampling.Config(max_new_tokens=12, temperature=1.0)
    engine = local.Local(loaded.model, talk(loaded), cfg, seed=0, slots=8, speculate=speculate)
    asked = [Prompt(f"p{place}", f"sum {place:04d}") for place in range(prompts)]
    attempts = engine.run(asked, partial(chain.generate, cfg=chain.Config(turns=3)))
    return engine, [draft for attempt in attempts for draft in attempt.drafts]


def test_generation_computes_each_token_once(loaded: load.Loaded):
    engine, drafts = engine_after(loaded, 20)
    contexts = sum(draft.prompt_tokens - draft.cached_tokens for draft in drafts)
    fed_back = sum(draft.num_tokens - 1 for draft in drafts)  # the last token of a draft is sampled and never fed
    assert engine.num_tokens_computed == contexts + fed_back
    assert contexts < sum(draft.prompt_tokens for draft in drafts)


def test_generation_is_linear_in_prompts(loaded: load.Loaded):
    (few, _), (many, _) = engine_after(loaded, 16), engine_after(loaded, 128)
    assert many.num_tokens_computed == pytest.approx(8 * few.num_tokens_computed, rel=0.15)
    assert many.num_forwards < 8 * few.num_forwards  # a fuller batch: the tail of the run is paid once


def test_slots_are_kept_full(loaded: load.Loaded):
    engine, drafts = engine_after(loaded, 64)
    assert sum(draft.num_tokens for draft in drafts) > 0.8 * 8 * engine.num_forwards


def test_speculation_never_needs_more_forward_passes(loaded: load.Loaded):
    # A slot for each chain: where slots are refilled, chains that end earlier are succeeded in another order.
    assert engine_after(loaded, 8, speculate=True)[0].num_forwards <= engine_after(loaded, 8)[0].num_forwards


def test_slots_follow_the_longest_context_in_few_steps(loaded: load.Loaded):
    config, like = loaded.model.config, next(loaded.model.parameters())
    slots = Slots(config, 2, like)
    slots.keys[:, 1, :, :100] = 3.0
    lengths = {slots.length}
    for needed in range(1, 2001):
        slots.reserve(needed)
        lengths.add(slots.length)
        assert needed <= slots.length < max(BEGIN + 1, needed * (1 + 1 / GROW_SHARE) + GROW)
    copied = sum(lengths) - slots.length
    assert copied < 2 * GROW_SHARE * 2000  # places copied by growing: some for each place that is used
    assert slots.values.shape == slots.keys.shape
    assert (slots.keys[:, 1, :, :100] == 3.0).all() and slots.keys.sum() == slots.keys[:, 1, :, :100].sum()


def pairs(loaded: load.Loaded, count: int) -> list[Pair]:
    def draft(text: str, index: int) -> Draft:
        ids = (*loaded.tokenizer(text, add_special_tokens=False)["input_ids"], 2)
        return Draft(index, 1, (), text, ids, (0.0,) * len(ids), "stop", 5, 0)

    return [
        Pair(Prompt(f"p{i}", f"sum {i:04d}"), draft(f"yes {i:04d}", 0), draft(f"no {i:04d}", 1)) for i in range(count)
    ]


def job(loaded: load.Loaded, folder: Path, count: int) -> train.Job:
    folder.mkdir()
    cfg = plan.Config(train_batch_size=count, max_tree_tokens=200, save_seconds=1e9)
    return train.Job(evolve, evolve.Config(), pairs(loaded, count), talk(loaded), cfg, 0, "test", folder)


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Tokens of every forward pass through the model's trunk."""
    sizes: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, __: sizes.append(args[0].numel()))
    try:
        yield sizes
    finally:
        hook.remove()


def test_training_computes_each_tree_token_once_for_each_model(tiny_model: Path, tmp_path: Path):
    loaded = load.load(str(tiny_model), "float32", device="cpu")
    with counted(loaded.model) as sizes:
        outcome = train.run(loaded.model, job(loaded, tmp_path / "job", 12), lambda entry: None)
    assert outcome.num_steps == 1
    assert sum(sizes) == 2 * outcome.tree_tokens  # the reference's pass and the policy's: nothing is recomputed
    assert max(sizes) <= 200
    assert outcome.row_tokens > 2 * outcome.tree_tokens


def bytes_kept(loaded: load.Loaded, batch: list[Pair]) -> int:
    """Bytes of distinct tensors that autograd keeps of one forward pass; weights do not count."""
    order = packing.order(evolve.needs(evolve.Config()))
    groups = [packing.samples_of(pair, order, talk(loaded)) for pair in batch]
    packed = packing.pack(groups, order, batch)
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in loaded.model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = policy.tree_logprobs(loaded.model, packed.tree)
    assert held.requires_grad
    return sum(kept.values())


def test_memory_follows_the_micro_batch_and_not_the_number_of_pairs(loaded: load.Loaded, tmp_path: Path):
    policy.use_plans(loaded.model)
    bytes_kept(loaded, pairs(loaded, 1))  # the first pass also tries each layer
    found = {}
    for count in (12, 96):
        everyone = pairs(loaded, count)
        order = packing.order(evolve.needs(evolve.Config()))
        sizes = [packing.tree_size(packing.samples_of(pair, order, talk(loaded))) for pair in everyone]
        cfg = plan.Config(train_batch_size=count, max_tree_tokens=200)
        batches = plan.steps(sizes, cfg, 0)[0].micro_batches
        found[count] = max(bytes_kept(loaded, [everyone[pair] for pair in batch]) for batch in batches)
    assert found[96] == pytest.approx(found[12], rel=0.1)
    assert bytes_kept(loaded, pairs(loaded, 12)) > 2 * found[12]
