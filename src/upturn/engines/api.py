"""Drafts from any OpenAI-compatible chat endpoint: vLLM, SGLang, llama.cpp, a hosted model.

A draft is one request and one whole answer to it. What goes wrong on the way (no connection, a rate limit, half a
body) is asked for again, with the same body and the same seed, and only a whole answer becomes a draft: none is lost,
none counts twice. Token ids are not told by an endpoint, so its drafts can be judged and measured, not trained on.

    UPTURN_API_KEY, else OPENAI_API_KEY     the key, where the endpoint wants one
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
from collections.abc import Awaitable, Callable, Sequence
from importlib.util import find_spec
from itertools import count
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from upturn._model import Strict
from upturn.engines import _base, _wire, sampling
from upturn.engines._base import Generate
from upturn.engines._wire import Again, Answer
from upturn.errors import DataError, RunError
from upturn.types import Attempt, Draft, FinishReason, Kind, Prompt, Requests

if TYPE_CHECKING:
    import httpx

KEYS = ("UPTURN_API_KEY", "OPENAI_API_KEY")
FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
_PATH = "/chat/completions"
_MEND_KEY = f"Set {KEYS[0]} (or {KEYS[1]}) to a key that this endpoint takes for this model."
_MEND_PLACE = "Check the endpoint's url and model."
_MENDS = {401: _MEND_KEY, 403: _MEND_KEY, 404: _MEND_PLACE, 405: _MEND_PLACE}
"""Statuses that every prompt would get, unless one was answered."""
_PASSING = {408, 425, 429}
"""Statuses below 500 that the same request need not get again."""
LONGEST_PAUSE = 600.0
"""Seconds; where the endpoint asks for more than that, the prompt is given up."""
TOLD_PAUSE = 10.0
"""Seconds; the first longer pause is told, or the run would seem to hang."""
_HALF = re.compile(r"[\ud800-\udfff]")
"""Half of a surrogate pair, which no UTF-8 can write."""


class Endpoint(Strict):
    """Where the model answers, and how patiently it is asked."""

    url: str
    """Base url such as http://localhost:8000/v1, with or without /chat/completions."""
    model: str = Field(min_length=1)
    """The model's name at the endpoint."""
    concurrency: int = Field(default=16, ge=1)
    """Most prompts, and most requests, under way at the same time."""
    max_retries: int = Field(default=6, ge=0, le=100)
    """How often a request is repeated before its prompt is given up."""
    timeout: float = Field(default=60, gt=0)
    """Seconds without a byte after which a request counts as lost: the whole answer's time unless it is streamed."""
    stream: bool = False
    """Let the answer come in pieces, for long answers behind impatient proxies."""
    retry_base: float = Field(default=0.5, ge=0)
    """Longest pause before the first repetition, in seconds; it doubles each time."""
    retry_cap: float = Field(default=30, ge=0)
    """Longest pause before any repetition, in seconds, where the endpoint asks for none."""

    @field_validator("url")
    @classmethod
    def _can_be_asked(cls, url: str) -> str:
        parts = urlsplit(url)  # reading the port may raise ValueError, too
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("write it like http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(f"leave out user, password and query; the key is read from {KEYS[0]}")
        return url

    @property
    def chat_url(self) -> str:
        """Where requests go."""
        return self.url.rstrip("/").removesuffix(_PATH) + _PATH


class _Refused(Exception):
    """This prompt gets no answer."""


class Api:
    """Engine over an endpoint. Counts and `failures` speak of the last run, `notice` and `answered` of all runs."""

    def __init__(
        self,
        endpoint: Endpoint,
        requests: Requests,
        cfg: sampling.Config,
        *,
        seed: int,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`requests` are what the user says behind a draft; `say` gets a line for the user.

        Raises RunError without httpx or with a broken key.
        """
        if find_spec("httpx") is None:
            mend = "Install it with: pip install 'upturn[api]'"
            raise RunError(endpoint.chat_url, "Asking an endpoint needs the package 'httpx'.", mend)
        self.endpoint, self.requests, self.cfg, self.seed = endpoint, requests, cfg, seed
        self.notice = ""
        """What the endpoint does not tell; empty where it tells all."""
        self.answered = False
        """Whether a whole answer came: a refused key, url or model then is the fault of the prompt."""
        self.answered_earlier = False
        """Whether one came to an earlier process, whose key may have been another."""
        self._key, self._sleep, self._say, self._told = _key(), sleep, say, False
        self._reset()

    def _reset(self) -> None:
        self.failures: dict[str, str] = {}
        """Prompt id -> the last reason, for every prompt that has no attempt."""
        self.num_requests = 0
        self.num_retries = 0
        self.num_drafts = 0
        """Whole answers taken, those of prompts that failed later included."""
        self._heard = False

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Every question must say something that can be sent, else DataError for the first that does not.

        Lengths are known to the endpoint only.
        """
        _base.refuse_empty(prompts)
        _refuse_halves(prompts)

    def run(
        self,
        prompts: Sequence[Prompt],
        generate: Generate,
        on_draft: Callable[[Draft], None] = lambda draft: None,
        on_attempt: Callable[[Attempt], None] = lambda attempt: None,
    ) -> list[Attempt]:
        """Run a strategy over all prompts: attempts in the order of the prompts, without those in `failures`.

        `on_attempt` gets each attempt as soon as it is whole, since its answers are paid for. Raises RunError where the
        endpoint refuses the key, the url or the model before it ever answered.
        """
        self._reset()
        self._on_draft, self._on_attempt = on_draft, on_attempt
        return _base.outside_loops(lambda: asyncio.run(self._run(prompts, generate)))

    async def _run(self, prompts: Sequence[Prompt], generate: Generate) -> list[Attempt]:
        import httpx

        self._prompts = asyncio.Semaphore(self.endpoint.concurrency)  # later turns come before new prompts
        self._requests = asyncio.Semaphore(self.endpoint.concurrency)
        limits = httpx.Limits(max_connections=self.endpoint.concurrency)
        async with httpx.AsyncClient(headers=self._headers(), timeout=self.endpoint.timeout, limits=limits) as client:
            self._client = client
            tasks = [asyncio.create_task(self._attempt(prompt, generate)) for prompt in prompts]
            try:
                attempts = await asyncio.gather(*tasks)
            finally:
                await _stop(tasks)
        return [attempt for attempt in attempts if attempt]

    def _headers(self) -> dict[str, str]:
        key = self._key.get_secret_value()
        return {"Authorization": f"Bearer {key}"} if key else {}

    async def _attempt(self, prompt: Prompt, generate: Generate) -> Attempt | None:
        calls: list[asyncio.Task[Draft]] = []

        async def sample(prompt: Prompt, shown: Sequence[Draft], request: str = "", kind: Kind = "answer") -> Draft:
            asked = self._draft(prompt, shown, len(calls), request, kind)
            calls.append(asyncio.create_task(asked))
            return await calls[-1]

        async with self._prompts:
            try:
                attempt = Attempt(prompt, tuple(await generate(prompt, sample)))
            except _Refused as error:
                self.failures[prompt.id] = str(error)
                return None
            finally:  # siblings of a failed draft would go on asking
                await _stop(calls)
            self._on_attempt(attempt)
            return attempt

    async def _draft(self, prompt: Prompt, shown: Sequence[Draft], index: int, request: str, kind: Kind) -> Draft:
        body = self._body(prompt, shown, index, request, kind)
        async with self._requests:
            answer = await self._answer(body)
        if answer.finish_reason not in FINISH:
            raise _Refused(self._clean(f"the endpoint ended draft {index + 1} with {answer.finish_reason!r}"))
        if answer.num_tokens is None:
            self.notice = "the endpoint does not tell numbers of tokens; they count as 0"
        draft = Draft(
            index=index,
            turn=_base.next_turn(shown, kind),
            parents=tuple(draft.index for draft in shown),
            text=answer.text,
            token_ids=(),
            sampler_logprobs=answer.logprobs,
            finish_reason=FINISH[answer.finish_reason],
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            num_tokens_told=answer.num_tokens,
            kind=kind,
            request=request,
        )
        self.num_drafts += 1
        self._on_draft(draft)
        return draft

    def _body(self, prompt: Prompt, shown: Sequence[Draft], index: int, request: str, kind: Kind) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt.text}]
        for draft, said in zip(shown, self.requests.behind(shown, request, kind), strict=True):
            messages.append({"role": "assistant", "content": draft.text})
            messages.append({"role": "user", "content": said})
        body = {
            "model": self.endpoint.model,
            "messages": messages,
            "temperature": self.cfg.temperature,
            "top_p": self.cfg.top_p,
            "max_tokens": self.cfg.max_new_tokens or 256,
            "seed": draft_seed(self.seed, prompt.id, index),
        }
        return body | ({"stream": True, "stream_options": {"include_usage": True}} if self.endpoint.stream else {})

    async def _answer(self, body: dict[str, Any]) -> Answer:
        """The one whole answer to a request, however often it has to be made."""
        for tries in count(1):
            try:
                return await self._ask(body)
            except Again as error:
                # Where the endpoint was never heard and one prompt has waited in vain, the others need not.
                if tries > self.endpoint.max_retries or (self.failures and not self._heard):
                    times = f"after {tries} requests" if tries > 1 else "after 1 request"
                    raise _Refused(f"{self._clean(str(error))}, {times}") from None
                await self._pause(error, tries)
        raise AssertionError("count never ends")

    async def _pause(self, error: Again, tries: int) -> None:
        """Wait before the next request, as long as the endpoint asks for; the first long pause is told."""
        says = self._clean(str(error))
        if error.floor > LONGEST_PAUSE:
            raise _Refused(f"{says}; the endpoint asks for a pause of {error.floor:.0f} s (Retry-After)")
        longest = min(self.endpoint.retry_cap, self.endpoint.retry_base * 2.0 ** (tries - 1))
        pause = error.floor + random.uniform(0, longest)
        if pause > TOLD_PAUSE and not self._told:
            self._told = True
            self._say(f"{says}; the next request waits {pause:.0f} s. Later pauses are not told.")
        self.num_retries += 1
        await self._sleep(pause)

    async def _ask(self, body: dict[str, Any]) -> Answer:
        import httpx

        self.num_requests += 1
        try:
            response = await self._client.post(self.endpoint.chat_url, json=body)
        except httpx.TimeoutException:
            raise Again(f"no answer within {self.endpoint.timeout:g} s") from None
        except httpx.ConnectError as error:
            raise Again(f"no connection: {error}") from None
        except httpx.RequestError as error:
            raise Again(f"the connection broke off: {str(error) or type(error).__name__}") from None
        self._heard = True
        if response.is_success:
            kind = response.headers.get("content-type", "")
            answer = _wire.read(response.content, streamed="event-stream" in kind)
            self.answered = True
            return answer
        raise self._refusal(response)

    def _refusal(self, response: httpx.Response) -> Exception:
        """What an HTTP status other than success means."""
        status = response.status_code
        says = self._clean(f"HTTP {status}: {_wire.complaint(response.content) or response.reason_phrase}")
        answered = self.answered or (self.answered_earlier and status != 401)  # 401: this key is wrong
        if not answered and (status < 400 or status in _MENDS):
            return RunError(self.endpoint.chat_url, says, _MENDS.get(status, _MEND_PLACE))
        if status >= 500 or status in _PASSING:
            return Again(says, _wire.retry_after(response.headers))
        return _Refused(says)

    def _clean(self, text: str) -> str:
        """One short line without the key, which endpoints like to repeat. It goes before the text is cut."""
        key = self._key.get_secret_value()
        return " ".join((text.replace(key, "***") if key else text).split())[:300]


def draft_seed(seed: int, prompt_id: str, index: int) -> int:
    """The seed sent with a draft's request, in [0, 2^31): equal calls give equal seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id}/{index}".encode()).digest()[:4]) >> 1


def _refuse_halves(prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if half := _HALF.search(prompt.id + prompt.text):
            name = prompt.id.encode(errors="backslashreplace").decode()
            what = f"It holds {half[0]!a}, half of a sign that takes two, and cannot be sent."
            raise DataError(f"prompt {name}", what, "Take it out, or write the whole sign.")


def _key() -> SecretStr:
    name = next((name for name in KEYS if os.environ.get(name)), KEYS[0])
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):  # an HTTP library would repeat such a key in its message
        raise RunError(name, "It holds signs that no key can have.", "Set it to the key alone.")
    return SecretStr(key)


async def _stop(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
