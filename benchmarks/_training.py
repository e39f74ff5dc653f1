"""Pairs with the lengths of a task, and our arm that trains on them: as a token tree, or as separate rows.

Questions go through the model's own chat template; answers are random ids, since only their lengths matter here.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from typing import Any

import _child
import _profile
import _shapes
import torch

from upturn import trees
from upturn.lab._memory import keep_freed
from upturn.models import chat, load, policy
from upturn.objectives import evolve
from upturn.tasks import keywords
from upturn.tasks._words import WORDS
from upturn.tracking import progress
from upturn.training import plan, rows
from upturn.training.optimizer import MasterAdamW
from upturn.types import Draft, Pair, Prompt, Requests, Sample

CFG = evolve.Config.model_validate({})
ROWS = rows.order(evolve.needs(CFG))
LEARNING_RATE = 1e-6


@dataclass(frozen=True, slots=True)
class Profile:
    """Lengths of a task."""

    pairs: int
    answer: int
    """Mean tokens of an answer; each is drawn within a quarter of it."""
    prompt: int | None
    """Tokens of a question with its template; None takes the prompts of the task `keywords`."""
    gpu_pairs: int
    """As many as keep a GPU busy."""


PROFILES = {"keywords": Profile(8, 24, None, 64), "gsm8k": Profile(2, 150, 100, 32)}
BUDGETS = {"cpu": 4096, "cuda": 16384}
"""Most tree tokens of a micro-batch, by device."""


@dataclass(frozen=True, slots=True)
class Data:
    """The pairs of one optimizer step, and the six samples of each."""

    pairs: list[Pair]
    groups: list[list[Sample]]

    @property
    def logical_tokens(self) -> int:
        """Tokens of the six rows of every pair, without padding."""
        return sum(len(sample.context) + len(sample.target) for group in self.groups for sample in group)


def data(profile: str, num_pairs: int, loaded: load.Loaded) -> Data:
    """The same pairs for every arm. `num_pairs` 0 takes the profile's own number."""
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests(keywords.Config().refine_request))
    pairs = _pairs(PROFILES[profile], num_pairs, loaded.tokenizer, talk)
    return Data(pairs, [rows.samples_of(pair, ROWS, talk) for pair in pairs])


def _pairs(profile: Profile, num_pairs: int, tokenizer: Any, talk: chat.Chat) -> list[Pair]:
    rng = random.Random(0)
    ordinary = [i for i in range(len(tokenizer)) if i not in set(tokenizer.all_special_ids)]

    def draft(index: int) -> Draft:
        size = rng.randint(profile.answer * 3 // 4, profile.answer * 5 // 4)
        ids = (*rng.choices(ordinary, k=size - 1), talk.end_ids[-1])
        return Draft(index, 1, (), talk.decode(ids), ids, (0.0,) * size, "stop", 0, 0)

    prompts = keywords.load(keywords.Config()).prompts("train", 0, num_pairs or profile.pairs)
    if profile.prompt is not None:
        prompts = [Prompt(p.id, _question(profile.prompt, rng, talk)) for p in prompts]
    return [Pair(prompt, draft(0), draft(1)) for prompt in prompts]


def _question(length: int, rng: random.Random, talk: chat.Chat) -> str:
    words = rng.sample(WORDS, 3)
    while len(talk.context(" ".join(words), ())) < length:
        words.append(rng.choice(WORDS))
    return " ".join(words)


class Arm:
    """A model with its optimizer, and the pairs that each step takes."""

    def __init__(self, loaded: load.Loaded, found: Data, *, share: bool, budget: int) -> None:
        self.model, self.data, self.share = loaded.model, found, share
        policy.use_plans(self.model)
        self.optimizer = self._new_optimizer()
        self.device = next(self.model.parameters()).device
        self.sizes = [len(trees.build(group, share=share).ids_T) for group in found.groups]
        self.micro_batches = self._planned(budget)

    def _new_optimizer(self) -> MasterAdamW:
        return MasterAdamW(self.model, plan.Config.model_validate({}))

    def _planned(self, budget: int) -> tuple[tuple[int, ...], ...]:
        cfg = plan.Config.model_validate({"train_batch_size": len(self.sizes), "max_tree_tokens": budget})
        return plan.steps(self.sizes, cfg, 0)[0].micro_batches

    def step(self) -> dict[str, int]:
        """One optimizer step, the pieces in the order of `training.train`; returns what it computed."""
        weight = 0.0
        counts = {"computed_tokens": 0, "targets": 0, "attention_pairs": 0}
        for chosen in self.micro_batches:
            packed = self._pack(chosen)
            counts["computed_tokens"] += len(packed.tree.ids_T)
            counts["targets"] += len(packed.tree.targets_N)
            counts["attention_pairs"] += int((packed.tree.positions_T + 1).sum())
            packed = rows.to_device(packed, self.device)
            loss = evolve.loss(policy.tree_logprobs(self.model, packed.tree), packed.batch, CFG)
            self.optimizer.backward(loss.total, is_only=len(self.micro_batches) == 1)
            weight += loss.weight
        self.optimizer.step(weight, LEARNING_RATE)
        return counts

    def _pack(self, chosen: tuple[int, ...]) -> rows.Packed:
        groups = [self.data.groups[place] for place in chosen]
        zeros = torch.zeros(sum(rows.num_targets(group) for group in groups))  # the reference is computed once, before
        cached = rows.Cached(reference_N=zeros)
        examples, most = [self.data.pairs[place] for place in chosen], rows.root_tokens(self.device)
        return rows.pack(groups, ROWS, examples, cached, share=self.share, root_tokens=most)

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Time one step; with `profile`, say where its time goes; with `budget`, in micro-batches of that size."""
        if question.get("budget"):
            self.micro_batches = self._planned(question["budget"])
        if question.get("profile"):
            return {"shares": _profile.of(self.step, on_gpu=self.device.type == "cuda")}
        watch = _child.Stopwatch()
        try:
            found: dict[str, Any] = self.step()
        except torch.OutOfMemoryError:
            found = {"out_of_memory": True}
        if "out_of_memory" in found:  # now that the error holds no tensors: forget the gradients so far
            del self.optimizer
            torch.cuda.empty_cache()
            self.optimizer = self._new_optimizer()
        found |= watch.read() | {"micro_batches": len(self.micro_batches)}
        return found | {"logical_tokens": self.data.logical_tokens}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every arm of a training step takes."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--profile", choices=[*PROFILES], default="keywords")
    parser.add_argument("--pairs", type=int, default=0, help="pairs per step; 0: as the profile says")
    parser.add_argument("--threads", type=int, default=2)
    _child.add_device(parser)


def main() -> None:
    """Be the arm that `--arm` names."""
    parser = argparse.ArgumentParser(description="An arm of tree_step.py.")
    parser.add_argument("--arm", choices=("tree", "rows"), default="tree")
    parser.add_argument("--max-tree-tokens", type=int, default=4096)
    parser.add_argument("--shape", choices=[*_shapes.SHAPES], help="random weights of this shape instead of a model")
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed()  # as every training does
    progress.set_mode("quiet")
    loaded = load.load(args.model, "bfloat16", device="cpu" if args.shape else args.device)
    if args.shape:
        loaded = _shapes.random(args.shape, loaded, args.device)
    found = data(args.profile, args.pairs, loaded)
    arm = Arm(loaded, found, share=args.arm == "tree", budget=args.max_tree_tokens)
    with policy.captured_layers():  # as every training does
        _child.serve(arm.answer)


if __name__ == "__main__":
    main()
