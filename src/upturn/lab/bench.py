"""The lab at work: every call stores its result under a key, and finds it there when the recipe runs again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upturn.config import Plugin, plugin
from upturn.engines.sampling import Config as Sampling
from upturn.errors import DataError
from upturn.evaluation import summary, turns
from upturn.lab import estimate
from upturn.lab.lab import Attempts, Measure, Model, Options, Pairs, Training
from upturn.lab.store import Planned, Result, Steps, write_json, write_text
from upturn.models.chat import VERSION as CHAT_VERSION
from upturn.tracking import progress
from upturn.types import Prompt, to_json

VERSIONS = {"model": 1, "generate": 1, "score": 1, "select": 1, "train": 1}
"""Raised when a step would give another result from the same inputs."""


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
    _open: dict[str, Any] = field(default_factory=dict)
    _metrics: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.task = self.task_plugin.module.load(self.task_plugin.cfg)
        self._task_key = self.task_plugin.dump()

    def load(self, name: str) -> Model:
        from upturn.models import load

        folder = Path(load.resolve(name))
        return Model(load.folder_key(folder), folder, name)

    def prompts(self, split: str, start: int, count: int) -> list[Prompt]:
        found = self.task.prompts(split, start, min(count, self.limit or count))
        if not found:
            raise DataError(
                f"task {self.task_plugin.name}, split {split}",
                f"It has no prompts from place {start} on.",
                "Ask for fewer prompts or iterations, or give more data.",
            )
        return found

    def generate(
        self, model: Model, prompts: Sequence[Prompt], strategy: Plugin, how: Sampling, label: str
    ) -> Attempts:
        how = how if how.max_new_tokens else how.model_copy(update={"max_new_tokens": self.task.max_new_tokens})
        config = {
            "prompts": [[prompt.id, prompt.text] for prompt in prompts],
            "strategy": strategy.dump(),
            "sampling": how.model_dump(),
            "request": self.task.refine_request,
            "chat": CHAT_VERSION,
            "options": self.options.model_dump(),
            "seed": self.seed,
        }

        def work(folder: Path) -> dict[str, Any]:
            from upturn.lab import work as jobs

            return jobs.generate(self._loaded(model), prompts, strategy, how, self._settings(label, folder))

        drafts = len(prompts) * strategy.cfg.turns  # type: ignore[attr-defined]
        guess = {"drafts": drafts, "tokens": round(estimate.ANSWER_SHARE * drafts * (how.max_new_tokens or 0))}
        result = self._do("generate", label, config, [model.key], work, guess)
        return Attempts(result.key, result.folder / "drafts.jsonl", len(prompts))

    def score(self, attempts: Attempts, scorer: Plugin, label: str) -> Attempts:
        config = {"scorer": scorer.dump(), "task": self._task_key}

        def work(folder: Path) -> dict[str, Any]:
            scored = scorer.module.load(scorer.cfg).score(self.task, attempts.read())
            write_text(folder / "drafts.jsonl", _lines(scored))
            return {"drafts": sum(len(attempt.drafts) for attempt in scored)}

        result = self._do("score", label, config, [attempts.key], work, {})
        return Attempts(result.key, result.folder / "drafts.jsonl", attempts.num_prompts)

    def select(self, attempts: Attempts | Sequence[Attempts], selector: Plugin, label: str) -> Pairs:
        sources = [attempts] if isinstance(attempts, Attempts) else list(attempts)
        config = {"selector": selector.dump()}

        def work(folder: Path) -> dict[str, Any]:
            groups = [attempt for source in sources for attempt in source.read()]
            chosen = selector.module.select(groups, selector.cfg, self.task.vote_key)
            if not chosen.pairs:
                reasons = ", ".join(f"{count} {reason}" for reason, count in chosen.dropped.items())
                raise DataError(
                    f"selection for {label}",
                    f"None of {len(groups)} prompts gave a pair: {reasons}.",
                    "Sample more drafts per prompt, raise the temperature, or choose another scorer or selection.",
                )
            write_text(folder / "pairs.jsonl", _lines(chosen.pairs))
            return {"pairs": len(chosen.pairs), "dropped": dict(chosen.dropped)}

        prompts = sum(source.num_prompts for source in sources)
        guess = {"pairs": prompts * getattr(selector.cfg, "pairs_per_prompt", 1), "dropped": {}}
        result = self._do("select", label, config, [source.key for source in sources], work, guess)
        facts = result.manifest["facts"]
        return Pairs(result.key, result.folder / "pairs.jsonl", facts["pairs"], facts["dropped"])

    def train(
        self, model: Model, pairs: Pairs, how: Training, label: str, iteration: int = 0, reference: Model | None = None
    ) -> Model:
        frozen = None if reference is None or reference.key == model.key else reference
        config = {
            "objective": how.objective.dump(),
            "train": how.train.model_dump(exclude={"save_seconds"}),
            "request": self.task.refine_request,
            "chat": CHAT_VERSION,
            "options": self.options.model_dump(),
            "seed": self.seed,
            "reference": frozen.key if frozen else "start",
        }

        def work(folder: Path) -> dict[str, Any]:
            from upturn.lab import work as jobs

            start = self._fresh(model)
            other = self._fresh(frozen) if frozen else None
            return jobs.train(start, other, pairs.read(), how, self._settings(label, folder))

        rows = len(how.objective.module.needs(how.objective.cfg))
        guess = {
            "tokens": estimate.training_tokens(pairs.count, rows, self.task.max_new_tokens, how.train.num_train_epochs)
        }
        result = self._do("train", label, config, [model.key, pairs.key], work, guess)
        if self.dry:
            return Model(result.key, result.folder / "model", label)
        self._metrics.append(result.folder / "metrics.jsonl")
        write_text(self.run_dir / "metrics.jsonl", "".join(path.read_text() for path in self._metrics))
        facts = result.manifest["facts"]
        row = summary.TrainingRow(
            label=label,
            iteration=iteration,
            pairs=pairs.count,
            steps=facts["steps"],
            tokens=facts["row_tokens"],
            seconds=result.manifest["seconds"],
            dropped=pairs.dropped,
            final_loss=facts["final_loss"],
            metrics=facts["metrics"],
        )
        self._report(training=(*self.summary.training, row))
        return Model(result.key, result.folder / "model", label)

    def measure(self, model: Model, cfg: Measure, label: str, iteration: int = 0) -> None:
        prompts = self.prompts("test", 0, cfg.prompts)
        exact = plugin("scorers", "exact")
        chain = plugin("strategies", {"name": "chain", "turns": cfg.turns})
        drafts = self.generate(model, prompts, chain, cfg.sampling, f"measure {label}")
        scored = self.score(drafts, exact, f"measure {label}")
        vote = None
        if cfg.majority and (label != "base" or cfg.base_majority):
            parallel = plugin("strategies", {"name": "parallel", "turns": cfg.majority})
            siblings = self.generate(model, prompts, parallel, cfg.sampling, f"majority {label}")
            voters = self.score(siblings, exact, f"majority {label}")
            vote = None if self.dry else turns.majority(voters.read(), self.task.vote_key)
        if self.dry:
            return
        attempts = scored.read()
        row = summary.measure(label, iteration, attempts, vote=vote, seed=self.seed)
        target = self.run_dir / summary.drafts_file(label)
        target.parent.mkdir(exist_ok=True)
        write_text(target, scored.path.read_text())
        self._report(measurements=(*self.summary.measurements, row))

    def publish(self, model: Model, about: str) -> None:
        if self.dry:
            return
        from upturn.lab import work as jobs

        jobs.publish(model.folder, self.run_dir / "model", self.summary, about)

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
    ) -> Result:
        name = f"{step} {label}"
        if isinstance(self.store, Planned):
            return self.store.plan(name, step, VERSIONS[step], config, inputs, guess)
        result = self.store.do(step, VERSIONS[step], config, inputs, work)
        seconds, facts = result.manifest["seconds"], result.manifest["facts"]
        state = "done before" if result.cached else f"{seconds:.0f} s"
        detail = ", ".join(f"{key} {value}" for key, value in facts.items() if isinstance(value, int | str))
        progress.say(f"{name}: {state}" + (f" ({detail})" if detail else ""))
        stage = summary.Stage(name=name, seconds=seconds, cached=result.cached, tokens=facts.get("tokens", 0))
        self._report(stages=(*self.summary.stages, stage))
        place = self.run_dir / "steps" / f"{len(self.summary.stages):02d}-{name.replace(' ', '-')}.json"
        place.parent.mkdir(exist_ok=True)
        write_json(place, {"key": result.key, "folder": str(result.folder), "facts": facts})
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
        from upturn.models import load

        o = self.options
        return load.load(str(model.folder), o.dtype, trust_remote_code=o.trust_remote_code, device=o.device)

    def _settings(self, label: str, folder: Path) -> Any:
        from upturn.lab import work as jobs

        return jobs.Settings(label, folder, self.task.refine_request, self.options, self.seed)


def _lines(records: Sequence[Any]) -> str:
    return "".join(json.dumps(to_json(record), separators=(",", ":")) + "\n" for record in records)
