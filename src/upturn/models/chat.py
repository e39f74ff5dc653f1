"""Chat templates: how a question and the drafts shown become token ids.

conversation   question, draft, request, draft, request ...: the draft's own sampled ids stand in the context, so its
               KV cache and its tree node are shared with the direct answer. Needs a prefix-preserving template.
quoted         one user message that quotes the question and the drafts (the paper's form). Works with any template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jinja2 import TemplateError

from upturn.errors import ModelError
from upturn.types import Draft, Kind, Requests

Layout = Literal["auto", "conversation", "quoted"]
VERSION = 2
"""Raised when the rendering changes: part of every result's key."""
REMEMBERED = 4096
"""Most questions whose ids are kept."""

_MARK = "upturn0draft0mark"
QUOTED = """A user asked the QUESTION below and got the ANSWER{plural} below it.

QUESTION
{question}

{answers}
{request}"""


@dataclass(frozen=True, slots=True)
class Chat:
    """Renders contexts for one tokenizer. The same object serves training and inference."""

    tokenizer: Any
    layout: Literal["conversation", "quoted"]
    end_ids: tuple[int, ...]
    """Every id that ends an answer."""
    requests: Requests
    """What the user says behind a draft."""
    closing_id: int
    """The one of them that the template puts behind an answer: behind a draft that was cut, or written by others."""
    bridges: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Request -> ids from after a draft's end token to the start of the next draft (conversation)."""
    notice: str = ""
    """Why `auto` fell back to quoting; empty otherwise."""
    _asked: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)
    """Questions rendered lately: each turn of a chain begins with the same."""

    def context(
        self, question: str, shown: Sequence[Draft], request: str = "", kind: Kind = "answer"
    ) -> tuple[int, ...]:
        """Token ids that stand before the next draft; `request` is what leads to it, empty for the task's own."""
        if not shown:
            return self._ask(question)
        if self.layout == "quoted":
            said = self.requests.behind(shown, request, kind)[-1]
            return self._render([{"role": "user", "content": _quote(question, shown, said)}])
        ids = self._ask(question)
        for draft, said in zip(shown, self.requests.behind(shown, request, kind), strict=True):
            was_cut = draft.token_ids and not draft.complete
            ids += (*draft.token_ids, self.closing_id) if was_cut else self.target(draft)
            ids += self.bridges.get(said) or self._bridge_to(said)
        return ids

    def target(self, draft: Draft) -> tuple[int, ...]:
        """The draft's own ids; those of its text and an end token where it was written and not sampled."""
        return draft.token_ids or self.encode(draft.text)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text as an answer, with its end token."""
        return (*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.closing_id)

    def spelled(self, draft: Draft) -> Draft:
        """The draft as this tokenizer reads it: without ids where they are another model's and mean another text."""
        if not draft.token_ids or self.decode(draft.token_ids) == draft.text:
            return draft
        return replace(draft, token_ids=(), sampler_logprobs=(), num_tokens_told=draft.num_tokens)

    def _bridge_to(self, request: str) -> tuple[int, ...]:
        """Ids between a draft's end token and the next draft, for a request of the strategy's own."""
        bridge, _ = _bridge(self.tokenizer, set(self.end_ids), request)
        assert bridge is not None, "the template preserved prefixes with the task's request"
        return bridge[1:]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of an answer without special tokens and outer white space."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()

    def _ask(self, question: str) -> tuple[int, ...]:
        if (ids := self._asked.get(question)) is None:
            if len(self._asked) >= REMEMBERED:
                self._asked.clear()
            self._asked[question] = ids = self._render([{"role": "user", "content": question}])
        return ids

    def _render(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        return tuple(self.tokenizer(_text(self.tokenizer, messages), add_special_tokens=False)["input_ids"])


def load(tokenizer: Any, model_end_ids: Sequence[int], requests: Requests, layout: Layout = "auto") -> Chat:
    """Find out what the template can do. Raises ModelError where there is no chat template."""
    where = f"tokenizer of {getattr(tokenizer, 'name_or_path', '') or 'the model'}"
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            where,
            "It has no chat template, so a question cannot be told from an answer.",
            "Use an instruction-tuned model, or save a chat template with the tokenizer.",
        )
    end_ids = {*model_end_ids} | ({tokenizer.eos_token_id} - {None})
    if not end_ids:
        raise ModelError(where, "No end-of-sequence token is known.", "Set eos_token_id in generation_config.")
    ends = tuple(sorted(end_ids))
    bridge, why = (None, "") if layout == "quoted" else _bridge(tokenizer, end_ids, requests.refine)
    if bridge is not None:
        chat = Chat(tokenizer, "conversation", ends, requests, bridge[0], {requests.refine: bridge[1:]})
        return replace(chat, bridges={requests.critique: chat._bridge_to(requests.critique), **chat.bridges})
    if layout == "conversation":
        raise ModelError(where, f"The chat template is not prefix-preserving: {why}.", "Set options.layout=quoted.")
    notice = f"drafts are quoted in one message, because {why}" if why else ""
    return Chat(tokenizer, "quoted", ends, requests, _closing(tokenizer, ends, requests.refine), notice=notice)


def _closing(tokenizer: Any, ends: Sequence[int], request: str) -> int:
    """The end token that the template puts behind an answer; the tokenizer's own where it puts none."""
    try:
        behind = _history(tokenizer, request)[1].partition(_MARK)[2]
    except TemplateError:  # one for single questions only
        behind = ""
    ids: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return next(end for end in (*ids[:1], tokenizer.eos_token_id, *ends) if end in ends)


def _history(tokenizer: Any, request: str) -> tuple[str, str]:
    """A question as it is rendered, and with an answer and a request behind it."""
    question = {"role": "user", "content": "Which?"}
    behind = [{"role": "assistant", "content": _MARK}, {"role": "user", "content": request}]
    return _text(tokenizer, [question]), _text(tokenizer, [question, *behind])


def _bridge(tokenizer: Any, end_ids: set[int], request: str) -> tuple[tuple[int, ...] | None, str]:
    """Ids between the text of a draft and the next answer, or None and the reason."""
    direct, again = _history(tokenizer, request)
    head, found, tail = again.partition(_MARK)
    if not found:
        return None, "the history does not repeat a draft word for word"
    if head != direct:
        at = next((i for i, (a, b) in enumerate(zip(head, direct, strict=False)) if a != b), len(head))
        return None, f"an answer is rendered differently in history (from character {at}: {direct[at : at + 20]!r})"
    ids = tuple(tokenizer(tail, add_special_tokens=False)["input_ids"])
    if not ids or ids[0] not in end_ids:
        return None, "the history does not close a draft with an end token"
    return ids, ""


def _text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _quote(question: str, shown: Sequence[Draft], request: str) -> str:
    answers = [draft for draft in shown if draft.kind == "answer"]
    quoted = "".join(f"{_title(draft, answers)}\n{draft.text}\n\n" for draft in shown)
    return QUOTED.format(question=question, answers=quoted, request=request, plural="S" if len(answers) > 1 else "")


def _title(draft: Draft, answers: Sequence[Draft]) -> str:
    if draft.kind == "critique":
        return "CRITIQUE"
    return f"ANSWER {answers.index(draft) + 1}" if len(answers) > 1 else "ANSWER"
