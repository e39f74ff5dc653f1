"""Chat templates: prefix-preserving ones share drafts, others are quoted, missing ones are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny

from upturn.errors import ModelError
from upturn.models import chat
from upturn.types import Draft, Requests

STRIPS_HISTORY = tiny.TEMPLATE.replace("<a>{{ m['content'] }}", "<a>{{ m['content'] | upper }}")
OTHER_PREFIX = tiny.TEMPLATE.replace("{% if add_generation_prompt %}<a>", "{% if add_generation_prompt %}<a> ")


def draft(text: str, words: Any, finish: str = "stop") -> Draft:
    ids = tuple(words(text, add_special_tokens=False)["input_ids"]) + ((2,) if finish == "stop" else ())
    return Draft(0, 1, (), text, ids, (0.0,) * len(ids), finish, 3, 0)  # type: ignore[arg-type]


def test_a_conversation_holds_the_sampled_ids_and_begins_like_the_direct_question():
    words = tiny.tokenizer()
    talk = chat.load(words, [2], Requests("again"))
    answer = draft("yes", words)
    direct, again = talk.context("Which?", ()), talk.context("Which?", (answer,))
    assert talk.layout == "conversation" and not talk.notice
    assert again[: len(direct) + len(answer.token_ids)] == direct + answer.token_ids
    assert words.decode(list(again)) == "<s><u>Which?<a>yes</s><u>again<a>"


def test_a_cut_draft_is_closed_in_the_history():
    words = tiny.tokenizer()
    talk = chat.load(words, [2], Requests("again"))
    shown = talk.context("Which?", (draft("yes", words, "length"),))
    assert words.decode(list(shown)) == "<s><u>Which?<a>yes</s><u>again<a>"


def test_the_rendering_equals_the_template_of_the_whole_conversation():
    words = tiny.tokenizer()
    talk = chat.load(words, [2], Requests("again"))
    messages = [
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "again"},
    ]
    whole: Any = words.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert list(talk.context("Which?", (draft("yes", words),))) == whole["input_ids"]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (STRIPS_HISTORY, "word for word"),
        (OTHER_PREFIX, "rendered differently"),
        (tiny.TEMPLATE.replace("</s>", ""), "end token"),
    ],
)
def test_a_template_that_is_not_prefix_preserving_is_quoted_with_a_notice(template: str, why: str):
    words = tiny.tokenizer(template)
    talk = chat.load(words, [2], Requests("again"))
    assert talk.layout == "quoted" and why in talk.notice
    shown = words.decode(list(talk.context("Which?", (draft("yes", words),))))
    assert "QUESTION\nWhich?" in shown and "ANSWER\nyes" in shown and "again" in shown
    with pytest.raises(ModelError, match="prefix-preserving"):
        chat.load(words, [2], Requests("again"), "conversation")


def test_a_written_answer_ends_as_the_template_ends_one():
    """The smallest end token is another one here, and what sampling ends with is the template's, in both layouts."""
    words = tiny.tokenizer(tiny.TEMPLATE.replace("</s>", "<a>"))
    closing = words.get_vocab()["<a>"]
    for layout in ("conversation", "quoted"):
        talk = chat.load(words, [2, closing], Requests("again"), layout)
        assert talk.encode("yes")[-1] == closing > 2
    single = "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}" + tiny.TEMPLATE
    assert chat.load(tiny.tokenizer(single), [2, closing], Requests("again"), "quoted").encode("yes")[-1] == 2


def test_another_models_ids_are_no_ids():
    words = tiny.tokenizer()
    talk = chat.load(words, [2], Requests("again"))
    own = draft("yes", words)
    assert talk.spelled(own) is own
    other = replace(own, text="no")
    found = talk.spelled(other)
    assert (found.token_ids, found.sampler_logprobs, found.num_tokens) == ((), (), own.num_tokens)
    assert talk.target(found) == talk.encode("no")
    assert words.decode(list(talk.context("Which?", (replace(found, finish_reason="length"),)))) == (
        "<s><u>Which?<a>no</s><u>again<a>"
    )


def test_a_missing_template_is_refused():
    with pytest.raises(ModelError, match="no chat template"):
        chat.load(tiny.tokenizer(None), [2], Requests("again"))
