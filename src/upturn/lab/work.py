"""The heavy half of the steps: everything here needs torch, and keeps its progress in the step's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from upturn import trees
from upturn.config import Plugin
from upturn.engines import _slots, api, local, sampling
from upturn.engines._base import Generate
from upturn.errors import RunError
from upturn.lab._memory import keep_freed
from upturn.lab.store import sync_all, write_text
from upturn.models import card, chat, load, policy
from upturn.strategies._base import num_drafts
from upturn.tracking import events, progress
from upturn.training import train as training
from upturn.types import Attempt, Draft, Example, Pair, Prompt, Requests, Sample, draft_from_json, line_of

SIZES = "sizes.json"
"""Slots and prompts of a chunk, until the chunks are merged."""
FAILURES = "failures.json"
"""Prompt id -> reason, for prompts that an endpoint did not answer."""
OUTCOME = ".outcome.json"
"""What a training found, once its model is saved and until its step is done."""
WAVES = 4
"""Prompts of a chunk for each slot. At its end the batch empties; with 2 that took 2 to 9% of a CPU's time."""
ASKED = 128
"""Prompts of a chunk that an endpoint is asked for."""
DRIFT_SAMPLES = 32
"""Direct answers per forward pass when two models are compared."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What every heavy step needs."""

    label: str
    folder: Path
    requests: Requests
    options: Any
    seed: int


def seed_for(purpose: str, seed: int) -> int:
    """The seed of drafts that must owe nothing to those of the run's own seed, such as votes on them; '' is its own."""
    return int(sha256(f"{seed}/{purpose}".encode()).hexdigest()[:8], 16) if purpose else seed


@dataclass(frozen=True, slots=True)
class Rule:
    """How the drafts of a prompt come about."""

    strategy: Plugin
    first: Sequence[Attempt] = ()
    """Where there are any, the first drafts that the strategy goes on from instead of asking for them."""

    @property
    def drafts(self) -> int:
        """How many the model is asked for, at most."""
        return num_drafts(self.strategy.cfg) - bool(self.first)

    def spelled(self, talk: chat.Chat) -> Rule:
        """With first drafts as a model reads them: they are another's."""
        return replace(self, first=[_spelled(attempt, talk) for attempt in self.first])

    def generate(self) -> Generate:
        """The strategy as an engine takes it."""
        run = partial(self.strategy.module.generate, cfg=self.strategy.cfg)
        if not self.first:
            return run
        given = {attempt.prompt.id: attempt.drafts[0] for attempt in self.first}

        async def generate(prompt: Prompt, sample: Any) -> list[Draft]:
            waiting = [given[prompt.id]]

            async def go_on(prompt: Prompt, shown: Sequence[Draft], **how: Any) -> Draft:
                if waiting and not shown:
                    return waiting.pop()
                draft = await sample(prompt, shown=shown, **how)
                return replace(draft, index=draft.index + 1)  # the given draft has the first place

            return await run(prompt, go_on)

        return generate


def _spelled(attempt: Attempt, talk: chat.Chat) -> Attempt:
    return replace(attempt, drafts=tuple(map(talk.spelled, attempt.drafts)))


def generate(
    loaded: load.Loaded, prompts: Sequence[Prompt], rule: Rule, how: sampling.Config, s: Settings
) -> dict[str, Any]:
    """Sample in chunks; each finished chunk is a file, and the chunks together are `drafts.jsonl`.

    A chunk is always sampled as a whole, so that a resumed run has the same batches and the same bits.
    """
    keep_freed()
    talk = chat.load(loaded.tokenizer, loaded.end_ids, s.requests, s.options.layout)
    if talk.notice:
        progress.say(f"{s.label}: {talk.notice}")
    slots, chunk = _sizes(loaded, talk, prompts, how, s)
    engine = local.Local(loaded.model, talk, how, seed=s.seed, slots=slots)
    return _in_chunks(engine, prompts, rule.spelled(talk), s, chunk)


def _sizes(
    loaded: load.Loaded, talk: chat.Chat, prompts: Sequence[Prompt], how: sampling.Config, s: Settings
) -> tuple[int, int]:
    """Slots, and prompts of a chunk. What suited the device holds until the step is done: a chunk is but a number."""
    path = s.folder / SIZES
    if not path.is_file():
        slots = s.options.slots or _slots.usual(loaded.model, partial(_longest, talk, prompts, how))
        chunk = s.options.chunk_prompts or slots * WAVES
        write_text(path, json.dumps({"slots": slots, "chunk_prompts": chunk}))
    sizes = json.loads(path.read_text())
    return sizes["slots"], sizes["chunk_prompts"]


def _longest(talk: chat.Chat, prompts: Sequence[Prompt], how: sampling.Config) -> int:
    """Tokens that a slot comes to hold where one draft is shown: question, draft, request, draft."""
    questions = [len(talk.context(prompt.text, ())) for prompt in prompts]
    return max(questions, default=0) + 3 * (how.max_new_tokens or 0)


def ask(
    endpoint: api.Endpoint,
    prompts: Sequence[Prompt],
    rule: Rule,
    how: sampling.Config,
    s: Settings,
    *,
    skip_failed: bool,
) -> dict[str, Any]:
    """Drafts from an endpoint. What it does not answer is a RunError that says so prompt by prompt.

    The answered prompts are kept, and only the others are asked for again; with `skip_failed` they are left out.
    """
    engine = api.Api(endpoint, s.requests, how, seed=s.seed, say=lambda text: progress.say(f"{s.label}: {text}"))
    size = s.options.chunk_prompts or ASKED
    if not skip_failed:
        _unmerge(s.folder, prompts, size)
    engine.answered_earlier = any(_lines_of(part) for part in s.folder.glob("chunk-*.jsonl"))
    facts = _in_chunks(engine, prompts, rule, s, size, keep_parts=not skip_failed)
    if engine.notice:
        progress.say(f"{s.label}: {engine.notice}")
    failures = json.loads((s.folder / FAILURES).read_text()) if (s.folder / FAILURES).is_file() else {}
    if failures and (not skip_failed or len(failures) == len(prompts)):
        first = "; ".join(f"{prompt}: {reason}" for prompt, reason in list(failures.items())[:3])
        raise RunError(
            f"{s.label}: {endpoint.chat_url}",
            f"{len(failures)} of {len(prompts)} prompts have no answer ({first}). All are listed in "
            f"{s.folder / FAILURES}.",
            "Run the same command again to ask for these only, or add --skip-failed to go on without them.",
        )
    left_out = {"left_out": sha256("\n".join(sorted(failures)).encode()).hexdigest()[:16]} if failures else {}
    return facts | {"failed": len(failures)} | left_out


def _in_chunks(
    engine: local.Local | api.Api,
    prompts: Sequence[Prompt],
    rule: Rule,
    s: Settings,
    size: int,
    *,
    keep_parts: bool = False,
) -> dict[str, Any]:
    """All drafts in `drafts.jsonl`; a chunk's file holds what is finished of it, in the end in the prompts' order."""
    engine.check(prompts)
    chunks = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    total = len(prompts) * rule.drafts
    merged = (s.folder / "drafts.jsonl").is_file()  # killed between the merge and the manifest
    failures: dict[str, str] = {}
    with progress.track(s.label, total, "drafts") as bar:
        for number, chunk in enumerate([] if merged else chunks):
            path = s.folder / f"chunk-{number:05d}.jsonl"
            found = _lines_of(path)
            done = {json.loads(line)["prompt"]["id"]: line for line in found}
            bar.find(sum(len(json.loads(line)["drafts"]) for line in found))

            def seen(draft: Draft) -> None:
                bar.advance(1)

            if missing := [prompt for prompt in chunk if prompt.id not in done]:
                attempts = _run(engine, missing, rule.generate(), seen, path)
                events.sample(s.label, attempts)
                done |= {attempt.prompt.id: line_of(attempt) for attempt in attempts}
                failures |= getattr(engine, "failures", {})
            lines = [done[prompt.id] for prompt in chunk if prompt.id in done]
            if missing or lines != found:  # or killed with all of them there, as they came
                write_text(path, _text(lines))
    if failures:
        write_text(s.folder / FAILURES, json.dumps(failures, indent=2))
    elif (s.folder / FAILURES).is_file() and not merged:
        (s.folder / FAILURES).unlink()
    keeps = failures and (keep_parts or len(failures) == len(prompts))
    return {} if keeps else _merge(s.folder)


def _run(
    engine: local.Local | api.Api,
    prompts: Sequence[Prompt],
    generate: Generate,
    seen: Callable[[Draft], None],
    path: Path,
) -> list[Attempt]:
    """Attempts of an engine. An endpoint's answers are paid for: each attempt is in the file as soon as it is whole."""
    if not isinstance(engine, api.Api):
        return engine.run(prompts, generate, seen)
    write_text(path, _text(_lines_of(path)))  # nothing is appended to half a line
    with path.open("a") as file:

        def keep(attempt: Attempt) -> None:
            file.write(line_of(attempt) + "\n")
            file.flush()

        return engine.run(prompts, generate, seen, keep)


def _text(lines: Sequence[str]) -> str:
    return "".join(line + "\n" for line in lines)


def _lines_of(path: Path) -> list[str]:
    """The whole lines of a file: a process that was killed, or a full disk, may have left half of the last one."""
    text = path.read_text() if path.is_file() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def _unmerge(folder: Path, prompts: Sequence[Prompt], size: int) -> None:
    """Make chunks again of drafts that were merged without those of some prompts."""
    whole = folder / "drafts.jsonl"
    if not whole.is_file() or not (folder / FAILURES).is_file():
        return
    done = {json.loads(line)["prompt"]["id"]: line for line in _lines_of(whole)}
    for number, first in enumerate(range(0, len(prompts), size)):
        chunk = [done[prompt.id] for prompt in prompts[first : first + size] if prompt.id in done]
        write_text(folder / f"chunk-{number:05d}.jsonl", _text(chunk))
    whole.unlink()


def _merge(folder: Path) -> dict[str, int]:
    whole, parts = folder / "drafts.jsonl", sorted(folder.glob("chunk-*.jsonl"))
    if not whole.is_file():
        write_text(whole, "".join(part.read_text() for part in parts))
    for part in (*parts, folder / SIZES):
        part.unlink(missing_ok=True)
    counts = {"drafts": 0, "tokens": 0, "prompt_tokens": 0, "cached_tokens": 0}
    for line in whole.read_text().splitlines():
        for draft in json.loads(line)["drafts"]:
            counts["drafts"] += 1
            counts["tokens"] += draft_from_json(draft).num_tokens
            counts["prompt_tokens"] += draft["prompt_tokens"]
            counts["cached_tokens"] += draft["cached_tokens"]
    return counts


def train(
    loaded: load.Loaded,
    reference: load.Loaded | None,
    examples: Sequence[Example],
    how: Any,
    s: Settings,
) -> dict[str, Any]:
    """Train and save the model; the checkpoint goes once the model is whole.

    From then on the training is not repeated, should the process be killed before its step is done.
    """
    done = s.folder / OUTCOME
    outcome = training.told(done)
    if not outcome:
        outcome = _trained(loaded, reference, examples, how, s)
        sync_all(s.folder / "model")
        write_text(done, json.dumps(outcome))
    training.forget(s.folder)
    return outcome


def _trained(
    loaded: load.Loaded, reference: load.Loaded | None, examples: Sequence[Example], how: Any, s: Settings
) -> dict[str, Any]:
    keep_freed()
    talk = chat.load(loaded.tokenizer, loaded.end_ids, s.requests, s.options.layout)
    job = training.Job(
        objective=how.objective.module,
        objective_cfg=how.objective.cfg,
        examples=[_read(example, talk) for example in examples],
        chat=talk,
        cfg=how.train,
        seed=s.seed,
        label=s.label,
        folder=s.folder,
    )
    metrics = s.folder / "metrics.jsonl"
    with metrics.open("w") as file:

        def log(entry: dict[str, Any]) -> None:
            file.write(json.dumps({"label": s.label} | entry) + "\n")
            file.flush()
            events.emit("train", label=s.label, **entry)

        outcome = training.run(loaded.model, job, log, reference.model if reference else None)
    load.save(loaded, s.folder / "model", card.stage(s.label, how.objective.dump(), len(examples)))
    return {
        "steps": outcome.num_steps,
        "tokens": outcome.tree_tokens,
        "row_tokens": outcome.row_tokens,
        "final_loss": outcome.final_loss,
        "metrics": outcome.metrics,
    }


def _read(example: Example, talk: chat.Chat) -> Example:
    """The example as a model reads it: an aligner learns from the answers of another."""
    if isinstance(example, Pair):
        return replace(example, chosen=talk.spelled(example.chosen), rejected=talk.spelled(example.rejected))
    return replace(example, attempt=_spelled(example.attempt, talk))


def drift(loaded: load.Loaded, other: load.Loaded, attempts: Sequence[Attempt], s: Settings) -> float:
    """Mean over the tokens of the direct answers of KL(loaded || other), in nats.

    Each position's KL is exact over the vocabulary; only the positions are sampled, at the measuring temperature.
    """
    talk = chat.load(loaded.tokenizer, loaded.end_ids, s.requests, s.options.layout)
    samples = [Sample(talk.context(a.prompt.text, ()), a.drafts[0].token_ids) for a in attempts]
    device = next(loaded.model.parameters()).device
    total, count = 0.0, 0
    with progress.track(f"drift {s.label}", len(samples), "drafts") as bar:
        for first in range(0, len(samples), DRIFT_SAMPLES):
            chunk = samples[first : first + DRIFT_SAMPLES]
            tree = trees.build(chunk).to(device)
            total += float(policy.tree_kl(loaded.model, other.model, tree).sum())
            count += len(tree.targets_N)
            bar.advance(len(chunk))
    return total / count
