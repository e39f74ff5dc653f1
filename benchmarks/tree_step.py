"""One EVOLVE preference step: token tree against separate rows.

Measures   forward, backward and optimizer update of one step over the same pairs, with the pieces that
           training uses (rows.pack, policy.tree_logprobs, objectives.evolve, MasterAdamW). Both arms cut
           micro-batches by the same number of computed tokens. Time: alternating runs in one process after a
           warm-up, median. Memory: each arm alone in a fresh process, high-water mark of its resident set
           during the step (the system's book-keeping; getrusage would also count the parent process).
Tokens     logical: those of the six rows of every pair laid out separately, the same for both arms.
Data       questions through the model's own chat template, answers of random ids: only lengths matter.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _facts
import torch

from upturn import trees
from upturn.models import chat, load, policy
from upturn.objectives import evolve
from upturn.tasks import keywords
from upturn.tasks._words import WORDS
from upturn.tracking import progress
from upturn.training import plan, rows
from upturn.training.optimizer import MasterAdamW
from upturn.types import Draft, Pair, Prompt, Sample

ARMS = ("tree", "rows")
CFG = evolve.Config.model_validate({})


@dataclass(frozen=True, slots=True)
class Profile:
    """Lengths of a task."""

    pairs: int
    answer: int
    """Mean tokens of an answer; each is drawn within a quarter of it."""
    prompt: int | None
    """Tokens of a question with its template; None takes the prompts of the task `keywords`."""


PROFILES = {"keywords": Profile(8, 24, None), "gsm8k-like": Profile(2, 150, 100)}


@dataclass(slots=True)
class Bench:
    """A model with its optimizer, and the micro-batches of both arms."""

    model: torch.nn.Module
    optimizer: MasterAdamW
    batches: dict[str, list[rows.Packed]]

    def step(self, arm: str) -> float:
        """Seconds of one optimizer step."""
        began = time.perf_counter()
        weight = 0.0
        for packed in self.batches[arm]:
            loss = evolve.loss(policy.tree_logprobs(self.model, packed.tree), packed.batch, CFG)
            loss.total.backward()
            self.optimizer.collect()
            weight += loss.weight
        self.optimizer.step(weight, 1e-6)
        return time.perf_counter() - began


def prepare(args: argparse.Namespace, name: str, arms: tuple[str, ...]) -> Bench:
    """Load the model and pack the pairs for the arms."""
    progress.set_mode("quiet")
    loaded = load.load(args.model, "bfloat16", device="cpu")
    policy.use_plans(loaded.model)
    request = keywords.Config().refine_request
    talk = chat.load(loaded.tokenizer, loaded.end_ids, request)
    order = rows.order(evolve.needs(CFG))
    pairs = _pairs(args, name, loaded.tokenizer, talk)
    groups = [rows.samples_of(pair, order, talk) for pair in pairs]
    batches = {arm: _micro_batches(pairs, groups, order, arm, args.max_tree_tokens) for arm in arms}
    return Bench(loaded.model, MasterAdamW(loaded.model, plan.Config.model_validate({})), batches)


def _pairs(args: argparse.Namespace, name: str, tokenizer: Any, talk: chat.Chat) -> list[Pair]:
    profile = PROFILES[name]
    rng = random.Random(0)
    ordinary = [i for i in range(len(tokenizer)) if i not in set(tokenizer.all_special_ids)]

    def draft(index: int) -> Draft:
        size = rng.randint(profile.answer * 3 // 4, profile.answer * 5 // 4)
        ids = (*rng.choices(ordinary, k=size - 1), talk.end_ids[-1])
        return Draft(index, 1, (), talk.decode(ids), ids, (0.0,) * size, "stop", 0, 0)

    prompts = keywords.load(keywords.Config()).prompts("train", 0, args.pairs or profile.pairs)
    if profile.prompt is not None:
        prompts = [Prompt(p.id, _question(profile.prompt, rng, talk)) for p in prompts]
    return [Pair(prompt, draft(0), draft(1)) for prompt in prompts]


def _question(length: int, rng: random.Random, talk: chat.Chat) -> str:
    words = rng.sample(WORDS, 3)
    while len(talk.context(" ".join(words), ())) < length:
        words.append(rng.choice(WORDS))
    return " ".join(words)


def _micro_batches(
    pairs: list[Pair], groups: list[list[Sample]], order: rows.Rows, arm: str, budget: int
) -> list[rows.Packed]:
    """As the trainer cuts them, each arm counting the tokens it computes; the reference's values are free."""
    share = arm == "tree"
    sizes = [len(trees.build(group, share=share).ids_T) for group in groups]
    cfg = plan.Config.model_validate({"train_batch_size": len(groups), "max_tree_tokens": budget})

    def packed(batch: tuple[int, ...]) -> rows.Packed:
        chosen = [groups[i] for i in batch]
        zeros_N = torch.zeros(sum(rows.num_targets(group) for group in chosen))
        return rows.pack(chosen, order, [pairs[i] for i in batch], rows.Cached(zeros_N), share=share)

    return [
        packed(batch)
        for batch in plan.steps(sizes, cfg, 0)[0].micro_batches
    ]


def resident(what: str) -> float:
    """`VmRSS` (now) or `VmHWM` (highest since `forget_peak`) in MiB; outside Linux the highest ever."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 2**10


def forget_peak() -> None:
    """Set the high-water mark to what is resident now, so that loading the model does not hide the step."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory(args: argparse.Namespace, name: str, arm: str) -> dict[str, float]:
    """Peak of one arm in a process of its own: `before` is model and optimizer, `peak` the step's."""
    command = [sys.executable, __file__, "--memory-of", name, arm]
    for option in ("pairs", "threads", "max_tree_tokens", "model"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _memory_here(args: argparse.Namespace) -> None:
    name, arm = args.memory_of
    bench = prepare(args, name, (arm,))
    for master in bench.optimizer.masters:  # the moments, which the first update makes
        bench.optimizer.adam.state[master] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.full_like(master, 0.0),
            "exp_avg_sq": torch.full_like(master, 0.0),
        }
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    bench.step(arm)
    peak = resident("VmHWM")
    found = {"before_mib": before, "peak_mib": peak, "step_mib": peak - before}
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Both arms of one profile."""
    bench = prepare(args, name, ARMS)
    logical = sum(packed.tree.num_row_tokens for packed in bench.batches["rows"])
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for repeat in range(args.repeats + 1):
        for arm in ARMS if repeat % 2 else reversed(ARMS):
            took = bench.step(arm)
            if repeat:  # the first is a warm-up
                seconds[arm].append(round(took, 3))
            print(f"{name} {arm}: {took:.2f} s{'' if repeat else ' (warm-up)'}", flush=True)
    record: dict[str, Any] = {"pairs": args.pairs or PROFILES[name].pairs, "logical_tokens": logical}
    for arm in ARMS:
        packed = bench.batches[arm]
        middle = statistics.median(seconds[arm])
        record[arm] = {
            "computed_tokens": sum(len(p.tree.ids_T) for p in packed),
            "micro_batches": len(packed),
            "seconds": seconds[arm],
            "median_seconds": middle,
            "logical_tokens_per_second": round(logical / middle, 1),
        }
    del bench
    for arm in ARMS:
        record[arm] |= memory(args, name, arm)
    record["speedup"] = round(record["rows"]["median_seconds"] / record["tree"]["median_seconds"], 3)
    record["peak_memory_ratio"] = round(record["tree"]["peak_mib"] / record["rows"]["peak_mib"], 3)
    record["step_memory_ratio"] = round(record["tree"]["step_mib"] / max(record["rows"]["step_mib"], 0.1), 3)
    record["token_ratio"] = round(logical / record["tree"]["computed_tokens"], 3)
    return record


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="One EVOLVE preference step: tree against rows.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=0, help="pairs per step; 0: as the profile says")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each arm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-tree-tokens", type=int, default=4096)
    parser.add_argument("--profiles", nargs="+", choices=[*PROFILES], default=[*PROFILES])
    parser.add_argument("--out", type=Path, default=_facts.HERE / "results" / "tree_step.json")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        _memory_here(args)
        return
    record: dict[str, Any] = {"benchmark": "tree_step", "model": args.model, "dtype": "bfloat16"}
    record |= {"repeats": args.repeats, "max_tree_tokens": args.max_tree_tokens, "where": _facts.facts()}
    record["profiles"] = {}
    for name in args.profiles:
        record["profiles"][name] = found = measure(args, name)
        ratio = f"{found['speedup']}x as fast as rows, with {found['step_memory_ratio']}x the step's memory"
        print(f"{name}: the tree is {ratio}", flush=True)
    _facts.write(args.out, record)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
