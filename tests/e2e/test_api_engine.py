"""The endpoint engine against a server that fails on purpose: nothing lost, nothing twice, every failure named."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from functools import partial
from typing import Any

import flaky_server as flaky
import pytest
from flaky_server import FlakyServer

from upturn.engines import api, sampling
from upturn.errors import RunError
from upturn.strategies import chain, few_shot, parallel, star
from upturn.types import Attempt, Draft, Prompt, Requests

KEY = "sk-quite-secret-0123456789"
REQUEST = "Check it."
SEED = 3
STATUSES: list[flaky.Fault] = [408, 429, 500, 502, 503, 504, 529]
BREAKS: list[flaky.Fault] = ["reset", "slow", "malformed", "choiceless", "error", "unfinished", "cut", "short"]
PROMPTS = [Prompt(f"p{i}", f"Question {i}?") for i in range(6)]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the environment, and no proxy between the test and its server."""
    for name in [name for name in os.environ if name in api.KEYS or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("UPTURN_API_KEY", KEY)


class Naps:
    """A sleep that only notes how long it should have been."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def engine(url: str, sleep: Any = asyncio.sleep, **how: Any) -> api.Api:
    settings = {"url": url, "model": "m", "timeout": 5, "retry_base": 0.001, "retry_cap": 0.01} | how
    cfg = sampling.Config(temperature=0.5, top_p=0.9, max_new_tokens=64)
    return api.Api(api.Endpoint.model_validate(settings), Requests(REQUEST), cfg, seed=SEED, sleep=sleep)


def rule(turns: int = 2, strategy: Any = chain) -> Any:
    return partial(strategy.generate, cfg=strategy.Config(turns=turns))


def asked(attempt: Attempt, draft: Draft) -> flaky.Asked:
    """What the server must have been asked for this draft."""
    shown = [said for parent in draft.parents for said in (attempt.drafts[parent].text, REQUEST)]
    return (attempt.prompt.text, *shown), api.draft_seed(SEED, attempt.prompt.id, draft.index)


def judge(attempts: list[Attempt], server: FlakyServer, num_drafts: int = 2) -> None:
    """Every draft is the answer to its own conversation, with the numbers that the server told of it."""
    for attempt in attempts:
        assert [draft.index for draft in attempt.drafts] == list(range(num_drafts))
        for draft in attempt.drafts:
            wanted = asked(attempt, draft)
            told = flaky.usage(wanted)
            assert draft.text == flaky.text(wanted)
            assert server.said[wanted] >= 1
            assert (draft.num_tokens, draft.prompt_tokens) == (told["completion_tokens"], told["prompt_tokens"])
            assert draft.cached_tokens == told["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize(("num_prompts", "stream"), [(1000, False), (300, True)])
def test_a_thousand_chains_lose_nothing_and_count_nothing_twice(num_prompts: int, stream: bool):
    prompts, seen = [Prompt(f"p{i}", f"Question {i}?") for i in range(num_prompts)], list[Draft]()
    shares: dict[flaky.Fault, float] = {"reset": 0.04, 429: 0.04, 500: 0.03, 503: 0.03, "malformed": 0.03}
    shares |= {"choiceless": 0.02, "cut": 0.03, "short": 0.03, "slow": 0.004}
    with FlakyServer(flaky.mix(1, shares), slow=1.5, headers={"Retry-After": "0.01"}) as server:
        asking = engine(server.url, stream=stream, timeout=1, max_retries=20)
        attempts = asking.run(prompts, rule(), seen.append)
    assert {*server.faults} == {*shares}
    assert asking.failures == {} and asking.notice == ""
    assert [attempt.prompt for attempt in attempts] == prompts
    judge(attempts, server)
    drafts = [draft for attempt in attempts for draft in attempt.drafts]
    assert len(drafts) == len(seen) == asking.num_drafts == len(server.said) == 2 * num_prompts
    assert sum(draft.num_tokens for draft in drafts) == sum(len(flaky.answer(each)) for each in server.said)
    assert server.said.total() > len(drafts), "slow answers were said twice, so they could have been counted twice"
    assert asking.num_retries == asking.num_requests - len(drafts) >= server.faults.total()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", STATUSES + BREAKS)
def test_each_fault_alone_is_retried(fault: flaky.Fault, stream: bool):
    with FlakyServer(flaky.first(fault, times=2)) as server:
        asking = engine(server.url, stream=stream, timeout=0.3 if fault == "slow" else 5)
        attempts = asking.run(PROMPTS[:2], rule())
    assert len(attempts) == 2 and server.faults == {fault: 8}
    judge(attempts, server)
    assert (asking.num_requests, asking.num_retries, asking.num_drafts) == (12, 8, 4)
    assert len({body["seed"] for body in server.bodies}) == 4, "a repeated request keeps its seed"


def test_an_endpoint_that_starts_late_is_waited_for():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    server, started = FlakyServer(port=port), False

    async def start(seconds: float) -> None:
        nonlocal started
        if not started:
            started = bool(server.__enter__())

    asking = engine(f"http://127.0.0.1:{port}/v1", start, concurrency=1)
    try:
        judge(asking.run(PROMPTS, rule()), server)
    finally:
        server.__exit__()
    assert asking.num_retries == 1


def test_an_absent_endpoint_fails_every_prompt_without_making_each_wait():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{place.getsockname()[1]}/v1"
        asking = engine(url, Naps(), max_retries=3, concurrency=1)
        assert asking.run(PROMPTS, rule()) == []
    assert [*asking.failures] == [prompt.id for prompt in PROMPTS]
    assert all(reason.startswith("no connection: ") for reason in asking.failures.values())
    assert asking.num_requests == 4 + 5


@pytest.mark.parametrize(
    ("status", "mend"), [(401, "Set UPTURN_API_KEY"), (403, "Set UPTURN_API_KEY"), (404, "url and model"), (302, "url")]
)
def test_a_wrong_key_model_or_url_is_one_error_at_once(status: int, mend: str):
    with FlakyServer(flaky.first(status, times=99), complaint="no entry for {key}") as server:
        asking = engine(server.url, concurrency=2)
        with pytest.raises(RunError) as raised:
            asking.run(PROMPTS * 20, rule())
    error = raised.value
    assert error.where == f"{server.url}/chat/completions" and mend in error.mend
    assert error.what == f"HTTP {status}: no entry for ***"
    assert asking.num_requests <= 4 and asking.num_drafts == 0


@pytest.mark.parametrize("status", [400, 422, 413])
def test_a_request_that_the_endpoint_cannot_take_fails_its_prompt_only(status: int):
    def plan(conversation: flaky.Conversation, tries: int) -> flaky.Fault | None:
        return status if conversation[0] == PROMPTS[2].text and len(conversation) == 3 else None

    seen: list[Draft] = []
    with FlakyServer(plan, complaint="too long by {key}") as server:
        asking = engine(server.url)
        attempts = asking.run(PROMPTS, rule(), seen.append)
    assert asking.failures == {"p2": f"HTTP {status}: too long by ***"}
    assert [attempt.prompt.id for attempt in attempts] == ["p0", "p1", "p3", "p4", "p5"]
    judge(attempts, server)
    assert asking.num_retries == 0 and len(seen) == asking.num_drafts == 11


def test_used_up_retries_name_the_prompt_and_the_last_reason():
    def plan(conversation: flaky.Conversation, tries: int) -> flaky.Fault | None:
        return (500 if tries < 4 else "cut") if conversation[0] == PROMPTS[4].text else None

    with FlakyServer(plan) as server:
        asking = engine(server.url, max_retries=3)
        attempts = asking.run(PROMPTS, rule())
    assert [*asking.failures] == ["p4"] and len(attempts) == 5
    assert asking.failures["p4"].startswith("the connection broke off: ")
    assert asking.failures["p4"].endswith(", after 4 requests")
    assert (asking.num_requests, asking.num_retries) == (14, 3)


def test_an_answer_that_comes_too_late_is_called_so():
    with FlakyServer(flaky.first("slow")) as server:
        asking = engine(server.url, timeout=0.2, max_retries=0)
        assert asking.run(PROMPTS[:1], rule()) == []
    assert asking.failures == {"p0": "no answer within 0.2 s, after 1 request"}


@pytest.mark.parametrize("how", [{"headers": {"Retry-After": "7"}}, {"retry_date_in": 7}])
def test_retry_after_is_the_shortest_pause(how: dict[str, Any]):
    naps = Naps()
    with FlakyServer(flaky.first(429, times=3), **how) as server:
        judge(engine(server.url, naps, retry_base=0.5, retry_cap=1).run(PROMPTS, rule()), server)
    assert len(naps.seconds) == 36
    assert all(7 <= seconds <= 8 for seconds in naps.seconds)


def test_pauses_double_up_to_the_cap_with_full_jitter():
    naps = Naps()
    random.seed(0)
    with FlakyServer(flaky.first(500, times=5)) as server:
        asking = engine(server.url, naps, retry_base=1, retry_cap=6, concurrency=1)
        asking.run([Prompt(str(i), f"{i}?") for i in range(60)], rule(turns=1))
    for number, longest in enumerate([1, 2, 4, 6, 6]):
        pauses = naps.seconds[number::5]
        assert len(pauses) == 60 and 0 <= min(pauses) < 0.25 * longest
        assert 0.75 * longest < max(pauses) <= longest


def test_the_key_is_sent_and_never_told(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    long = "x" * 270 + " {key}"  # cutting the text must not leave half a key
    for fault, stream in [(400, False), (500, False), ("error", True), ("error", False), (401, False)]:
        with FlakyServer(flaky.first(fault, times=99), complaint=long) as server:
            asking = engine(server.url, max_retries=1, stream=stream)
            try:
                asking.run(PROMPTS, rule())
            except RunError as error:
                asking.failures["all"] = str(error)
        assert server.keys == {f"Bearer {KEY}"}
        assert asking.failures and KEY[:6] not in str(asking.failures) + repr(vars(asking)) + repr(asking.endpoint)
    assert caplog.records and KEY[:6] not in caplog.text


@pytest.mark.parametrize("strategy", [chain, parallel, star, few_shot])
def test_every_strategy_gives_the_same_drafts_twice_whatever_fails(strategy: Any):
    runs: list[list[Attempt]] = []
    for seed in (1, 2):
        with FlakyServer(flaky.mix(seed, {"reset": 0.2, 500: 0.2})) as server:
            runs.append(engine(server.url, max_retries=30).run(PROMPTS, rule(4, strategy)))
        judge(runs[-1], server, num_drafts=4)
        assert len(server.said) == 24, "each draft has a seed or a conversation of its own"
    assert runs[0] == runs[1]


def test_siblings_of_a_failed_draft_stop_asking():
    failing = {api.draft_seed(SEED, "p1", 0)}
    with FlakyServer() as server:
        server.plan = lambda conversation, tries: 400 if server.bodies[-1]["seed"] in failing else None
        asking = engine(server.url, concurrency=1)
        attempts = asking.run(PROMPTS[:3], rule(5, parallel))
    assert [*asking.failures] == ["p1"] and len(attempts) == 2
    assert asking.num_requests < 5 + 5 + 5


def test_requests_keep_to_the_limit_and_later_turns_come_before_new_prompts():
    with FlakyServer() as server:
        server.plan, server.slow = lambda conversation, tries: "slow", 0.01
        engine(server.url, concurrency=3).run(PROMPTS, rule(4, star))
        assert server.most_busy == 3
        server.bodies.clear()
        engine(server.url, concurrency=1).run(PROMPTS, rule(turns=2))
    assert [len(body["messages"]) for body in server.bodies] == [1, 3] * 6


@pytest.mark.parametrize("stream", [False, True])
def test_an_endpoint_without_usage_is_noticed(stream: bool):
    with FlakyServer(tells_usage=False) as server:
        asking = engine(server.url, stream=stream)
        (attempt,) = asking.run(PROMPTS[:1], rule(turns=1))
    draft = attempt.drafts[0]
    assert (draft.num_tokens_told, draft.num_tokens, draft.prompt_tokens, draft.cached_tokens) == (None, 0, 0, 0)
    asking.run([], rule())
    assert "does not tell numbers of tokens" in asking.notice, "runs in chunks are asked at the end"


@pytest.mark.parametrize("stream", [False, True])
def test_finish_reasons_and_logprobs_are_the_endpoints_own(stream: bool):
    reasons = {PROMPTS[0].text: "length", PROMPTS[1].text: "content_filter"}
    with FlakyServer(finish=lambda said: reasons.get(said[0], "stop"), tells_logprobs=True) as server:
        asking = engine(server.url, stream=stream)
        cut, whole = asking.run(PROMPTS[:3], rule(turns=1))
    assert asking.failures == {"p1": "the endpoint ended draft 1 with 'content_filter'"}
    assert (cut.drafts[0].finish_reason, cut.drafts[0].complete) == ("length", False)
    assert (whole.drafts[0].finish_reason, whole.drafts[0].complete) == ("stop", True)
    for draft in (cut.drafts[0], whole.drafts[0]):
        assert draft.token_ids == () and draft.sampler_logprobs == (-0.25,) * draft.num_tokens


def test_it_runs_inside_a_running_loop():
    async def notebook(asking: api.Api) -> list[Attempt]:
        return asking.run(PROMPTS, rule())

    with FlakyServer() as server:
        judge(asyncio.run(notebook(engine(server.url))), server)
