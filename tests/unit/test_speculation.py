"""Speculation from the drafts shown: the same drafts in fewer forwards, and never much work for nothing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from upturn import trees
from upturn.engines import _propose, local, sampling
from upturn.engines._propose import BREAK, START, Cost, Pointer, Proposer, Tally, allot, begin, num_equal, rate
from upturn.models import chat, load, policy
from upturn.strategies import chain, few_shot, parallel, star
from upturn.tasks import carry
from upturn.types import Attempt, Draft, Kind, Prompt, Requests, Sample

END = 99


def walked(pointer: Pointer, output: Sequence[int]) -> Pointer:
    for size in range(1, len(output) + 1):
        pointer = pointer.follow(output[:size])
    return pointer


class TestPointer:
    """Where to copy from; worked by hand."""

    draft = (1, 2, 3, 4, 5, 6, 7, 8)

    def test_begins_at_the_start_and_leaves_the_end_token_to_sampling(self):
        pointer = begin([(*self.draft, END)], [END])
        assert pointer == Pointer((*self.draft, BREAK), 0, START)
        assert pointer.proposal(3) == (1, 2, 3)
        assert pointer.proposal(50) == self.draft

    def test_goes_on_while_the_output_follows(self):
        pointer = walked(begin([self.draft], [END]), [1, 2, 3])
        assert (pointer.place, pointer.matched, pointer.proposal(2)) == (3, 3, (4, 5))
        assert walked(pointer, self.draft).proposal(9) == ()

    def test_a_replaced_token_moves_it_one_place_on(self):
        pointer = walked(begin([self.draft], [END]), [1, 2, 30])
        assert (pointer.place, pointer.matched, pointer.proposal(2)) == (3, 0, (4, 5))

    def test_left_out_tokens_are_jumped(self):
        pointer = walked(begin([self.draft], [END]), [1, 2, 6])
        assert (pointer.place, pointer.matched, pointer.proposal(9)) == (6, 1, (7, 8))

    def test_new_tokens_are_waited_for(self):
        # 1 2 [30 31] 3 4: after 30 and 31 it stands two places too far, the next token of the draft brings it back
        pointer = walked(begin([self.draft], [END]), [1, 2, 30, 31, 3])
        assert (pointer.place, pointer.proposal(2)) == (3, (4, 5))

    def test_the_longest_end_of_the_output_decides(self):
        # after "7 1 2", 2 stands at places 1 (nearer), 4; only the second has 7 1 before it
        pointer = walked(begin([(9, 2, 5, 1, 2, 8, 7, 1, 2, 6)], [END]), [7, 1, 2])
        assert (pointer.place, pointer.matched, pointer.proposal(3)) == (9, 3, (6,))

    def test_of_equally_long_ones_the_nearest(self):
        source = (5, 1, 4, 4, 4, 5, 2, 4, 4, 4, 4, 4, 5, 3)
        pointer = Pointer((*source, BREAK), 7, 2).follow([8, 5])
        assert pointer.proposal(1) == (2,)

    def test_a_single_token_counts_only_nearby(self):
        draft = (1, *range(100, 130), 2, 3)
        assert walked(begin([draft], [END]), [2]).place == 1
        assert walked(begin([draft], [END]), [129, 2]).place == 32, "two tokens count anywhere"
        assert Pointer((*draft, BREAK), 10, 2).follow([7, 2]).place == 32, "2 lies 22 places on"

    def test_of_several_drafts_the_last_is_expected_and_others_are_found(self):
        pointer = begin([(1, 2, 3, END), (4, 5, 6, END)], [END])
        assert pointer.proposal(9) == (4, 5, 6)
        assert pointer.follow([2]).proposal(9) == (3,), "no proposal runs from one draft into the next"

    @pytest.mark.parametrize("drafts", [[], [()], [(END,)]])
    def test_nothing_shown_proposes_nothing(self, drafts: list[tuple[int, ...]]):
        pointer = walked(begin(drafts, [END]), [1, 2, 3])
        assert pointer.proposal(9) == ()

    @given(st.lists(st.lists(st.integers(0, 5)), max_size=3), st.lists(st.integers(0, 5), max_size=30))
    def test_never_leaves_the_drafts(self, drafts: list[list[int]], output: list[int]):
        pointer = walked(begin(drafts, [END]), output)
        proposed = pointer.proposal(4)
        assert BREAK not in proposed
        assert not proposed or any(proposed == tuple(d[i : i + len(proposed)]) for d in drafts for i in range(len(d)))
        assert pointer.matched <= len(output)

    @given(st.lists(st.integers(0, 5), min_size=1))
    def test_a_copy_is_guessed_to_the_end(self, draft: list[int]):
        for size in range(len(draft)):
            assert walked(begin([draft], [END]), draft[:size]).proposal(99) == tuple(draft[size:])


def test_num_equal_counts_up_to_the_first_miss():
    assert num_equal((1, 2, 3), (1, 2, 4, 3)) == 2
    assert num_equal((1, 2), (1, 2, 4)) == 2
    assert num_equal((), (1,)) == 0


class TestAllot:
    """How many tokens to propose."""

    def test_a_single_draft_proposes_as_long_as_a_token_pays(self):
        # free 4, one row, p 0.5: 1/5 = 0.2 < 0.5 -> 1.5/6 = 0.25 < 0.25? no: one token
        assert allot([0.5], [9], Cost(4, 0, 0), 99) == [1]
        # free 9: 0.1 < 0.5 -> 1.5/11 = 0.136 < 0.25 -> 1.75/12 = 0.146 < 0.125? no: two tokens
        assert allot([0.5], [9], Cost(9, 0, 0), 99) == [2]

    def test_a_full_batch_proposes_only_what_is_nearly_certain(self):
        # 64 rows and 32 free tokens emit 0.67 tokens per unit without proposals
        assert allot([0.6] * 64, [9] * 64, Cost(32, 0, 0), 999) == [0] * 64
        assert allot([0.9] * 64, [9] * 64, Cost(32, 0, 0), 999) == [2] * 64
        # keys are read once for all tokens of a slot: 64 / (32 + 0.4 * 64 + 64) = 0.53
        assert allot([0.6] * 64, [9] * 64, Cost(32, 0.4, 0), 999) == [1] * 64

    def test_respects_its_limits(self):
        assert allot([0.99, 0.99, 0.99], [0, 2, 40], Cost(1000, 0, 0), 20) == [0, 2, 18]
        assert allot([], [], Cost(32, 0, 0), 99) == []
        assert allot([0.99] * 3, [9] * 3, _propose.NO_SAVING, 0) == [0, 0, 0]

    @given(
        st.lists(st.tuples(st.floats(0.01, 0.99), st.integers(0, 3)), min_size=1, max_size=4),
        st.floats(0, 20),
        st.floats(0, 2),
    )
    def test_nothing_else_emits_more_per_cost(self, rows: list[tuple[float, int]], fixed: float, row: float):
        chances, limits = zip(*rows, strict=True)
        cost = Cost(fixed, row, 0)
        best = max(rate(chances, counts, cost) for counts in itertools.product(*(range(n + 1) for n in limits)))
        assert rate(chances, allot(chances, limits, cost, 99), cost) == pytest.approx(best)

    def test_the_rate_by_hand(self):
        # tokens 1 + 0.5 + 0.25 and 1; cost 4 fixed, 2 rows of 1.5, 2 proposals, 2 padded queries of 0.25
        assert rate([0.5, 0.9], [2, 0], Cost(4, 0.5, 0.25)) == pytest.approx(2.75 / (4 + 3 + 2 + 0.5))

    def test_one_long_guess_does_not_pad_a_whole_batch(self):
        chances, limits = [0.99, *[0.6] * 31], [40, *[9] * 31]
        free, padded = (allot(chances, limits, Cost(32, 0.4, pad), 999) for pad in (0, 0.3))
        assert free[0] > 10
        assert 1 <= max(padded) <= 3


class TestLearning:
    """Acceptance so far."""

    def test_what_stands_behind_a_miss_is_not_judged(self):
        tally = Tally()
        tally.add(accepted=2, proposed=5)
        assert (tally.accepted, tally.judged) == (2, 3)
        tally.add(accepted=4, proposed=4)
        assert (tally.accepted, tally.judged) == (6, 7)
        assert tally.chance(0.5) == (6 + 8 * 0.5) / (7 + 8)

    def test_misses_end_the_proposals_of_a_full_batch(self):
        proposer = Proposer(Cost(32, 0, 0))
        drafts = [_propose.Copying(begin([range(30)], [END])) for _ in range(64)]
        assert all(proposer.propose(drafts, [20] * 64)[0])
        for draft in drafts:
            proposer.learn(draft, accepted=0, proposed=1)
        assert not any(proposer.propose(drafts, [20] * 64)[0])

    def test_a_draft_is_known_better_than_its_run(self):
        proposer = Proposer(Cost(32, 0, 0))
        copies, rewrites = (_propose.Copying(begin([range(90)], [END])) for _ in range(2))
        for _ in range(5):
            proposer.learn(copies, accepted=9, proposed=9)
            proposer.learn(rewrites, accepted=0, proposed=9)
        (many, few), _ = proposer.propose([copies, rewrites], [60, 60])
        assert len(many) > 4 * len(few)


@dataclass(frozen=True, slots=True)
class Forgetful(chat.Chat):
    """Shows no draft: the next greedy answer is the same one."""

    def context(
        self, question: str, shown: Sequence[Draft], request: str = "", kind: Kind = "answer"
    ) -> tuple[int, ...]:
        return self._render([{"role": "user", "content": question}])


@pytest.fixture(scope="module")
def random_model(tiny_model: Path) -> load.Loaded:
    return load.load(str(tiny_model), "float32", device="cpu")


@pytest.fixture(scope="module")
def adder() -> load.Loaded:
    return load.load("carry", "float32", device="cpu")


def engine_of(
    loaded: load.Loaded,
    how: Mapping[str, float],
    slots: int,
    speculate: bool,
    talk: type[chat.Chat] = chat.Chat,
) -> local.Local:
    made = chat.load(loaded.tokenizer, loaded.end_ids, Requests("improve"))
    shown_as = talk(**{name: getattr(made, name) for name in chat.Chat.__dataclass_fields__})
    cfg = sampling.Config.model_validate({"max_new_tokens": 16, **how})
    return local.Local(loaded.model, shown_as, cfg, seed=0, slots=slots, speculate=speculate)


def both(
    loaded: load.Loaded, prompts: Sequence[Prompt], strategy, slots: int, **how: float
) -> tuple[list[Attempt], list[Attempt], local.Local, local.Local]:
    """Attempts with and without speculation, and the two engines."""
    rule = partial(strategy.generate, cfg=strategy.Config(turns=4))
    fast, slow = (engine_of(loaded, how, slots, speculate) for speculate in (True, False))
    return fast.run(prompts, rule), slow.run(prompts, rule), fast, slow


def check_equal(ours: Sequence[Attempt], theirs: Sequence[Attempt]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for mine, yours in zip(one.drafts, other.drafts, strict=True):
            assert mine.sampler_logprobs == pytest.approx(yours.sampler_logprobs, abs=1e-4)
            same = {"sampler_logprobs": (), "cached_tokens": 0}
            assert replace(mine, **same) == replace(yours, **same)


LONG = {"temperature": 1.0, "max_new_tokens": 120}
LETTERS = [Prompt(f"p{i}", "abcdef"[: 2 + i]) for i in range(5)]
SUMS = carry.load(carry.Config()).prompts("test", 0, 16)


class TestTheSameDrafts:
    """In float32 nothing but the work differs."""

    @pytest.mark.parametrize("slots", [1, 3, 16])
    @pytest.mark.parametrize("strategy", [chain, star, few_shot, parallel])
    def test_whatever_the_strategy(self, random_model: load.Loaded, strategy, slots: int):
        ours, theirs, fast, slow = both(random_model, LETTERS, strategy, slots, temperature=1.0)
        check_equal(ours, theirs)
        assert slow.num_proposed == 0
        assert (fast.num_proposed > 0) == (strategy is not parallel)

    @pytest.mark.parametrize(
        "how", [{"temperature": 0}, {"temperature": 0.7}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}]
    )
    @pytest.mark.parametrize("slots", [1, 3, 16])
    def test_at_any_temperature_in_fewer_forwards(self, adder: load.Loaded, how: dict[str, float], slots: int):
        ours, theirs, fast, slow = both(adder, SUMS[:6], chain, slots, **how)
        check_equal(ours, theirs)
        assert fast.num_accepted > 0.4 * fast.num_proposed > 0
        assert fast.num_forwards < 0.8 * slow.num_forwards

    def test_records_agree_where_every_prompt_has_a_slot(self, adder: load.Loaded):
        ours, theirs, _, _ = both(adder, SUMS[:16], chain, 16, temperature=0.7)
        assert [d.cached_tokens for a in ours for d in a.drafts] == [d.cached_tokens for a in theirs for d in a.drafts]

    def test_cut_drafts(self, adder: load.Loaded):
        ours, theirs, _, _ = both(adder, SUMS[:8], few_shot, 3, temperature=0.7, max_new_tokens=5)
        check_equal(ours, theirs)
        assert "length" in {draft.finish_reason for attempt in ours for draft in attempt.drafts}

    def test_a_full_context(self, tmp_path: Path):
        small = load.load(str(tiny.save(tmp_path, context=64)), "float32", device="cpu")
        ours, theirs, fast, _ = both(small, LETTERS, few_shot, 3, temperature=0)
        check_equal(ours, theirs)
        assert fast.num_accepted > 0
        assert "context" in {draft.finish_reason for attempt in ours for draft in attempt.drafts}

    def test_an_end_token_that_was_shown_inside_a_draft(self, adder: load.Loaded):
        async def generate(prompt: Prompt, sample) -> list[Draft]:
            first = await sample(prompt, shown=[])
            twice = replace(first, token_ids=first.token_ids * 2)
            return [first, await sample(prompt, shown=[twice])]

        fast, slow = (engine_of(adder, {"temperature": 0}, 4, speculate, Forgetful) for speculate in (True, False))
        ours, theirs = fast.run(SUMS, generate), slow.run(SUMS, generate)
        check_equal(ours, theirs)
        for attempt in ours:
            first, second = attempt.drafts
            assert second.token_ids == first.token_ids
            assert second.finish_reason == "stop"


class TestWork:
    """Counts, since clocks lie."""

    def test_a_full_copy_takes_a_few_forwards(self, random_model: load.Loaded):
        # the same context and the same numbers give the same draft again
        prompts = [Prompt(str(place), "abc"[: 1 + place % 3]) for place in range(30)]
        slow = engine_of(random_model, LONG, 30, False, Forgetful)
        fast = engine_of(random_model, LONG, 1, True, Forgetful)
        alone = partial(parallel.generate, cfg=parallel.Config(turns=1))
        longest = max(slow.run(prompts, alone), key=lambda attempt: attempt.drafts[0].num_tokens)

        async def again(prompt: Prompt, sample) -> list[Draft]:
            return [await sample(prompt, shown=longest.drafts)]

        (copied,) = fast.run([longest.prompt], again)
        assert copied.drafts[0].token_ids == longest.drafts[0].token_ids
        assert copied.drafts[0].num_tokens > 100
        assert fast.num_forwards <= 12
        assert fast.num_proposed == fast.num_accepted > 100 - 12

    @pytest.mark.parametrize("slots", [1, 4, 40])
    def test_nothing_in_common_costs_next_to_nothing(self, random_model: load.Loaded, slots: int):
        unknown = random_model.tokenizer.unk_token_id

        async def generate(prompt: Prompt, sample) -> list[Draft]:
            first = await sample(prompt, shown=[])
            other = replace(first, token_ids=(unknown,) * 40)
            return [first, *[await sample(prompt, shown=[other]) for _ in range(2)]]

        prompts = [Prompt(str(place), "abc"[: 1 + place % 3]) for place in range(4 + slots)]
        fast, slow = (engine_of(random_model, LONG, slots, speculate) for speculate in (True, False))
        check_equal(fast.run(prompts, generate), slow.run(prompts, generate))
        fixed = _propose.COSTS["cpu"].fixed
        cost, plain = (fixed * e.num_forwards + e.num_tokens_computed for e in (fast, slow))
        assert cost < 1.05 * plain
        assert fast.num_forwards <= slow.num_forwards

    def test_a_full_batch_proposes_less_for_each_draft(self, adder: load.Loaded):
        alone, together = (engine_of(adder, {"temperature": 0.7}, slots, speculate=True) for slots in (1, 16))
        for engine in (alone, together):
            engine.run(SUMS, partial(chain.generate, cfg=chain.Config(turns=3)))
        assert together.num_proposed < 0.9 * alone.num_proposed
        assert together.num_accepted / together.num_proposed > alone.num_accepted / alone.num_proposed

    def test_critiques_are_not_guessed_from_answers(self, adder: load.Loaded):
        async def generate(prompt: Prompt, sample) -> list[Draft]:
            first = await sample(prompt, shown=[])
            return [first, await sample(prompt, shown=[first], request="fix", kind="critique")]

        engine = engine_of(adder, {"temperature": 0.7}, 4, speculate=True)
        engine.run(SUMS[:4], generate)
        assert engine.num_proposed == 0


class TestBfloat16:
    """A logit's last bits depend on the batch's shape; what is sampled is still the model's own distribution."""

    def test_every_token_is_the_one_that_its_number_stands_for(self):
        rounded = load.load("carry", "bfloat16", device="cpu")
        attempts, plain, fast, _ = both(rounded, SUMS, chain, 8, temperature=0.7)
        assert fast.num_accepted > 0.4 * fast.num_proposed
        missed = torch.cat([_missed(rounded, fast, draft, a) for a in attempts for draft in a.drafts])
        assert missed.max() < 0.05
        assert (missed > 0).float().mean() < 0.02
        first = [(a.drafts[0].token_ids, b.drafts[0].token_ids) for a, b in zip(attempts, plain, strict=True)]
        assert sum(mine == yours for mine, yours in first) >= 0.9 * len(first)

    def test_a_run_gives_the_same_drafts_again(self):
        rounded = load.load("carry", "bfloat16", device="cpu")
        rule = partial(chain.generate, cfg=chain.Config(turns=4))
        one, other = (engine_of(rounded, {}, 8, speculate=True).run(SUMS, rule) for _ in range(2))
        assert one == other


def _missed(loaded: load.Loaded, engine: local.Local, draft: Draft, attempt: Attempt) -> torch.Tensor:
    """How far each token's uniform number lies outside the token's share of the model's distribution, `[N]`."""
    context = engine.chat.context(attempt.prompt.text, [attempt.drafts[parent] for parent in draft.parents])
    tree = trees.build([Sample(context, draft.token_ids)])
    with torch.no_grad():
        hidden_T = policy.hidden_states(loaded.model, tree.ids_T, tree.positions_T, policy.TreePlan(tree))
        logits_NV = policy.head(loaded.model, hidden_T[tree.predictors_N])
    upper_NV = (logits_NV.double() / engine.cfg.temperature).softmax(-1).cumsum(-1)
    lower_NV = torch.nn.functional.pad(upper_NV, (1, 0))[:, :-1]
    numbers = sampling.uniforms(engine.seed, f"{attempt.prompt.id}/{draft.index}", len(draft.token_ids))
    uniform_N1, place_N1 = torch.from_numpy(numbers)[:, None], tree.targets_N[:, None]
    below, above = lower_NV.gather(-1, place_N1) - uniform_N1, uniform_N1 - upper_NV.gather(-1, place_N1)
    return torch.maximum(below, above).clamp(min=0).squeeze(-1)
