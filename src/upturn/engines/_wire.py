"""What an OpenAI-compatible endpoint says: whole answers, streams, errors, and when to come back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic import AliasChoices, BaseModel, Field, ValidationError


class Again(Exception):
    """No answer, but the same request may get one, after `floor` seconds at least."""

    def __init__(self, reason: str, floor: float = 0.0) -> None:
        super().__init__(reason)
        self.floor = floor


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer."""

    text: str
    finish_reason: str
    logprobs: tuple[float, ...]
    """Of each token; empty where the endpoint does not tell them."""
    num_tokens: int | None
    """Tokens generated; None where the endpoint does not tell."""
    prompt_tokens: int
    cached_tokens: int


class _Details(BaseModel):
    cached_tokens: int | None = None


class _Usage(BaseModel):
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Message(BaseModel):
    content: str | None = None


class _Logprob(BaseModel):
    logprob: float


class _Logprobs(BaseModel):
    content: list[_Logprob] | None = None


class _Choice(BaseModel):
    message: _Message | None = Field(default=None, validation_alias=AliasChoices("message", "delta"))
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Chunk(BaseModel):
    """A piece of a streamed answer. An answer that is not streamed is one piece."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


def read(body: bytes, *, streamed: bool) -> Answer:
    """The answer in the body of a success. Raises Again where it is not whole."""
    return _join([_chunk(piece) for piece in (_pieces(body) if streamed else [body])])


def _pieces(body: bytes) -> list[bytes]:
    """The data of server-sent events; bytes, since text also ends lines at signs that stand in answers (U+2028)."""
    pieces = [line[5:].strip() for line in body.splitlines() if line.startswith(b"data:")]
    if not pieces or pieces[-1] != b"[DONE]":
        raise Again("the stream broke off")
    return pieces[:-1]


def _chunk(piece: bytes) -> _Chunk:
    try:
        chunk = _Chunk.model_validate_json(piece)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Again(f"the answer is malformed: {where}{': ' if where else ''}{first['msg']}") from None
    if chunk.error:
        raise Again(f"the endpoint failed: {complaint(piece)}")
    return chunk


def _join(chunks: Sequence[_Chunk]) -> Answer:
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    if not choices:
        raise Again("the answer has no choices")
    reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
    if not reasons:
        raise Again("the answer has no finish_reason")
    usage = next((chunk.usage for chunk in reversed(chunks) if chunk.usage), _Usage())
    details = usage.prompt_tokens_details or _Details()
    told = [choice.logprobs.content or [] for choice in choices if choice.logprobs]
    return Answer(
        text="".join(choice.message.content or "" for choice in choices if choice.message).strip(),
        finish_reason=reasons[-1],
        logprobs=tuple(round(token.logprob, 6) for tokens in told for token in tokens),
        num_tokens=usage.completion_tokens,
        prompt_tokens=usage.prompt_tokens or 0,
        cached_tokens=details.cached_tokens or 0,
    )


def complaint(body: bytes) -> str:
    """What an error body says; empty where it is not JSON, as from a gateway."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of a `Retry-After` header (RFC 9110, 10.2.3): a number, or a date, by the endpoint's own clock."""
    asked = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d*)?", asked):
        return float(asked)
    until, now = _date(asked), _date(headers.get("date", "")) or datetime.now(UTC)
    return max(0.0, (until - now).total_seconds()) if until else 0.0


def _date(text: str) -> datetime | None:
    """A date in one of the three forms of HTTP. They all mean GMT, and one does not say so (RFC 9110, 5.6.7)."""
    try:
        date = parsedate_to_datetime(text)
        return date if date.tzinfo else date.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
