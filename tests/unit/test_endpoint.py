"""What is sent to an endpoint, how its words are read, and what is refused before the first request."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from typing import Any

import pytest
from flaky_server import FlakyServer
from pydantic import ValidationError

from upturn.engines import _wire, api, sampling
from upturn.errors import DataError, RunError
from upturn.evaluation.turns import turn_table
from upturn.strategies import chain
from upturn.types import Attempt, Draft, Prompt, Requests, Score, draft_from_json, to_json

QUESTION = Prompt("p0", "Question 0?")
CHAIN = partial(chain.generate, cfg=chain.Config(turns=2))


@pytest.fixture(autouse=True)
def no_key_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name in api.KEYS or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def engine(url: str, **how: Any) -> api.Api:
    cfg = sampling.Config(temperature=0.5, top_p=0.9, max_new_tokens=64)
    return api.Api(api.Endpoint.model_validate({"url": url, "model": "m"} | how), Requests("Check it."), cfg, seed=3)


def events(*pieces: str, end: str = "\r\n\r\n") -> bytes:
    return "".join(f"data: {piece}{end}" for piece in pieces).encode()


@pytest.mark.parametrize("tail", ["", "/", "/chat/completions", "/chat/completions/"])
def test_a_refinement_is_a_conversation_with_the_draft_and_the_request(tail: str):
    with FlakyServer() as server:
        (attempt,) = engine(server.url + tail, stream=True).run([QUESTION], CHAIN)
    assert server.bodies[1] == {
        "model": "m",
        "messages": [
            {"role": "user", "content": "Question 0?"},
            {"role": "assistant", "content": attempt.drafts[0].text},
            {"role": "user", "content": "Check it."},
        ],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 64,
        "seed": api.draft_seed(3, "p0", 1),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert [(draft.turn, draft.parents) for draft in attempt.drafts] == [(1, ()), (2, (0,))]


def test_draft_seeds_differ_by_seed_prompt_and_index_and_fit_31_bits():
    seeds = {api.draft_seed(seed, name, index) for seed in range(10) for name in "abcdefghij" for index in (0, 1)}
    assert len(seeds) == 200 and min(seeds) >= 0 and 2**30 < max(seeds) < 2**31


@pytest.mark.parametrize(
    ("keys", "sent"),
    [({}, None), ({"OPENAI_API_KEY": "b\n"}, "Bearer b"), ({"UPTURN_API_KEY": "a", "OPENAI_API_KEY": "b"}, "Bearer a")],
)
def test_the_key_comes_from_the_environment(keys: dict[str, str], sent: str | None, monkeypatch: pytest.MonkeyPatch):
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    with FlakyServer() as server:
        engine(server.url).run([QUESTION], CHAIN)
    assert server.keys == {sent}


@pytest.mark.parametrize("key", ["sk-secret\nsecond line", "sk-secret-ü"])
def test_a_key_that_cannot_be_sent_is_refused_without_being_told(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(RunError, match="OPENAI_API_KEY") as raised:
        engine("http://a/v1")
    assert "sk-" not in str(raised.value)


def test_a_stream_with_comments_nulls_and_usage_on_every_piece():
    body = b": waiting\n\n" + events(
        '{"choices": [{"delta": {"role": "assistant", "content": null}, "finish_reason": null}], "usage": null}',
        '{"choices": [{"delta": {"content": " a\u2028b"}}], "usage": {"completion_tokens": 1, "prompt_tokens": 5}}',
        '{"choices": [{"delta": {"content": "\u0085c "}}]}',
        '{"choices": [{"delta": null, "finish_reason": "stop"}]}',
        '{"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens": 5, "prompt_tokens_details": null}}',
        "[DONE]",
    )
    assert _wire.read(body, streamed=True) == _wire.Answer("a\u2028b\u0085c", "stop", (), 3, 5, 0)


@pytest.mark.parametrize(
    ("body", "streamed", "reason"),
    [
        (b"", False, "malformed: Invalid JSON"),
        (b"[]", False, "malformed"),
        (b'{"choices": [{"message": {"content": 7}}]}', False, r"malformed: choices\.0\.message\.content: "),
        (b'{"choices": []}', False, "no choices"),
        (b'{"choices": [{"message": {"content": "a"}}]}', False, "no finish_reason"),
        (b'{"error": {"message": "out of memory"}}', False, "the endpoint failed: out of memory"),
        (b"", True, "broke off"),
        (events('{"choices": [{"delta": {}, "finish_reason": "stop"}]}'), True, "broke off"),
        (events("[DONE]"), True, "no choices"),
        (events('{"error": "gone"}', "[DONE]"), True, "the endpoint failed: gone"),
    ],
)
def test_what_is_no_whole_answer_is_asked_for_again(body: bytes, streamed: bool, reason: str):
    with pytest.raises(_wire.Again, match=reason):
        _wire.read(body, streamed=streamed)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"error": {"message": "a", "code": 1}}, "a"),
        ({"error": "a"}, "a"),
        ({"message": "a"}, "a"),
        ({"detail": [{"msg": "a"}]}, '[{"msg": "a"}]'),
    ],
)
def test_the_usual_ways_to_complain_are_read(body: dict[str, Any], says: str):
    assert _wire.complaint(json.dumps(body).encode()) == says
    assert _wire.complaint(b"<html>Bad gateway</html>") == _wire.complaint(b"[" * 100_000) == ""


@pytest.mark.parametrize("asked", ["", "-5", "soon", "9" * 400, "nan", "Wed, 99 Oct 2015 07:28:00 GMT"])
def test_a_retry_after_that_says_nothing_asks_for_no_pause(asked: str):
    assert _wire.retry_after({"retry-after": asked}) == 0


def test_a_retry_after_date_counts_from_the_endpoints_own_clock():
    headers = {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT", "date": "Wed, 21 Oct 2015 07:26:30 GMT"}
    assert _wire.retry_after(headers) == 90
    assert _wire.retry_after({"retry-after": headers["date"], "date": headers["retry-after"]}) == 0
    assert _wire.retry_after({"retry-after": headers["date"]}) == 0, "by our clock, it is long past"


@pytest.mark.parametrize(
    "form", ["Wed, 21 Oct 2015 07:28:00 GMT", "Wednesday, 21-Oct-15 07:28:00 GMT", "Wed Oct 21 07:28:00 2015"]
)
@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_each_form_of_an_http_date_means_gmt_wherever_we_are(form: str, zone: str, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as away:
        away.setenv("TZ", zone)
        time.tzset()
        told = _wire.retry_after({"retry-after": form, "date": "Wed, 21 Oct 2015 07:26:30 GMT"})
    time.tzset()
    assert told == 90


def test_a_retry_after_counts_beside_a_date_that_says_nothing():
    told = _wire.retry_after({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT", "date": "now"})
    assert told > 1e9, "by our clock"


@pytest.mark.parametrize(("name", "text"), [("p7", "hi \ud83d"), ("p7\udcff", "hi")])
def test_half_a_sign_in_a_prompt_is_named_before_anything_is_asked(name: str, text: str):
    with pytest.raises(DataError, match=r"^prompt p7") as raised:
        engine("http://127.0.0.1:9/v1").check([QUESTION, Prompt(name, text)])
    assert "half of a sign" in str(raised.value.what)
    assert str(raised.value).encode(), "the message itself can be shown"


def test_whole_signs_of_any_kind_are_sent():
    with FlakyServer() as server:
        asking, prompts = engine(server.url), [Prompt("p", "hi \N{GRINNING FACE}\u2028\x00")]
        asking.check(prompts)
        asking.run(prompts, CHAIN)
    assert server.bodies[0]["messages"][0]["content"] == prompts[0].text


def test_an_empty_prompt_and_no_prompt_at_all():
    asking = engine("http://127.0.0.1:9/v1")
    with pytest.raises(DataError, match="prompt p7"):
        asking.check([QUESTION, Prompt("p7", " \n")])
    asking.check([QUESTION])
    assert asking.run([], CHAIN) == []


@pytest.mark.parametrize("url", ["", "localhost:8000/v1", "ftp://a/v1", "http://", "http://a:99999/v1", "http://a:x"])
def test_a_url_that_cannot_be_asked_is_refused(url: str):
    with pytest.raises(ValidationError, match="url"):
        api.Endpoint(url=url, model="m")


@pytest.mark.parametrize("url", ["http://me:word@a/v1", "http://a/v1?key=a", "http://a/v1#a"])
def test_a_url_with_a_secret_in_it_is_refused(url: str):
    with pytest.raises(ValidationError, match="the key is read from UPTURN_API_KEY"):
        api.Endpoint(url=url, model="m")


def test_without_httpx_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(RunError, match=r"pip install 'upturn\[api\]'"):
        engine("http://a/v1")


def test_told_numbers_of_tokens_count_and_old_drafts_still_read():
    told = Draft(0, 1, (), "a", (), (), "stop", 5, 0, num_tokens_told=9)
    own = Draft(0, 1, (), "a", (4, 2), (-1.0, -1.0), "stop", 5, 0)
    assert (told.num_tokens, own.num_tokens) == (9, 2)
    for draft in (told, own):
        assert draft_from_json(json.loads(json.dumps(to_json(draft)))) == draft
    old = to_json(own)
    del old["num_tokens_told"]
    assert draft_from_json(old) == own
    scored = [Attempt(QUESTION, (draft,), (Score(1.0, True),)) for draft in (told, own)]
    assert turn_table(scored)[0].tokens == 11
