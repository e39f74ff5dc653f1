"""The engine: same seed, same drafts, whatever else is in the batch; log-probs are the model's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from upturn import trees
from upturn.engines import local, sampling
from upturn.models import _attention, chat, load, policy
from upturn.strategies import chain, few_shot, parallel
from upturn.types import Attempt, Prompt, Requests, Sample

PROMPTS = [Prompt(f"p{i}", "abcdefghij"[: 2 + i]) for i in range(7)]


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> load.Loaded:
    return load.load(str(tiny_model), "float32", device="cpu")


def sample(
    loaded: load.Loaded,
    prompts: list[Prompt],
    strategy=chain,
    *,
    slots: int = 4,
    seed: int = 0,
    turns: int = 3,
    layout: chat.Layout = "auto",
    **how: float,
) -> list[Attempt]:
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"), layout)
    cfg = sampling.Config.model_validate({"max_new_tokens": 12, "temperature": 1.0} | how)
    engine = local.Local(loaded.model, talk, cfg, seed=seed, slots=slots)
    return engine.run(prompts, partial(strategy.generate, cfg=strategy.Config(turns=turns)))


@pytest.mark.parametrize("strategy", [chain, parallel, few_shot])
def test_drafts_do_not_depend_on_slots_or_neighbours(loaded: load.Loaded, strategy):
    together = sample(loaded, PROMPTS, strategy, slots=5)
    for place, prompt in enumerate(PROMPTS):
        alone = sample(loaded, [prompt], strategy, slots=1)[0]
        assert [d.token_ids for d in alone.drafts] == [d.token_ids for d in together[place].drafts]


def test_another_seed_gives_other_drafts(loaded: load.Loaded):
    one, other = sample(loaded, PROMPTS), sample(loaded, PROMPTS, seed=1)
    assert [a.drafts[0].token_ids for a in one] != [a.drafts[0].token_ids for a in other]


@pytest.mark.parametrize("layout", ["conversation", "quoted"])
def test_sampler_logprobs_are_the_models_own(loaded: load.Loaded, layout: chat.Layout):
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"), layout)
    for attempt in sample(loaded, PROMPTS, layout=layout, temperature=0.7, top_p=0.9):
        for draft in attempt.drafts:
            shown = [attempt.drafts[parent] for parent in draft.parents]
            context = talk.context(attempt.prompt.text, shown)
            assert len(context) == draft.prompt_tokens
            tree = trees.build([Sample(context, draft.token_ids)])
            with torch.no_grad():
                again = policy.tree_logprobs(loaded.model, tree)
            torch.testing.assert_close(torch.tensor(draft.sampler_logprobs), again, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slots", [1, 3])
def test_sampler_logprobs_behind_many_keys(loaded: load.Loaded, slots: int):
    asked = [Prompt(f"long{i}", "abcdefgh" * (48 + i)) for i in range(3)]  # beyond PLAIN_KEYS, short of the context
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))
    for attempt in sample(loaded, asked, slots=slots, turns=2):
        for draft in attempt.drafts:
            assert draft.prompt_tokens > _attention.PLAIN_KEYS
            shown = [attempt.drafts[parent] for parent in draft.parents]
            row = Sample(talk.context(attempt.prompt.text, shown), talk.target(draft))
            with torch.no_grad():
                again = policy.tree_logprobs(loaded.model, trees.build([row]))
            torch.testing.assert_close(torch.tensor(draft.sampler_logprobs), again, rtol=1e-4, atol=1e-4)


def test_greedy_equals_generate(loaded: load.Loaded):
    drafts = [attempt.drafts[0] for attempt in sample(loaded, PROMPTS, turns=1, temperature=0)]
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))
    loaded.model.set_attn_implementation("eager")  # type: ignore[operator]
    for prompt, draft in zip(PROMPTS, drafts, strict=True):
        ids = torch.tensor([talk.context(prompt.text, ())])
        out = loaded.model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        assert tuple(out[0, ids.shape[1] :].tolist()) == draft.token_ids


def test_a_chain_reuses_the_question_and_the_first_draft(loaded: load.Loaded):
    for attempt in sample(loaded, PROMPTS):
        first, second, third = attempt.drafts
        assert (first.turn, second.turn, third.turn) == (1, 2, 3)
        assert (first.parents, second.parents, third.parents) == ((), (0,), (1,))
        assert second.cached_tokens >= first.prompt_tokens + len(first.token_ids) - 1
        assert third.cached_tokens >= first.prompt_tokens


class Forgetful(local.Local):
    """Computes every greedy draft anew."""

    def _finish(self, request: Any, reason: Any) -> None:
        super()._finish(request, reason)
        self._answers.clear()


@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("strategy", [chain, parallel])
def test_a_greedy_draft_is_computed_once_for_a_context(loaded: load.Loaded, strategy: Any, slots: int):
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))
    engines = [
        kind(loaded.model, talk, sampling.Config(max_new_tokens=2, temperature=0), seed=0, slots=slots)
        for kind in (local.Local, Forgetful)
    ]
    rule = partial(strategy.generate, cfg=strategy.Config(turns=8))
    ours, theirs = (engine.run(PROMPTS, rule) for engine in engines)
    for one, other in zip(ours, theirs, strict=True):
        assert [d.token_ids for d in one.drafts] == [d.token_ids for d in other.drafts]
        contexts = {talk.context(one.prompt.text, [one.drafts[place] for place in d.parents]) for d in one.drafts}
        known = [draft for draft in one.drafts if draft.cached_tokens == draft.prompt_tokens]
        assert len(known) == len(one.drafts) - len(contexts)
    assert engines[0].num_tokens_computed < engines[1].num_tokens_computed


def test_greedy_prompts_that_are_equal_run_side_by_side(loaded: load.Loaded):
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))
    forwards = list[int]()
    for texts in ("abcdefgh", "aaaaaaaa"):
        engine = local.Local(loaded.model, talk, sampling.Config(max_new_tokens=12, temperature=0), seed=0, slots=8)
        prompts = [Prompt(f"p{place}", letter) for place, letter in enumerate(texts)]
        engine.run(prompts, partial(chain.generate, cfg=chain.Config(turns=2)))
        forwards.append(engine.num_forwards)
    assert forwards[1] < 2 * forwards[0], "eight times as many one by one"


def test_a_draft_can_be_read_while_it_grows(loaded: load.Loaded):
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))
    engine = local.Local(loaded.model, talk, sampling.Config(max_new_tokens=12), seed=0, slots=1)
    told: list[tuple[int, ...]] = []
    chains = partial(chain.generate, cfg=chain.Config(turns=2))
    [attempt] = engine.run(PROMPTS[:1], chains, on_tokens=lambda ids: told.append((*ids,)))
    first, second = (draft.token_ids for draft in attempt.drafts)
    assert told[: len(first)] == [first[: 1 + place] for place in range(len(first))]
    assert told[-1] == second and told[len(first)] == second[: len(told[len(first)])]


def test_the_end_token_is_there_only_if_it_was_sampled(loaded: load.Loaded):
    seen = set()
    for attempt in sample(loaded, [Prompt(str(i), "xyz"[: 1 + i % 3]) for i in range(40)]):
        for draft in attempt.drafts:
            seen.add(draft.finish_reason)
            assert (draft.token_ids[-1] == loaded.tokenizer.eos_token_id) == (draft.finish_reason == "stop")
    assert seen == {"stop", "length"}


def test_a_full_context_ends_drafts_with_that_reason(tmp_path: Path):
    small = load.load(str(tiny.save(tmp_path, context=24)), "float32", device="cpu")
    attempt = sample(small, [Prompt("p", "0123456789")], temperature=1.5)[0]
    assert attempt.drafts[-1].finish_reason == "context"


def test_inversion_draws_from_the_right_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)
    uniform = torch.from_numpy(sampling.uniforms(0, "draws", 20_000))
    chosen, logprobs = sampling.choose(logits, uniform, temperature=0.5, top_p=1.0)
    shares = torch.bincount(chosen, minlength=4) / 20_000
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(0), rtol=0, atol=0.01)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_rows_are_chosen_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch, top_p: float):
    logits, uniform = torch.randn(10, 1000), torch.rand(10)
    whole = sampling.choose(logits, uniform, 0.7, top_p)
    monkeypatch.setattr(sampling, "CHUNK", {"cpu": 3000})
    for one, other in zip(whole, sampling.choose(logits, uniform, 0.7, top_p), strict=True):
        assert torch.equal(one, other)


def test_the_nucleus_keeps_the_smallest_sufficient_set():
    # probabilities .6 .3 .08 .02: top_p 0.7 needs the first two
    logits = torch.tensor([[0.6, 0.3, 0.08, 0.02]]).log().repeat(1000, 1)
    chosen, _ = sampling.choose(logits, torch.linspace(0, 0.9999, 1000), temperature=1.0, top_p=0.7)
    assert set(chosen.tolist()) == {0, 1}
    assert (chosen == 0).float().mean().item() == pytest.approx(2 / 3, abs=0.01)
