"""Requests and critiques: what the user said when, what a model is shown, and answers with critiques folded away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny

from upturn.models import chat
from upturn.types import Attempt, Draft, Kind, Prompt, Requests, answers

WORDS = tiny.tokenizer()


def draft(
    index: int,
    text: str,
    turn: int = 1,
    parents: tuple[int, ...] = (),
    kind: Kind = "answer",
    request: str = "",
    cut: bool = False,
) -> Draft:
    ids = (*WORDS(text, add_special_tokens=False)["input_ids"], *([] if cut else [2]))
    finish = "length" if cut else "stop"
    return Draft(index, turn, parents, text, ids, (-1.0,) * len(ids), finish, 5, 0, None, kind, request)


def spelt(ids: tuple[int, ...]) -> str:
    """The text of token ids, special ones included."""
    return str(WORDS.decode(list(ids)))


ANSWER = draft(0, "5")
CRITIQUE = draft(1, "Too big", 1, (0,), "critique", "Judge.")
REVISED = draft(2, "4", 2, (0, 1), "answer", "Mend.")
AGAIN = draft(3, "No", 2, (2,), "critique", "Judge.")
LAST = draft(4, "3", 3, (2, 3), "answer", "Mend.")
CHAIN = Attempt(Prompt("p", "2+2"), (ANSWER, CRITIQUE, REVISED, AGAIN, LAST))


SAID = Requests("Again.", "Check.")


class TestRequests:
    def test_nothing_is_said_where_nothing_is_shown(self):
        assert SAID.behind([]) == []

    def test_behind_each_draft_stands_what_led_to_the_next(self):
        assert SAID.behind([ANSWER], "Judge.") == ["Judge."]
        assert SAID.behind([ANSWER, CRITIQUE], "Mend.") == ["Judge.", "Mend."]

    def test_the_task_speaks_where_the_strategy_says_nothing(self):
        answer, critique = draft(0, "a"), draft(1, "b", kind="critique")
        assert SAID.behind([answer], kind="critique") == ["Check."]
        assert SAID.behind([answer, critique]) == ["Check.", "Again."]
        assert SAID.behind([answer, draft(1, "b"), draft(2, "c")]) == ["Again.", "Again.", "Again."]


class TestAnswers:
    def test_critiques_are_folded_into_the_answers_that_follow_them(self):
        [folded] = answers([CHAIN])
        assert [(d.index, d.turn, d.parents, d.text, d.critique) for d in folded.drafts] == [
            (0, 1, (), "5", ""),
            (1, 2, (0,), "4", "Too big"),
            (2, 3, (1,), "3", "No"),
        ]
        assert all(d.kind == "answer" for d in folded.drafts)
        assert folded.prompt == CHAIN.prompt and folded.scores == ()

    def test_the_tokens_of_a_critique_count_for_its_answer(self):
        # an answer has a digit and an end token; the critiques have 7 and 2 characters, and an end token each
        assert [d.num_tokens for d in answers([CHAIN])[0].drafts] == [2, 2 + 8, 2 + 3]
        assert [d.num_tokens for d in CHAIN.drafts] == [2, 8, 2, 3, 2]

    def test_what_was_sampled_stays_as_it_was(self):
        [folded] = answers([CHAIN])
        whole = [CHAIN.drafts[place] for place in (0, 2, 4)]
        for one, other in zip(folded.drafts, whole, strict=True):
            assert (one.token_ids, one.sampler_logprobs, one.request) == (
                other.token_ids,
                other.sampler_logprobs,
                other.request,
            )

    def test_the_context_of_a_critique_counts_for_its_answer(self):
        read = [replace(draft, prompt_tokens=10, cached_tokens=4) for draft in CHAIN.drafts]
        [folded] = answers([Attempt(CHAIN.prompt, tuple(read))])
        assert [(d.prompt_tokens, d.cached_tokens) for d in folded.drafts] == [(10, 4), (20, 8), (20, 8)]

    def test_attempts_without_critiques_stay_the_same(self):
        plain = Attempt(CHAIN.prompt, (ANSWER, draft(1, "4", 2, (0,))))
        assert answers([plain, CHAIN])[0] is plain
        assert answers(answers([CHAIN])) == answers([CHAIN])


class TestConversation:
    talk = chat.load(WORDS, [2], Requests("again"))

    def shown(self, drafts: list[Draft], request: str = "") -> str:
        return spelt(self.talk.context("2+2", drafts, request))

    def test_a_request_stands_in_place_of_the_tasks_own(self):
        assert self.shown([ANSWER]) == "<s><u>2+2<a>5</s><u>again<a>"
        assert self.shown([ANSWER], "Judge.") == "<s><u>2+2<a>5</s><u>Judge.<a>"

    def test_a_critique_is_what_the_model_said_to_its_own_request(self):
        expected = "<s><u>2+2<a>5</s><u>Judge.<a>Too big</s><u>Mend.<a>"
        assert self.shown([ANSWER, CRITIQUE], "Mend.") == expected

    def test_drafts_without_requests_of_their_own_are_followed_by_the_tasks(self):
        drafts = [draft(0, "5"), draft(1, "4")]
        assert self.shown(drafts) == "<s><u>2+2<a>5</s><u>again<a>4</s><u>again<a>"
        assert self.shown(drafts, "Mend.") == "<s><u>2+2<a>5</s><u>again<a>4</s><u>Mend.<a>"

    def test_it_equals_the_template_of_the_whole_conversation(self):
        said = [("user", "2+2"), ("assistant", "5"), ("user", "Judge."), ("assistant", "Too big"), ("user", "Mend.")]
        messages = [{"role": role, "content": content} for role, content in said]
        whole: Any = WORDS.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert list(self.talk.context("2+2", [ANSWER, CRITIQUE], "Mend.")) == whole["input_ids"]

    def test_the_context_of_a_critique_begins_the_context_of_its_answer(self):
        critique = self.talk.context("2+2", [ANSWER], "Judge.")
        answer = self.talk.context("2+2", [ANSWER, CRITIQUE], "Mend.")
        assert answer[: len(critique) + len(CRITIQUE.token_ids)] == critique + CRITIQUE.token_ids

    def test_a_cut_critique_is_closed(self):
        cut = draft(1, "Too", 1, (0,), "critique", "Judge.", cut=True)
        assert self.shown([ANSWER, cut], "Mend.") == "<s><u>2+2<a>5</s><u>Judge.<a>Too</s><u>Mend.<a>"


class TestQuoted:
    talk = chat.load(WORDS, [2], Requests("again"), "quoted")

    def shown(self, drafts: list[Draft], request: str = "") -> str:
        text = spelt(self.talk.context("2+2", drafts, request))
        assert text.startswith("<s><u>") and text.endswith("<a>") and text.count("<u>") == 1
        return text.removeprefix("<s><u>").removesuffix("<a>")

    def test_a_critique_is_quoted_under_its_own_title(self):
        assert self.shown([ANSWER, CRITIQUE], "Mend.") == (
            "A user asked the QUESTION below and got the ANSWER below it.\n\n"
            "QUESTION\n2+2\n\nANSWER\n5\n\nCRITIQUE\nToo big\n\n\nMend."
        )

    @pytest.mark.parametrize(("request_", "said"), [("", "again"), ("Judge.", "Judge.")])
    def test_a_request_stands_in_place_of_the_tasks_own(self, request_: str, said: str):
        assert self.shown([ANSWER], request_).endswith(f"ANSWER\n5\n\n\n{said}")

    def test_answers_are_numbered_and_critiques_are_not(self):
        other = draft(2, "4", 2, (0, 1))
        assert self.shown([ANSWER, CRITIQUE, other], "Mend.") == (
            "A user asked the QUESTION below and got the ANSWERS below it.\n\n"
            "QUESTION\n2+2\n\nANSWER 1\n5\n\nCRITIQUE\nToo big\n\nANSWER 2\n4\n\n\nMend."
        )
