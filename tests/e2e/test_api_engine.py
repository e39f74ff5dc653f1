"""The endpoint engine against a server that fails on purpose: nothing lost, nothing twice, every failure named."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import shutil
import signal
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flaky_server as flaky
import pytest
from flaky_server import FlakyServer

from upturn.config import Plugin
from upturn.engines import api, sampling
from upturn.errors import RunError
from upturn.lab import work
from upturn.strategies import chain, few_shot, parallel, star
from upturn.tracking import progress
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


CFG = sampling.Config(temperature=0.5, top_p=0.9, max_new_tokens=64)


def endpoint(url: str, **how: Any) -> api.Endpoint:
    settings = {"url": url, "model": "m", "timeout": 5, "retry_base": 0.001, "retry_cap": 0.01}
    return api.Endpoint.model_validate(settings | how)


def engine(url: str, sleep: Any = asyncio.sleep, say: Any = print, **how: Any) -> api.Api:
    return api.Api(endpoint(url, **how), Requests(REQUEST), CFG, seed=SEED, sleep=sleep, say=say)


def rule(turns: int = 2, strategy: Any = chain) -> Any:
    return partial(strategy.generate, cfg=strategy.Config(turns=turns))


def refusing(question: str, status: int) -> flaky.Plan:
    """One prompt gets this status, the others get answers."""
    return lambda conversation, tries: status if conversation[0] == question else None


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


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_prompt_refused_among_answers_fails_alone(status: int):
    """Some gateways say so of a prompt that their moderation does not like."""
    with FlakyServer(refusing(PROMPTS[2].text, status), complaint="flagged") as server:
        asking = engine(server.url, concurrency=1)
        attempts = asking.run(PROMPTS, rule())
        assert asking.failures == {"p2": f"HTTP {status}: flagged"}
        assert [attempt.prompt.id for attempt in attempts] == ["p0", "p1", "p3", "p4", "p5"]
        assert asking.run(PROMPTS[2:4], rule()) == attempts[2:3], "it answered in the run before"


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


@pytest.mark.parametrize("how", [{"headers": {"Retry-After": "86400"}}, {"retry_date_in": 86400}])
def test_who_asks_for_a_day_is_not_waited_for(how: dict[str, Any]):
    naps = Naps()
    plan = refusing(PROMPTS[1].text, 429)
    with FlakyServer(plan, **how) as server:
        asking = engine(server.url, naps)
        judge(asking.run(PROMPTS[:3], rule()), server)
    assert asking.failures == {
        "p1": "HTTP 429: as planned; the endpoint asks for a pause of 86400 s (Retry-After)",
    }
    assert naps.seconds == [] and (asking.num_requests, asking.num_retries) == (5, 0)


def test_the_longest_pause_is_waited_for():
    naps = Naps()
    with FlakyServer(flaky.first(429), headers={"Retry-After": "600"}) as server:
        judge(engine(server.url, naps).run(PROMPTS[:1], rule()), server)
    assert [round(seconds) for seconds in naps.seconds] == [600, 600]


def test_the_first_long_pause_is_told_and_no_other():
    said = list[str]()
    for asked_for in ("10", "11"):
        with FlakyServer(flaky.first(503), headers={"Retry-After": asked_for}) as server:
            asking = engine(server.url, Naps(), say=said.append, retry_base=0)
            asking.run(PROMPTS, rule())
            asking.run(PROMPTS, rule(turns=3))
    assert said == ["HTTP 503: as planned; the next request waits 11 s. Later pauses are not told."]


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


def ask(url: str, folder: Path, *, skip_failed: bool = False, size: int = 4, **how: Any) -> dict[str, Any]:
    """The step as a bench takes it, one prompt at a time."""
    folder.mkdir(exist_ok=True)
    options: Any = SimpleNamespace(chunk_prompts=size)
    settings = work.Settings("step", folder, Requests(REQUEST), options, SEED)
    strategy = work.Rule(Plugin("strategies", "chain", chain.Config(turns=2)))
    place = endpoint(url, **{"concurrency": 1} | how)
    return work.ask(place, PROMPTS, strategy, CFG, settings, skip_failed=skip_failed)


def ids(folder: Path) -> list[str]:
    return [json.loads(line)["prompt"]["id"] for line in (folder / "drafts.jsonl").read_text().splitlines()]


def questions(server: FlakyServer) -> list[str]:
    """Of the prompts that were asked for, in the order of their first requests."""
    return list(dict.fromkeys(body["messages"][0]["content"] for body in server.bodies))


@pytest.fixture
def unbroken(tmp_path: Path) -> bytes:
    """The drafts of a step that nothing stopped."""
    with FlakyServer() as server:
        ask(server.url, tmp_path / "unbroken")
    return (tmp_path / "unbroken" / "drafts.jsonl").read_bytes()


def kill(folder: Path, before: str) -> list[str]:
    """Ask, and leave what SIGKILL leaves when this question is asked: a copy taken then. Gives what was asked."""
    left = folder.with_name("left")

    def plan(conversation: flaky.Conversation, tries: int) -> None:
        if conversation == (before,):
            shutil.copytree(folder, left)

    with FlakyServer(plan) as server:
        ask(server.url, folder)
    shutil.rmtree(folder)
    left.rename(folder)
    return questions(server)


@pytest.mark.parametrize("torn", [0, 30])
def test_a_step_killed_twice_asks_only_for_what_it_had_not_got(torn: int, tmp_path: Path, unbroken: bytes):
    """Here death may tear the last line, to which nothing may then be added."""
    folder, part = tmp_path / "step", tmp_path / "step" / "chunk-00000.jsonl"
    kill(folder, before=PROMPTS[2].text)
    assert len(part.read_text().splitlines()) == 2
    os.truncate(part, part.stat().st_size - torn)
    again = kill(folder, before=PROMPTS[3].text)
    assert again == [prompt.text for prompt in PROMPTS[1 if torn else 2 :]]
    with FlakyServer() as server:
        facts = ask(server.url, folder)
    assert questions(server) == [prompt.text for prompt in PROMPTS[3:]]
    assert facts["drafts"] == 12 and (folder / "drafts.jsonl").read_bytes() == unbroken


def test_answers_as_they_came_are_put_in_order_though_none_is_missing(tmp_path: Path, unbroken: bytes):
    lines = unbroken.splitlines(keepends=True)
    folder = tmp_path / "step"
    folder.mkdir()
    (folder / "chunk-00000.jsonl").write_bytes(b"".join(reversed(lines[:4])))
    (folder / "chunk-00001.jsonl").write_bytes(b"".join(reversed(lines[4:])))
    ask("http://127.0.0.1:9/v1", folder)
    assert (folder / "drafts.jsonl").read_bytes() == unbroken


def test_many_at_a_time_end_in_the_same_bytes(tmp_path: Path, unbroken: bytes):
    with FlakyServer(flaky.mix(2, {500: 0.3}), slow=0.1) as server:
        ask(server.url, tmp_path / "step", concurrency=8, max_retries=20)
    assert (tmp_path / "step" / "drafts.jsonl").read_bytes() == unbroken


def test_ctrl_c_keeps_the_answers(tmp_path: Path, unbroken: bytes):
    def plan(conversation: flaky.Conversation, tries: int) -> flaky.Fault | None:
        if conversation != (PROMPTS[2].text,):
            return None
        os.kill(os.getpid(), signal.SIGINT)
        return "slow"

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with FlakyServer(plan) as server, pytest.raises(KeyboardInterrupt):
            ask(server.url, tmp_path / "step")
    finally:
        signal.signal(signal.SIGINT, before)
    with FlakyServer() as server:
        ask(server.url, tmp_path / "step")
    assert questions(server) == [prompt.text for prompt in PROMPTS[2:]]
    assert (tmp_path / "step" / "drafts.jsonl").read_bytes() == unbroken


def test_a_moderated_prompt_costs_no_other_and_can_be_left_out(tmp_path: Path):
    """Also where it is the only one that is still to be asked for, so that this process hears no answer."""
    folder = tmp_path / "step"
    with FlakyServer(refusing(PROMPTS[2].text, 403), complaint="flagged") as server:
        for _ in range(2):
            with pytest.raises(RunError, match=r"1 of 6 prompts have no answer \(p2: HTTP 403: flagged\)"):
                ask(server.url, folder)
        assert len(server.bodies) == 11 + 1
        facts = ask(server.url, folder, skip_failed=True)
    assert facts["failed"] == 1 and facts["drafts"] == 10
    assert ids(folder) == ["p0", "p1", "p3", "p4", "p5"]


def test_a_key_that_is_wrong_in_the_second_go_is_one_error_at_once(tmp_path: Path):
    folder = tmp_path / "step"
    with FlakyServer(refusing(PROMPTS[2].text, 403)) as server, pytest.raises(RunError):
        ask(server.url, folder)
    with FlakyServer(flaky.first(401, times=99)) as server, pytest.raises(RunError) as raised:
        ask(server.url, folder, skip_failed=True)
    assert "Set UPTURN_API_KEY" in raised.value.mend and len(server.bodies) == 1


def test_a_long_pause_is_told_to_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said = list[str]()
    monkeypatch.setattr(progress, "say", said.append)
    monkeypatch.setattr(api, "TOLD_PAUSE", 0.01)
    with FlakyServer(flaky.first(429), headers={"Retry-After": "0.02"}) as server:
        ask(server.url, tmp_path / "step")
    assert [line for line in said if "waits" in line] == [
        "step: HTTP 429: as planned; the next request waits 0 s. Later pauses are not told.",
    ]
