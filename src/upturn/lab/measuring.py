"""Measuring one model: chains, direct answers for the controls, judgements, and the way from earlier models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upturn.config import Plugin, plugin
from upturn.evaluation import summary, turns
from upturn.evaluation.summary import Measurement
from upturn.lab.lab import Attempts, Measure, Model
from upturn.lab.store import write_text
from upturn.tracking import progress

if TYPE_CHECKING:
    from upturn.lab.bench import Bench


@dataclass(frozen=True, slots=True)
class Asked:
    """What is measured."""

    model: Model
    label: str
    iteration: int = 0
    upstream: Model | None = None
    """The model whose answers are corrected; None where the model refines its own."""


def measure(bench: Bench, asked: Asked, cfg: Measure, scorer: Plugin | None) -> Measurement | None:
    """The numbers of one model; its scored attempts go to `drafts/`. None where steps are only planned."""
    prompts, label = bench.prompts("test", 0, cfg.prompts), asked.label

    def drafts(model: Model, strategy: Plugin, kind: str, first: Attempts | None = None, purpose: str = "") -> Attempts:
        return bench.generate(model, prompts, strategy, cfg.sampling, f"{kind} {label}", first, purpose)

    judges = _judges(scorer)
    first = drafts(asked.upstream, _by_name("parallel", 1), "upstream of") if asked.upstream else None
    refining = drafts(asked.model, cfg.strategy or _by_name("chain", cfg.turns), "measure", first)
    chains = _judged(bench, refining, judges, label, parallel=False)
    fresh = None
    if cfg.parallel:
        # Fresh ones: with the chains' own random numbers the first of them would be turn 1 again.
        answerer, direct = asked.upstream or asked.model, _by_name("parallel", cfg.parallel)
        answers = drafts(answerer, direct, "parallel", purpose="control")
        fresh = _judged(bench, answers, judges, label, parallel=True)
    drift = {} if asked.upstream else _drift(bench, asked.model, chains, label)
    if bench.dry:
        return None
    _drop_others(bench, label)
    vote = turns.majority(fresh.read()) if fresh else None
    row = summary.measure(label, asked.iteration, chains.read(), vote=vote, drift=drift, seed=bench.seed)
    return row.model_copy(update=_pairing(asked, scorer))


def _pairing(asked: Asked, scorer: Plugin | None) -> dict[str, str | bool]:
    """What a study must know of a measurement to pair it with others, and direct answers with their rewards."""
    alone = scorer is not None and not getattr(scorer.module, "BY_OTHERS", False)
    return {"upstream": asked.upstream.name if asked.upstream else "", "rewarded_alone": alone}


def _by_name(strategy: str, count: int) -> Plugin:
    return plugin("strategies", {"name": strategy, "turns": count})


def _judges(scorer: Plugin | None) -> list[Plugin]:
    """The verifier, and the scorer that trains where it is another."""
    exact = plugin("scorers", "exact")
    return [exact, scorer] if scorer and scorer.name != exact.name else [exact]


def _judged(bench: Bench, drafts: Attempts, judges: Sequence[Plugin], label: str, *, parallel: bool) -> Attempts:
    """Drafts as each judge scored them, copied into the run folder; returned as the verifier did."""
    kind = "parallel" if parallel else "measure"
    names = ["", " reward"][: len(judges)]
    found = [bench.score(drafts, judge, f"{kind} {label}{name}") for judge, name in zip(judges, names, strict=True)]
    for scored, name in zip(found, names, strict=True):
        copy = summary.drafts_file(label, parallel=parallel, reward=bool(name))
        bench.copies.add(copy)
        if not bench.dry:
            scored.read()  # a damaged result is told where it lies, and not copied
            (bench.run_dir / copy).parent.mkdir(exist_ok=True)
            write_text(bench.run_dir / copy, scored.path.read_text())
    return found[0]


def _drop_others(bench: Bench, label: str) -> None:
    """Drop this label's drafts that an earlier measurement left and this one has none of, such as another model's
    controls: whoever reads the folder takes them for this model's."""
    for parallel in (False, True):
        for reward in (False, True):
            name = summary.drafts_file(label, parallel=parallel, reward=reward)
            if name not in bench.copies:
                (bench.run_dir / name).unlink(missing_ok=True)


def _speak_alike(*folders: Path) -> bool:
    """Whether a token id means the same to these models."""
    known: list[Any] = []
    for folder in folders:
        path = folder / "tokenizer.json"
        tokens = json.loads(path.read_text(encoding="utf-8"))["model"].get("vocab") if path.is_file() else None
        known.append((json.loads((folder / "config.json").read_text()).get("vocab_size"), tokens))
    return all(one == known[0] for one in known)


def _drift(bench: Bench, model: Model, chains: Attempts, label: str) -> dict[str, float]:
    """How far this model has moved from the first one measured, and from the one before."""
    if not bench.measured or model.endpoint or bench.measured[0].endpoint:
        return {}  # only weights tell distributions
    if not bench.dry and not _speak_alike(model.folder, bench.measured[0].folder):
        progress.say(f"{label}: no drift from {bench.measured[0].name}, whose tokens are others")
        return {}
    start, previous = bench.measured[0], bench.measured[-1]
    moved = {"start": bench.drift(model, start, chains, f"{label} against start")}
    if previous.key == start.key:
        return moved | {"previous": moved["start"]}
    return moved | {"previous": bench.drift(model, previous, chains, f"{label} against previous")}
