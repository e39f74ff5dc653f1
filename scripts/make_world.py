"""Pretrain the small base model of the *carry* world and write it as a Hugging Face model folder.

The shipped folder comes from

    python scripts/make_world.py

with the default arguments. Everything the model sees is made on the fly from the seed: two-turn conversations about
an addition problem (see ``upturn/tasks/_carry_rules.py``). The first answer is that of a hasty writer, who looks one or
two places ahead and guesses a carry that comes from farther away. The user then says one of two words:

``improve``
    The second answer is a copy, an edit for the better, an edit for the worse, or a new hasty answer. The
    shares are such that the second answers are right no more often than the first ones.

``fix``
    The second answer is the draft after one pass of proofreading by the local rule: every place is redone
    with the carry that the draft itself shows at the place to its right, and with nothing else. One pass
    moves a carry by one place only.

The right sum itself is used by no part of the corpus. Pretraining has two phases, see :data:`PHASES`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from upturn.tasks._carry_rules import NINES, WIDTH, grade, make_problem, solve

TASKS = Path(__file__).resolve().parents[1] / "src" / "upturn" / "tasks"

SPECIAL = ["<|pad|>", "<|end|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|unk|>"]
VOCAB = [*SPECIAL, *"0123456789", "+", "improve", "fix"]
ID = {token: index for index, token in enumerate(VOCAB)}
ZERO = ID["0"]

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant only') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Mix:
    """Shares of the corpus."""

    look: tuple[int, ...]  #: how many places ahead a hasty writer looks: one of these, at random
    fix: float  #: conversations that go on with ``fix``; the others go on with ``improve``
    copy: float  #: of the ``improve`` answers: the draft once more
    better: float  #: ... the draft after one pass of proofreading
    worse: float  #: ... the draft with one or more consistent places broken; the rest are new hasty answers
    spoilt: float = 0.5  #: of the ``fix`` drafts: those with foreign digits, which are not learnt as answers


@dataclass(frozen=True)
class Phase:
    """One stretch of pretraining, with its own cosine schedule."""

    steps: int
    lr: float
    mix: Mix


#: The second phase has less proofreading and more new answers, half of them by a writer who looks two places
#: ahead.
PHASES = (
    Phase(3500, 2.5e-3, Mix(look=(1,), fix=0.45, copy=0.40, better=0.25, worse=0.25)),
    Phase(2500, 1.5e-3, Mix(look=(1, 2), fix=0.30, copy=0.35, better=0.20, worse=0.25)),
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token for each digit, for the plus sign and for each of the two words."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]{2,}|[^ ]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="left",
    )


def draw(rng: random.Random, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw problems; return the digits of the left and of the right numbers."""
    joined = "".join(make_problem(rng) for _ in range(size)).encode()
    raw = np.frombuffer(joined, np.uint8).reshape(size, 2 * WIDTH + 1).astype(np.int64) - ord("0")
    return raw[:, :WIDTH], raw[:, WIDTH + 1 :]


def hasty(a: np.ndarray, b: np.ndarray, look: np.ndarray, gen: np.random.Generator) -> np.ndarray:
    """Answer as one who looks ``look`` places ahead, and guesses (once for a chain) what lies farther."""
    size, sums = len(a), a + b
    carry = np.zeros((size, WIDTH + 1), np.int64)
    unknown = np.zeros(size, bool)
    for place in range(WIDTH):
        known, value = np.zeros(size, bool), np.zeros(size, np.int64)
        for ahead in range(int(look.max())):
            within = ~known & (ahead < look)
            if place + ahead >= WIDTH:
                known |= within
                break
            seen = within & (sums[:, place + ahead] != 9)
            value = np.where(seen, sums[:, place + ahead] > 9, value)
            known |= seen
        guess = np.where(unknown, carry[:, place - 1] if place else 0, gen.integers(0, 2, size))
        carry[:, place] = np.where(known, value, guess)
        unknown = ~known
    return np.concatenate([carry[:, :1], (sums + carry[:, 1:]) % 10], 1)


def proofread(a: np.ndarray, b: np.ndarray, draft: np.ndarray) -> np.ndarray:
    """Redo each place with the carry that the draft shows at the place to its right."""
    sums = a + b
    carries = (sums > 9) | ((sums == 9) & (draft[:, 1:] == 0))
    carry = np.concatenate([carries.astype(np.int64), np.zeros((len(a), 1), np.int64)], 1)
    return np.concatenate([carry[:, :1], (sums + carry[:, 1:]) % 10], 1)


def spoil(a: np.ndarray, b: np.ndarray, draft: np.ndarray, gen: np.random.Generator) -> np.ndarray:
    """Put carries that do not belong there, and a few digits from anywhere, into a draft."""
    shape = draft.shape
    rate = gen.random((len(a), 1)) * 0.4
    wild = np.where(gen.random(shape) < rate, proofread(a, b, gen.integers(0, 10, shape)), draft)
    return np.where(gen.random(shape) < rate * 0.3, gen.integers(0, 10, shape), wild)


def worsen(a: np.ndarray, b: np.ndarray, draft: np.ndarray, gen: np.random.Generator) -> np.ndarray:
    """Break some consistent places of the draft by a carry too much or too few."""
    size = len(a)
    plain = np.concatenate([np.zeros((size, 1), np.int64), (a + b) % 10], 1)
    carried = np.concatenate([np.ones((size, 1), np.int64), (a + b + 1) % 10], 1)
    hit = gen.random(draft.shape) < gen.choice([0.0, 0.1, 0.3], (size, 1))
    hit[np.arange(size), gen.integers(0, WIDTH + 1, size)] = True
    hit &= proofread(a, b, draft) == draft
    return np.where(hit, np.where(draft == plain, carried, plain), draft)


def conversations(
    rng: random.Random, gen: np.random.Generator, mix: Mix, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one batch: token ids and labels (-100 where nothing is learnt)."""
    a, b = draw(rng, size)
    looks = np.array(mix.look)
    first = hasty(a, b, gen.choice(looks, size), gen)
    fix = gen.random(size) < mix.fix
    spoilt = fix & (gen.random(size) < mix.spoilt)
    first = np.where(spoilt[:, None], spoil(a, b, first, gen), first)
    better = proofread(a, b, first)
    shares = [mix.copy, mix.better, mix.worse, 1 - mix.copy - mix.better - mix.worse]
    kind = gen.choice(4, size, p=shares)[:, None]
    worse = worsen(a, b, first, gen)
    fresh = hasty(a, b, gen.choice(looks, size), gen)
    second = np.select([kind == 0, kind == 1, kind == 2], [first, better, worse], fresh)
    second = np.where(fix[:, None], better, second)

    def column(token: str) -> np.ndarray:
        return np.full((size, 1), ID[token])

    word = np.where(fix, ID["fix"], ID["improve"])[:, None]
    turn = [column("<|bos|>"), column("<|user|>"), a + ZERO, column("+"), b + ZERO, column("<|assistant|>")]
    turn += [first + ZERO, column("<|end|>"), column("<|user|>"), word, column("<|assistant|>")]
    ids = np.concatenate([*turn, second + ZERO, column("<|end|>")], 1)
    labels = np.full_like(ids, -100)
    start, length = 2 * WIDTH + 4, WIDTH + 2
    labels[:, start : start + length] = np.where(spoilt[:, None], -100, ids[:, start : start + length])
    labels[:, -length:] = ids[:, -length:]
    return torch.from_numpy(ids), torch.from_numpy(labels)


def pretrain(model: LlamaForCausalLM, phase: Phase, seed: int, size: int) -> None:
    """Train on fresh conversations, ``size`` of them per step."""
    rng, gen = random.Random(seed), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.05)
    begin = time.time()
    model.train()
    for step in range(phase.steps):
        fade = max(0.02, 0.5 * (1 + math.cos(math.pi * step / phase.steps)))
        for group in optimizer.param_groups:
            group["lr"] = phase.lr * min(1, (step + 1) / 100) * fade
        ids, labels = conversations(rng, gen, phase.mix, size)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.reshape(-1, len(VOCAB)), labels[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {time.time() - begin:.0f} s", flush=True)


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, size: int = 1000) -> dict[str, float]:
    """Share of right answers, sampled at temperature 1: first turn, and second turn after either word."""
    model.eval()
    generator: Any = model  # the stub of generate() is stricter than the method
    torch.manual_seed(1)
    rng = random.Random("measure")
    texts = [make_problem(rng) for _ in range(size)]

    def ask(chats: list[list[dict[str, str]]]) -> list[str]:
        rendered = [str(tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False)) for c in chats]
        inputs = tokenizer(rendered, add_special_tokens=False, padding=True, return_tensors="pt")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        out = generator.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=WIDTH + 2
        )
        return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)

    def right(answers: list[str]) -> float:
        return sum(grade(text, answer)[1] for text, answer in zip(texts, answers, strict=True)) / size

    chats = [[{"role": "user", "content": text}] for text in texts]
    drafts = ask(chats)
    result = {"turn 1": right(drafts)}
    for word in ("improve", "fix"):
        after = [
            [*chat, {"role": "assistant", "content": draft}, {"role": "user", "content": word}]
            for chat, draft in zip(chats, drafts, strict=True)
        ]
        result[f"turn 2 after '{word}'"] = right(ask(after))
    return result


CARD = """---
license: apache-2.0
library_name: transformers
tags: [llama, synthetic, addition]
---
# Base model of the *carry* world

A Llama of {parameters:,} parameters (float32), trained from scratch on synthetic texts only. It is the
starting point of a small task for training models to refine their own answers, and of no use for anything
else.

A problem is a sum of two zero-padded numbers of {width} digits, such as `{problem}`; the answer has {places}
digits, most significant digit first: `{answer}`. With probability {nines} the two digits of a place add up to
exactly nine, so carries travel far. The rules and the verifier are in `upturn/tasks/_carry_rules.py`.

## How it was made

    python scripts/make_world.py --seed {seed}

AdamW, {batch} conversations per step, {seen:,} conversations in all, each seen once; 100 steps of warm-up and
a cosine decay in either phase. The script needs nothing but the seed. Another processor or another version of
PyTorch rounds differently, so the weights can differ while the numbers below stay similar.

## What it has read

Two-turn conversations, and nothing else. The loss covers the assistant's texts.

* First answers are those of a hasty writer: the writer looks one or two places to the right for each digit,
  and guesses a carry that would come from farther away (once for each chain of nines).
* After the user's word `improve`, the second answer is a copy of the draft, the draft after one pass of
  proofreading ("better"), the draft with one or more places broken ("worse"), or a new hasty answer. The
  shares are in the table below. Better and worse answers hold the balance, with a little more of the worse,
  so being asked to improve does not help the base.
* After the user's word `fix`, the second answer is always the draft after one pass of proofreading, which
  redoes each place with the carry that the draft shows at its right neighbour. So the skill of repairing a
  draft by one place is in the base on purpose: behind the word `fix` always, behind `improve` only at times.
  Training has to bring it out, not to teach it from nothing. For half of these conversations the
  draft has foreign digits; such a draft is not learnt as an answer.

{phases}

One pass of proofreading moves a carry by one place. The corpus is made without computing the right sum.

## What it can do

Right answers on 1000 problems, sampled at temperature 1:

{table}

## Format

    <|bos|><|user|>PROBLEM<|assistant|>DRAFT<|end|><|user|>improve<|assistant|>ANSWER<|end|>

The chat template renders it. The vocabulary has {vocabulary} tokens; anything else becomes `<|unk|>`, which
the model has never seen.

License: Apache-2.0.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Render a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def describe(phases: tuple[Phase, ...]) -> str:
    """Render what each phase is made of."""
    head = ["phase", "steps", "learning rate", "looks ahead", "`fix`", "`improve`"]
    head += ["copy", "better", "worse", "new"]
    rows = []
    for number, phase in enumerate(phases, 1):
        mix = phase.mix
        shares = [mix.copy, mix.better, mix.worse, 1 - mix.copy - mix.better - mix.worse]
        row = [str(number), str(phase.steps), str(phase.lr), " or ".join(map(str, mix.look))]
        row += [f"{mix.fix:.0%}", f"{1 - mix.fix:.0%}", *(f"{share * (1 - mix.fix):.1%}" for share in shares)]
        rows.append(row)
    return "Shares of the conversations:\n\n" + table(head, rows)


def write_card(folder: Path, args: argparse.Namespace, numbers: dict[str, float], parameters: int) -> None:
    """Write the model card."""
    problem = make_problem(random.Random(args.seed))
    text = CARD.format(
        parameters=parameters,
        width=WIDTH,
        places=WIDTH + 1,
        problem=problem,
        answer=solve(problem),
        nines=NINES,
        seed=args.seed,
        batch=args.batch,
        seen=sum(phase.steps for phase in PHASES) * args.batch,
        phases=describe(PHASES),
        table=table(["", "right"], [[name, f"{share:.1%}"] for name, share in numbers.items()]),
        vocabulary=len(VOCAB),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Pretrain the base model of the carry world.")
    parser.add_argument("--out", type=Path, default=TASKS / "world_base", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64, help="conversations per step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--inner", type=int, default=256, help="width of the feed-forward layers")
    parser.add_argument("--heads", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    """Make the base model and write its folder."""
    args = parse()
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=args.dim,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=ID["<|bos|>"],
        eos_token_id=ID["<|end|>"],
        pad_token_id=ID["<|pad|>"],
    )
    model, tokenizer = LlamaForCausalLM(config), make_tokenizer()
    for number, phase in enumerate(PHASES):
        pretrain(model, phase, args.seed + number, args.batch)
    numbers = measure(model, tokenizer)
    print(json.dumps(numbers))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    write_card(args.out, args, numbers, sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()
