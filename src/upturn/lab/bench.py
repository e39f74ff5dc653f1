"""The lab at work: every call stores its result under a key, and finds it there when the recipe runs again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from math import isnan
from pathlib import Path
from typing import Any

from upturn.config import Plugin
from upturn.engines.api import Endpoint
from upturn.engines.sampling import Config as Sampling
from upturn.errors import ConfigError, DataError, NothingToLearn, RunError
from upturn.evaluation import summary
from upturn.lab import estimate
from upturn.lab.lab import Attempts, Examples, Measure, Model, Options, Training, damaged
from upturn.lab.store import Planned, Result, Steps, write_json, write_text
from upturn.models.chat import VERSION as CHAT_VERSION
from upturn.selection._base import label_precision, why_none
from upturn.strategies._base import num_drafts
from upturn.tracking import events, progress
from upturn.types import GENERIC_CRITIQUE, Prompt, Requests, answers, line_of

VERSIONS = {"generate": 12, "score": 5, "select": 6, "train": 9, "drift": 7}
"""Raised when a step would give another result from the same inputs."""
_PLACES = ("data", "test_data")
"""Where a task's data lie; where a task tells what they hold, scores follow from that alone."""
_TOLD: Any = dict.fromkeys(("label", "iteration", "n"), True) | {
    "turns": {"__all__": {"turn", "accuracy", "low", "high"}},
    "gain": {"points", "low", "high"},
}
"""What an event says of a measurement."""


@dataclass
class Bench:
    """The working lab of one run."""

    run_dir: Path
    store: Steps
    task_plugin: Plugin
    options: Options
    seed: int
    summary: summary.Summary
    limit: int | None = None
    skip_failed: bool = False
    """Whether to go on without the prompts that an endpoint does not answer."""
    measured: list[Model] = field(default_factory=list)
    """In the order they were measured."""
    copies: set[str] = field(default_factory=set)
    """Names in the run folder of what is copied there from the store: what a run has written, or a plan would."""
    _open: dict[str, Any] = field(default_factory=dict)
    _metrics: list[str] = field(default_factory=list)
    _outside: dict[str, Path] = field(default_factory=dict)
    """Folders of models by key: of those that no step of ours made, so somebody else may change them."""
    _strategy: dict[str, Any] = field(default_factory=lambda: {"name": "chain"})
    """What the last measurement refined by."""

    def __post_init__(self) -> None:
        self.task = self.task_plugin.module.load(self.task_plugin.cfg)
        self._task_key = self.task_plugin.dump()
        if holds := getattr(self.task, "key", ""):
            self._task_key = {name: v for name, v in self._task_key.items() if name not in _PLACES} | {"key": holds}
        critique = getattr(self.task, "critique_request", "") or GENERIC_CRITIQUE
        self.requests = Requests(self.task.refine_request, critique)

    def load(self, name: str) -> Model:
        from upturn.models import folders

        folder = Path(folders.resolve(name))
        model = Model(folders.key(folder), folder, name)
        self._outside[model.key] = folder
        return model

    def behind(self, endpoint: Endpoint) -> Model:
        """A model that answers at an endpoint. Nobody can see its weights, so its name and place stand for them."""
        name = f"{endpoint.chat_url} {endpoint.model}"
        return Model(sha256(name.encode()).hexdigest()[:16], Path(), endpoint.model, endpoint)

    def prompts(self, split: str, start: int, count: int) -> list[Prompt]:
        count = min(count, self.limit or count)
        found = self.task.prompts(split, start, count)
        if not found:
            raise DataError(
                f"task {self.task_plugin.name}, split {split}",
                f"It has no prompts from place {start} on.",
                "Ask for fewer prompts or iterations, or give more data.",
            )
        if len(found) < count:
            progress.say(f"task {self.task_plugin.name}: only {len(found)} of {count} {split} prompts are left")
        return found

    def generate(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        strategy: Plugin,
        how: Sampling,
        label: str,
        first: Attempts | None = None,
        purpose: str = "",
    ) -> Attempts:
        purpose = purpose or ("refine" if first else "")  # the first drafts took the numbers of no purpose
        how = how if how.max_new_tokens else how.model_copy(update={"max_new_tokens": self.task.max_new_tokens})
        config = {
            "prompts": [[prompt.id, prompt.text] for prompt in prompts],
            "strategy": strategy.dump(),
            "sampling": how.model_dump(),
            "requests": asdict(self.requests),
            "chat": CHAT_VERSION,
            "options": self.options.model_dump(),
            "seed": self.seed,
        } | ({"purpose": purpose} if purpose else {})

        def work(folder: Path) -> dict[str, Any]:
            from upturn.lab import work as jobs

            settings = self._settings(label, folder, purpose)
            rule = jobs.Rule(strategy, first.read() if first else ())
            if model.endpoint:
                return jobs.ask(model.endpoint, prompts, rule, how, settings, skip_failed=self.skip_failed)
            return jobs.generate(self._loaded(model), prompts, rule, how, settings)

        drafts = len(prompts) * num_drafts(strategy.cfg)
        guess = {"drafts": drafts, "tokens": round(estimate.ANSWER_SHARE * drafts * (how.max_new_tokens or 0))}
        inputs = [model.key, *([first.key] if first else [])]
        result = self._do("generate", label, config, inputs, work, guess, accepts=self._is_whole)
        facts = result.manifest["facts"]
        key = f"{result.key} without {facts['left_out']}" if facts.get("failed") else result.key
        return Attempts(key, result.folder / "drafts.jsonl", len(prompts) - facts.get("failed", 0))

    def _is_whole(self, facts: dict[str, Any]) -> bool:
        """Whether nobody wants to have the prompts asked again that an endpoint did not answer."""
        return self.skip_failed or not facts.get("failed")

    def score(self, attempts: Attempts, scorer: Plugin, label: str, voters: Attempts | None = None) -> Attempts:
        key_of = getattr(scorer.module, "key", None)  # of one whose config does not tell all
        told = {"name": scorer.name} | key_of(scorer.cfg) if key_of else scorer.dump()
        config = {"scorer": told, "task": self._task_key}

        def work(folder: Path) -> dict[str, Any]:
            others = {"voters": voters.read()} if voters else {}
            scored = scorer.module.load(scorer.cfg).score(self.task, answers(attempts.read()), **others)
            write_text(folder / "drafts.jsonl", _lines(scored))
            events.sample(label, scored)
            return {"drafts": sum(len(attempt.drafts) for attempt in scored)}

        inputs = [attempts.key, *([voters.key] if voters else [])]
        result = self._do("score", label, config, inputs, work, {})
        return Attempts(result.key, result.folder / "drafts.jsonl", attempts.num_prompts, scorer)

    def select(self, attempts: Attempts | Sequence[Attempts], selector: Plugin, label: str) -> Examples:
        sources = [attempts] if isinstance(attempts, Attempts) else list(attempts)
        for source in sources:
            _refuse_gold(selector, source.scorer)
        config = {"selector": selector.dump()}

        def work(folder: Path) -> dict[str, Any]:
            groups = [attempt for source in sources for attempt in source.read()]
            chosen = selector.module.select(groups, selector.cfg, self.task.vote_key)
            if not chosen.examples:
                reasons = why_none(chosen.dropped, len(groups))
                raise NothingToLearn(
                    f"selection for {label}",
                    f"None of {len(groups)} prompts gave an example: {reasons}.",
                    "Sample more drafts per prompt, raise the temperature, or choose another scorer or selection.",
                )
            write_text(folder / "examples.jsonl", _lines(chosen.examples))
            quality = asdict(label_precision(chosen.pairs)) if chosen.pairs else {}
            return {"examples": len(chosen.examples), "dropped": dict(chosen.dropped)} | quality

        prompts = sum(source.num_prompts for source in sources)
        guess = {"examples": prompts * getattr(selector.cfg, "pairs_per_prompt", 1), "dropped": {}}
        result = self._do("select", label, config, [source.key for source in sources], work, guess)
        facts = result.manifest["facts"]
        precision = facts.get("label_precision")
        if precision == 0 and not self._judges(sources):
            precision = None  # without a verifier no draft is right
        return Examples(
            key=result.key,
            path=result.folder / "examples.jsonl",
            count=facts["examples"],
            dropped=facts["dropped"],
            label_precision=precision,
            chosen_earlier=facts.get("chosen_earlier"),
        )

    def _judges(self, sources: Sequence[Attempts]) -> bool:
        """Whether the verifier judges any of the drafts that were scored; a reward model's scores do not tell that."""
        scored = (a for source in sources for a in source.read() if a.scores)
        return any(not isnan(self.task.grade(a.prompt, draft.text).value) for a in scored for draft in a.drafts)

    def train(
        self,
        model: Model,
        examples: Examples,
        how: Training,
        label: str,
        iteration: int = 0,
        reference: Model | None = None,
    ) -> Model:
        frozen = None if reference is None or reference.key == model.key else reference
        config = {
            "objective": how.objective.dump(),
            "train": how.train.key(),
            "requests": asdict(self.requests),
            "chat": CHAT_VERSION,
            "options": self.options.model_dump(),
            "seed": self.seed,
            "reference": frozen.key if frozen else "start",
        }

        def work(folder: Path) -> dict[str, Any]:
            from upturn.lab import work as jobs

            self._open.clear()  # what sampled is not needed here
            start = self._fresh(model)
            other = self._fresh(frozen) if frozen else None
            return jobs.train(start, other, examples.read(), how, self._settings(label, folder))

        rows = len(how.objective.module.needs(how.objective.cfg) or range(estimate.DRAFTS_PER_GROUP))
        epochs = how.train.num_train_epochs
        guess = {"tokens": estimate.training_tokens(examples.count, rows, self.task.max_new_tokens, epochs)}
        result = self._do("train", label, config, [model.key, examples.key], work, guess)
        self.copies.add("metrics.jsonl")
        if self.dry:
            return Model(result.key, result.folder / "model", label)
        entries = _trained(result.folder)
        self._metrics += (json.dumps(entry | {"label": label}) + "\n" for entry in entries)  # as it is called here
        write_text(self.run_dir / "metrics.jsonl", "".join(self._metrics))
        facts = result.manifest["facts"]
        row = summary.TrainingRow(
            label=label,
            iteration=iteration,
            pairs=examples.count,
            steps=facts["steps"],
            tokens=facts["row_tokens"],
            seconds=result.manifest["seconds"],
            dropped=examples.dropped,
            label_precision=examples.label_precision,
            chosen_earlier=examples.chosen_earlier,
            final_loss=facts["final_loss"],
            metrics=facts["metrics"],
        )
        self._report(training=(*self.summary.training, row))
        return Model(result.key, result.folder / "model", label)

    def measure(
        self,
        model: Model,
        cfg: Measure,
        label: str,
        iteration: int = 0,
        scorer: Plugin | None = None,
        upstream: Model | None = None,
    ) -> None:
        from upturn.lab import measuring

        row = measuring.measure(self, measuring.Asked(model, label, iteration, upstream), cfg, scorer)
        self.measured.append(model)
        self._strategy = cfg.strategy.dump() if cfg.strategy else {"name": "chain"}
        if row:
            self._report(measurements=(*self.summary.measurements, row))
            events.emit("measure", **row.model_dump(include=_TOLD))

    def drift(self, model: Model, other: Model, chains: Attempts, label: str) -> float:
        """Nats per token that the model's direct answers have moved from another model's; a durable step."""
        config = {"requests": asdict(self.requests), "chat": CHAT_VERSION, "options": self.options.model_dump()}

        def work(folder: Path) -> dict[str, Any]:
            from upturn.lab import work as jobs

            settings = self._settings(label, folder)
            return {"kl": jobs.drift(self._loaded(model), self._fresh(other), chains.read(), settings)}

        result = self._do("drift", label, config, [model.key, other.key, chains.key], work, {})
        return 0.0 if self.dry else result.manifest["facts"]["kl"]

    def publish(self, model: Model, about: str) -> None:
        from upturn.lab import publishing

        target, read = self.run_dir / "model", (*self._outside.values(), self.store.folder)
        if self.dry:  # before any work
            return publishing.check(target, read)
        layout = self.options.layout
        refining = publishing.card.Refining(strategy=self._strategy, layout=layout, **asdict(self.requests))
        publishing.publish(model.folder, target, self.summary, about, refining, read)

    @property
    def dry(self) -> bool:
        """Whether steps are only planned."""
        return isinstance(self.store, Planned)

    def _do(
        self,
        step: str,
        label: str,
        config: Any,
        inputs: list[str],
        work: Callable[[Path], dict[str, Any]],
        guess: dict[str, Any],
        accepts: Callable[[dict[str, Any]], bool] = lambda facts: True,
    ) -> Result:
        name = f"{step} {label}"
        if isinstance(self.store, Planned):
            planned = self.store.plan(name, step, VERSIONS[step], config, inputs, guess)
            self.copies.add(_step_file(len(self.store.steps), name))
            return planned

        def begin(folder: Path) -> dict[str, Any]:
            events.emit("stage", name=name, state="began")
            return work(folder)

        result = self.store.do(step, VERSIONS[step], config, inputs, begin, accepts, name)
        seconds, facts = result.manifest["seconds"], result.manifest["facts"]
        state = "done before" if result.cached else f"{seconds:.0f} s"
        events.emit("stage", name=name, state="cached" if result.cached else "done", seconds=seconds, facts=facts)
        detail = ", ".join(f"{key} {value}" for key, value in facts.items() if isinstance(value, int | str))
        progress.say(f"{name}: {state}" + (f" ({detail})" if detail else ""))
        stage = summary.Stage(
            name=name,
            seconds=seconds,
            cached=result.cached,
            tokens=facts.get("tokens", 0),
            peak_memory_mb=result.manifest.get("peak_memory_mb"),
        )
        self._report(stages=(*self.summary.stages, stage))
        told = _step_file(len(self.summary.stages), name)
        (self.run_dir / told).parent.mkdir(exist_ok=True)
        write_json(self.run_dir / told, {"key": result.key, "folder": str(result.folder), "facts": facts})
        self.copies.add(told)
        return result

    def _report(self, **changes: Any) -> None:
        self.summary = self.summary.model_copy(update=changes)
        self.summary.write(self.run_dir / "summary.json")

    def _loaded(self, model: Model) -> Any:
        """The model in memory; only the last one is kept, and training never touches it."""
        if model.key not in self._open:
            self._open.clear()
            self._open[model.key] = self._fresh(model)
        return self._open[model.key]

    def _fresh(self, model: Model) -> Any:
        """The model as it lies on the disk. Raises RunError where that is no longer the one that its key tells of."""
        from upturn.models import folders, load

        o = self.options
        loaded = load.load(str(model.folder), o.dtype, trust_remote_code=o.trust_remote_code, device=o.device)
        if self._outside.get(model.key) == model.folder and folders.key(model.folder) != model.key:
            raise RunError(
                f"model {model.name}",
                f"Its folder {model.folder} has changed since this run began.",
                "Run the same command again, and let nothing write into that folder until it ends.",
            )
        return loaded

    def _settings(self, label: str, folder: Path, purpose: str = "") -> Any:
        from upturn.lab import work as jobs

        return jobs.Settings(label, folder, self.requests, self.options, jobs.seed_for(purpose, self.seed))


def _step_file(number: int, name: str) -> str:
    """Where a run folder says which result a step has."""
    return f"steps/{number:02d}-{name.replace(' ', '-')}.json"


def _trained(folder: Path) -> list[dict[str, Any]]:
    """The optimizer steps of a training. Raises RunError where its model, which others start from, is not there."""
    try:
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, ValueError) as error:
        raise damaged(folder, "its metrics.jsonl cannot be read") from error
    model = folder / "model"
    if not (model / "config.json").is_file() or not any(model.glob("*.safetensors")):
        raise damaged(folder, "its model is gone")
    return entries


def _lines(records: Sequence[Any]) -> str:
    return "".join(line_of(record) + "\n" for record in records)


def _refuse_gold(selector: Plugin, scorer: Plugin | None) -> None:
    """No rule learns from the verifier where the run says that something else judges."""
    asks = getattr(selector.module, "uses_right", lambda cfg: False)(selector.cfg)
    if asks and scorer and getattr(scorer.module, "RIGHT_IS_GOLD", False):
        raise ConfigError(
            f"selection {selector.name}",
            f"It asks which drafts are right, and scorer {scorer.name} leaves that to the verifier: the run would "
            f"learn from the verifier and not from {scorer.name}.",
            "Take scorer exact, or a selection by scores, such as best_vs_worst, last_vs_first or advantages.",
        )
