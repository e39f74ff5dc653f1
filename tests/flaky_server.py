"""A chat endpoint in this process that fails on purpose, the same way each time, and remembers what it said."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import struct
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

Fault = Literal["reset", "slow", "malformed", "choiceless", "error", "unfinished", "cut", "short"] | int
"""What goes wrong; a number is the HTTP status. `cut` ends below the announced length, `short` at an unsound place."""
Conversation = tuple[str, ...]
"""What was said so far, by turns the user and the assistant."""
Asked = tuple[Conversation, int]
"""A conversation and the seed of the request: what the answer is a function of."""
Plan = Callable[[Conversation, int], Fault | None]
"""Conversation and number of the try (from 1) -> what goes wrong."""

WORDS = ["one", "two", "three", "né\u2028zwei", "\N{SNOWMAN}", "five"]
"""With signs that are not ASCII, and one that ends a line in Python but not on the wire."""


def answer(asked: Asked) -> list[str]:
    """The words of the answer, 1 to 9 of them; each counts as one token."""
    digest = hashlib.sha256(json.dumps(asked).encode()).digest()
    return [digest.hex()[:8], *(WORDS[byte % len(WORDS)] for byte in digest[: digest[0] % 9])]


def text(asked: Asked) -> str:
    """The answer."""
    return " ".join(answer(asked))


def usage(asked: Asked) -> dict[str, Any]:
    """Numbers of tokens: a word is one, and all but the last message come out of the cache."""
    sizes = [len(said.split()) for said in asked[0]]
    return {
        "completion_tokens": len(answer(asked)),
        "prompt_tokens": sum(sizes),
        "prompt_tokens_details": {"cached_tokens": sum(sizes[:-1])},
    }


def first(fault: Fault, times: int = 1) -> Plan:
    """Each request goes wrong `times` times, then well."""
    return lambda conversation, tries: fault if tries <= times else None


def mix(seed: int, shares: Mapping[Fault, float]) -> Plan:
    """Faults with these shares of all requests, whatever the order in which requests come."""

    def plan(conversation: Conversation, tries: int) -> Fault | None:
        draw = random.Random(f"{seed}/{tries}/{conversation}").random()
        for fault, share in shares.items():
            draw -= share
            if draw < 0:
                return fault
        return None

    return plan


@dataclass
class FlakyServer:
    """Serves while its `with` block runs. `url` is the base url."""

    plan: Plan = lambda conversation, tries: None
    port: int = 0
    slow: float = 5.0
    """Seconds before a slow answer is sent; it counts as said."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every HTTP error."""
    retry_date_in: int | None = None
    """Seconds from the server's date to the Retry-After date of an HTTP error."""
    finish: Callable[[Conversation], str] = lambda conversation: "stop"
    tells_usage: bool = True
    tells_logprobs: bool = False
    complaint: str = "as planned"
    """The message of errors; {key} becomes the key that was sent."""

    def __post_init__(self) -> None:
        self.said: Counter[Asked] = Counter()
        """Whole answers, also those that nobody waited for."""
        self.bodies: list[dict[str, Any]] = []
        """Every request."""
        self.keys: set[str | None] = set()
        """Every Authorization header."""
        self.faults: Counter[Fault] = Counter()
        self.busy = self.most_busy = 0
        """Slow answers in the making at the same time."""
        self.errors: list[BaseException | None] = []
        self.tries: defaultdict[Asked, int] = defaultdict(int)
        self.lock, self.over = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self) -> Self:
        self.http = _Server(("127.0.0.1", self.port), _Handler)
        self.http.flaky = self
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()  # waits for every connection
        assert self.errors == []


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128
    flaky: FlakyServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # a client may hang up
            self.flaky.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        flaky = self.flaky = self.server.flaky  # type: ignore[attr-defined]
        length = int(self.headers["Content-Length"])
        if len(sent := self.rfile.read(length)) < length:
            raise ConnectionAbortedError("the client hung up before its request was whole")
        body = json.loads(sent)
        conversation = tuple(message["content"] for message in body["messages"])
        asked = (conversation, body["seed"])
        with flaky.lock:
            flaky.bodies.append(body)
            flaky.keys.add(self.headers["Authorization"])
            flaky.tries[asked] += 1
            fault = flaky.plan(conversation, flaky.tries[asked])
            if fault is not None:
                flaky.faults[fault] += 1
        self.respond(asked, body, fault)

    def respond(self, asked: Asked, body: dict[str, Any], fault: Fault | None) -> None:
        if self.path != "/v1/chat/completions":
            fault = 404
        if fault == "reset":
            self.reset()
        elif isinstance(fault, int):
            self.refuse(fault)
        elif fault in ("cut", "short"):
            self.send_part(*self.whole(asked, body), announced=fault == "cut")
        elif fault in (None, "slow"):
            if fault == "slow":
                self.dawdle()
            with self.flaky.lock:
                self.flaky.said[asked] += 1
            self.send(200, *self.whole(asked, body))
        else:
            self.send(200, *self.spoilt(asked, body, fault))

    def dawdle(self) -> None:
        with self.flaky.lock:
            self.flaky.busy += 1
            self.flaky.most_busy = max(self.flaky.most_busy, self.flaky.busy)
        self.flaky.over.wait(self.flaky.slow)
        with self.flaky.lock:  # before the answer, or the next request could already be here
            self.flaky.busy -= 1

    def whole(self, asked: Asked, body: dict[str, Any]) -> tuple[bytes, str]:
        finish, words = self.flaky.finish(asked[0]), answer(asked)
        logprobs = {"content": [{"token": word, "logprob": -0.25} for word in words]}
        told = {"logprobs": logprobs} if self.flaky.tells_logprobs else {}
        tail = {"usage": usage(asked)} if self.flaky.tells_usage else {}
        if not body.get("stream"):
            choice = {"message": {"role": "assistant", "content": text(asked)}, "finish_reason": finish} | told
            return _json({"choices": [choice]} | tail), "application/json"
        pieces: list[dict[str, Any]] = [{"choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]}]
        said = text(asked)
        middle = len(said) // 2
        pieces.append({"choices": [{"delta": {"content": said[:middle]}} | told]})
        pieces.append({"choices": [{"delta": {"content": said[middle:]}}]})
        pieces.append({"choices": [{"delta": {}, "finish_reason": finish}]})
        if tail and body.get("stream_options", {}).get("include_usage"):
            pieces.append({"choices": []} | tail)
        return _events(pieces), "text/event-stream; charset=utf-8"

    def spoilt(self, asked: Asked, body: dict[str, Any], fault: Fault | None) -> tuple[bytes, str]:
        """A success without an answer."""
        whole, kind = self.whole(asked, body)
        if fault == "malformed":
            return whole.replace(b'"choices": [', b'"choices": ', 1), kind
        data: dict[str, Any] = {"usage": usage(asked)}
        if fault == "unfinished":
            data["choices"] = [{"message" if "json" in kind else "delta": {"content": "half an"}}]
        if fault == "error":
            data["error"] = {"message": self.complaint(), "code": 500}
        return (_json(data) if "json" in kind else _events([data])), kind

    def complaint(self) -> str:
        return self.flaky.complaint.format(key=(self.headers["Authorization"] or "").removeprefix("Bearer "))

    def refuse(self, status: int) -> None:
        headers = dict(self.flaky.headers)
        if self.flaky.retry_date_in is not None:
            now = 1_700_000_000  # far from the real date: only the difference may count
            headers |= {"Date": formatdate(now, usegmt=True)}
            headers |= {"Retry-After": formatdate(now + self.flaky.retry_date_in, usegmt=True)}
        self.send(status, _json({"error": {"message": self.complaint()}}), "application/json", headers)

    def send(self, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_part(self, body: bytes, kind: str, *, announced: bool) -> None:
        """Half a body, then the end of the connection."""
        self.close_connection = True
        self.send_response_only(200)
        self.send_header("Content-Type", kind)
        if announced:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[: len(body) * 2 // 3])

    def reset(self) -> None:
        """Close without a word, so that the client sees a reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def _json(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode()


def _events(pieces: list[dict[str, Any]]) -> bytes:
    data = b"".join(b"data: " + _json(piece) + b"\n\n" for piece in pieces)
    return b": a comment\n\n" + data + b"data: [DONE]\n\n"
