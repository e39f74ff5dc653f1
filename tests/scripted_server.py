"""A chat endpoint whose models refine by a script: what `diagnose` must tell apart."""

from __future__ import annotations

import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

MODELS = {"copies": 0.5, "churns": 0.5, "refines": 0.5, "answers": 0.7, "base": 0.4}
"""Name -> chance that a direct answer is right."""


def answer(model: str, messages: list[dict[str, str]], seed: int) -> str:
    """An answer to a `keywords` prompt. The models differ in what they do with the draft they are shown."""
    rng = random.Random(f"{model} {seed}")
    words = re.findall(r'"(\w+)"', messages[0]["content"])
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    if said and model in ("copies", "answers", "base"):
        return said[-1]
    if said and model == "refines" and (all(word in said[-1] for word in words) or rng.random() > 0.4):
        return said[-1]
    right = model == "refines" if said and model == "refines" else rng.random() < MODELS[model]
    return f"Number {rng.randrange(10**6)} is {' and '.join(words if right else words[1:])}."


class ScriptedServer:
    """Serves while the block lasts; `url` is its base url."""

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = answer(asked["model"], asked["messages"], asked["seed"])
        usage = {"completion_tokens": len(text.split()), "prompt_tokens": 30}
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        body = json.dumps({"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
