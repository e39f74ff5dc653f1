"""Rows: the samples of a pair; only the last answer is a target, and contexts hold the sampled ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from upturn.errors import DataError
from upturn.models import chat, load, policy
from upturn.numerics import sum_by_sample
from upturn.objectives import dpo, evolve, nll
from upturn.objectives._base import Row
from upturn.training import rows
from upturn.types import Draft, Pair, Prompt, Requests, Sample

EVERY: frozenset[Row] = frozenset(
    (context, side) for context in ("direct", "improve", "keep") for side in ("chosen", "rejected")
)
END = 2


def draft(index: int, *ids: int, cut: bool = False) -> Draft:
    ids = ids if cut else (*ids, END)
    return Draft(index, 1, (), "other text", ids, (0.0,) * len(ids), "length" if cut else "stop", 5, 0)


@pytest.fixture(scope="module")
def talk() -> chat.Chat:
    return chat.load(tiny.tokenizer(), (END,), Requests("again"))


@pytest.fixture
def pair() -> Pair:
    return Pair(Prompt("p", "1+1"), draft(0, 20, 21, 22), draft(1, 30, 31))


def test_rows_stand_in_one_fixed_order():
    expected = [
        ("direct", "chosen"),
        ("direct", "rejected"),
        ("improve", "chosen"),
        ("improve", "rejected"),
        ("keep", "chosen"),
        ("keep", "rejected"),
    ]
    assert rows.order(EVERY) == tuple(expected)
    assert rows.order(nll.needs(nll.Config())) == (("direct", "chosen"), ("improve", "chosen"))
    assert rows.order(dpo.needs(dpo.Config())) == (("direct", "chosen"), ("direct", "rejected"))


def test_only_the_last_answer_is_a_target_and_contexts_hold_the_sampled_ids(talk: chat.Chat, pair: Pair):
    order = rows.order(EVERY)
    samples = dict(zip(order, rows.samples_of(pair, order, talk), strict=True))
    question = talk.context("1+1", ())
    for (_, side), sample in samples.items():
        assert sample.target == getattr(pair, side).token_ids
    assert samples["direct", "chosen"].context == question
    # the texts of the drafts say something else: the ids that were sampled stand in the context, not the text
    improve, keep = samples["improve", "chosen"].context, samples["keep", "chosen"].context
    assert improve == (*question, 30, 31, END, *talk.bridges["again"])
    assert keep == (*question, 20, 21, 22, END, *talk.bridges["again"])
    assert samples["improve", "rejected"].context == improve


class TestCritiques:
    order = rows.order(nll.needs(nll.Config(keep=1, critique=1)))

    @pytest.fixture
    def judged(self, pair: Pair) -> Pair:
        return replace(pair, chosen_critique="good", rejected_critique="bad: mend")

    def test_each_draft_is_shown_with_what_is_said_of_it(self, talk: chat.Chat, judged: Pair):
        samples = dict(zip(self.order, rows.samples_of(judged, self.order, talk), strict=True))
        question, check, again = talk.context("1+1", ()), talk.bridges[talk.requests.critique], talk.bridges["again"]
        worse, better = (*question, 30, 31, END, *check), (*question, 20, 21, 22, END, *check)
        good, bad = talk.encode("good"), talk.encode("bad: mend")
        assert good[-1] == END and talk.decode(good) == "good"
        assert samples == {
            ("direct", "chosen"): Sample(question, (20, 21, 22, END)),
            ("improve", "chosen"): Sample((*worse, *bad, *again), (20, 21, 22, END)),
            ("keep", "chosen"): Sample((*better, *good, *again), (20, 21, 22, END)),
            ("critique", "chosen"): Sample(better, good),
            ("critique", "rejected"): Sample(worse, bad),
        }

    def test_training_and_sampling_have_the_same_contexts(self, talk: chat.Chat, judged: Pair):
        samples = dict(zip(self.order, rows.samples_of(judged, self.order, talk), strict=True))
        critique = Draft(2, 1, (1,), "bad: mend", talk.encode("bad: mend"), (), "stop", 0, 0, kind="critique")
        assert samples["critique", "rejected"].context == talk.context("1+1", [judged.rejected], kind="critique")
        assert samples["improve", "chosen"].context == talk.context("1+1", [judged.rejected, critique])

    def test_pairs_without_critiques_are_refused(self, talk: chat.Chat, pair: Pair):
        with pytest.raises(DataError, match="the scorer gave none"):
            rows.samples_of(pair, self.order, talk)

    def test_an_objective_without_critiques_shows_none(self, talk: chat.Chat, pair: Pair, judged: Pair):
        order = rows.order(EVERY)
        assert rows.samples_of(judged, order, talk) == rows.samples_of(pair, order, talk)


def test_a_cut_draft_is_closed_in_the_context_and_never_as_a_target(talk: chat.Chat):
    pair = Pair(Prompt("p", "1+1"), draft(0, 20), draft(1, 30, 31, cut=True))
    improve, rejected = rows.samples_of(pair, (("improve", "chosen"), ("direct", "rejected")), talk)
    assert improve.context == (*talk.context("1+1", ()), 30, 31, END, *talk.bridges["again"])
    assert rejected.target == (30, 31)


def test_a_pack_finds_every_row_and_counts_target_tokens_only(talk: chat.Chat, pair: Pair):
    order = rows.order(evolve.needs(evolve.Config()))
    other = Pair(Prompt("q", "2+2"), draft(0, 40), draft(1, 41, 42, 43))
    groups = [rows.samples_of(each, order, talk) for each in (pair, other)]
    sizes = [4, 3, 4, 3, 4, 3, 2, 4, 2, 4, 2, 4]
    reference_N = torch.cat([torch.full((size,), float(place)) for place, size in enumerate(sizes)])
    packed = rows.pack(groups, order, [pair, replace(other, p=0.7)], rows.Cached(reference_N))
    assert {row: where.tolist() for row, where in packed.batch.rows.items()} == {
        row: [place, place + 6] for place, row in enumerate(order)
    }
    assert packed.batch.num_tokens_S.tolist() == sizes
    assert torch.bincount(packed.batch.owner_N).tolist() == packed.batch.num_tokens_S.tolist()
    assert packed.tree.targets_N.tolist()[:4] == [20, 21, 22, END]
    assert packed.batch.p_P.tolist() == pytest.approx([1.0, 0.7])
    assert packed.batch.reference_S is not None
    assert packed.batch.reference_S.tolist() == [float(place * size) for place, size in enumerate(sizes)]


def test_a_tree_is_smaller_than_its_rows(talk: chat.Chat, pair: Pair):
    order = rows.order(EVERY)
    samples = rows.samples_of(pair, order, talk)
    folded = rows.pack([samples], order, [pair])
    apart = rows.pack([samples], order, [pair], share=False)
    assert rows.tree_size(samples) == len(folded.tree.ids_T) < len(apart.tree.ids_T) == folded.tree.num_row_tokens


def test_the_score_of_a_row_is_that_of_its_answer_alone(tiny_model: Path, pair: Pair):
    loaded = load.load(str(tiny_model), "float32", device="cpu")
    policy.use_plans(loaded.model)
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests("again"))
    order = rows.order(EVERY)
    packed = rows.pack([rows.samples_of(pair, order, talk)], order, [pair])
    with torch.no_grad():
        logprobs_N = policy.tree_logprobs(loaded.model, packed.tree)
        sums_S = sum_by_sample(logprobs_N, packed.batch.owner_N, 6)
    model: Any = loaded.model
    model.set_attn_implementation("eager")
    for value, sample in zip(sums_S.tolist(), rows.samples_of(pair, order, talk), strict=True):
        ids = [*sample.context, *sample.target]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        first = len(sample.context)
        answer = sum(logprobs[place - 1, ids[place]].item() for place in range(first, len(ids)))
        assert value == pytest.approx(answer, abs=1e-4)
