"""Pretrain the small base model of the *carry* world and write it as a Hugging Face model folder."""
from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src/upturn/tasks"))
from world_rules import NINES, WIDTH, make_problem, solve  # noqa: E402

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB = ["<|pad|>", "<|end|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|unk|>", *"0123456789", "+", "improve", "fix"]
T = {t: i for i, t in enumerate(VOCAB)}


def make_tokenizer():
    tok = Tokenizer(models.WordLevel(T, unk_token="<|unk|>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]{2,}|[^ ]"), "isolated")
    tok.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"], chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False, model_max_length=256, padding_side="left")


def draw(rng: random.Random, size: int):
    texts = [make_problem(rng) for _ in range(size)]
    raw = np.frombuffer("".join(texts).encode(), np.uint8).reshape(size, 2 * WIDTH + 1).astype(np.int64) - 48
    return raw[:, :WIDTH], raw[:, WIDTH + 1:]


def sloppy(a, b, look, gen):
    """Answers of a writer who looks `look` places ahead and tosses a coin about what he cannot see."""
    size = len(a)
    s = a + b
    carry = np.zeros((size, WIDTH + 1), np.int64)
    unknown = np.zeros(size, bool)
    for j in range(WIDTH):
        known, value = np.zeros(size, bool), np.zeros(size, np.int64)
        for d in range(int(look.max())):
            within = ~known & (d < look)
            if j + d >= WIDTH:
                known |= within
                break
            hit = within & (s[:, j + d] != 9)
            value = np.where(hit, s[:, j + d] > 9, value)
            known |= hit
        guess = np.where(unknown, carry[:, j - 1] if j else 0, gen.integers(0, 2, size))
        carry[:, j] = np.where(known, value, guess)
        unknown = ~known
    return np.concatenate([carry[:, :1], (s + carry[:, 1:]) % 10], 1)


def local(a, b, y):
    s = a + b
    out = (s > 9) | ((s == 9) & (y[:, 1:] == 0))
    carry = np.concatenate([out.astype(np.int64), np.zeros((len(a), 1), np.int64)], 1)
    return np.concatenate([carry[:, :1], (s + carry[:, 1:]) % 10], 1)


def batch(rng, gen, args, size):
    a, b = draw(rng, size)
    looks = np.array([int(k) for k in args.look.split(",")])
    first = sloppy(a, b, gen.choice(looks, size), gen)
    check = gen.random(size) < args.check
    # check rows: half of the drafts get foreign digits and are not learnt as answers
    spoil = check & (gen.random(size) < 0.5)
    rate = gen.random((size, 1)) * 0.4
    wild = np.where(gen.random((size, WIDTH + 1)) < rate, local(a, b, gen.integers(0, 10, (size, WIDTH + 1))), first)
    wild = np.where(gen.random((size, WIDTH + 1)) < rate * .3, gen.integers(0, 10, (size, WIDTH + 1)), wild)
    first = np.where(spoil[:, None], wild, first)
    should = local(a, b, first)
    kind = gen.choice(4, size, p=[args.copy, args.better, args.worse, 1 - args.copy - args.better - args.worse])[:, None]
    low = np.concatenate([np.zeros((size, 1), np.int64), (a + b) % 10], 1)
    high = np.concatenate([np.ones((size, 1), np.int64), (a + b + 1) % 10], 1)
    flip = gen.random((size, WIDTH + 1)) < gen.choice([0.0, 0.1, 0.3], (size, 1))
    flip[np.arange(size), gen.integers(0, WIDTH + 1, size)] = True
    worse = np.where(flip & (should == first), np.where(first == low, high, low), first)
    fresh = sloppy(a, b, gen.choice(looks, size), gen)
    second = np.select([kind == 0, kind == 1, kind == 2], [first, should, worse], fresh)
    col = lambda t: np.full((size, 1), T[t])  # noqa: E731
    reply = np.where(check[:, None], should, second) + T["0"]
    ids = np.concatenate([col("<|bos|>"), col("<|user|>"), a + T["0"], col("+"), b + T["0"], col("<|assistant|>"), first + T["0"],
        col("<|end|>"), col("<|user|>"), np.where(check, T["fix"], T["improve"])[:, None], col("<|assistant|>"), reply, col("<|end|>")], 1)
    labels = np.full_like(ids, -100)
    p = 2 * WIDTH + 4
    labels[:, p:p + WIDTH + 2] = np.where(spoil[:, None], -100, ids[:, p:p + WIDTH + 2])
    labels[:, -(WIDTH + 2):] = ids[:, -(WIDTH + 2):]
    return torch.from_numpy(ids), torch.from_numpy(labels), check


@torch.no_grad()
def sample(model, ids, new=WIDTH + 2, temperature=1.0):
    """ids (B,L) equal length; returns (B,new)"""
    out, past, cur = [], None, ids
    for _ in range(new):
        r = model(input_ids=cur, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = r.past_key_values
        cur = torch.multinomial((r.logits[:, -1].float() / temperature).softmax(-1), 1)
        out.append(cur)
    return torch.cat(out, 1)


def report(model, args, seed=12345, size=512):
    model.eval()
    rng, gen = random.Random(seed), np.random.default_rng(seed)
    a, b = draw(rng, size)
    full = np.full((size, WIDTH + 1), 0)
    truth = np.array([[int(c) for c in solve("".join(map(str, x)) + "+" + "".join(map(str, y)))] for x, y in zip(a, b)]) + T["0"]
    col = lambda t: torch.full((size, 1), T[t])  # noqa: E731
    x = torch.cat([col("<|bos|>"), col("<|user|>"), torch.from_numpy(a) + T["0"], col("+"), torch.from_numpy(b) + T["0"], col("<|assistant|>")], 1)
    y = sample(model, x)
    ok = (y[:, :-1].numpy() == truth).all(1)
    z = sample(model, torch.cat([x, y, col("<|user|>"), col("improve"), col("<|assistant|>")], 1))
    ok2 = (z[:, :-1].numpy() == truth).all(1)
    m = sample(model, torch.cat([x, y, col("<|user|>"), col("fix"), col("<|assistant|>")], 1))
    should = local(a, b, y[:, :-1].numpy() - T["0"]) + T["0"]
    bad = should != y[:, :-1].numpy()
    m = m[:, :-1].numpy()
    digit = ((y[:, :-1].numpy() - truth) % 10)
    model.train()
    return dict(t1=ok.mean(), t2=ok2.mean(), copy=(y == z).all(1).float().mean().item(), off=np.isin(digit, [2,3,4,5,6,7,8]).mean(),
      fixed=(m == truth).all(1).mean(), hit=(m == should)[bad].mean() if bad.any() else 0, false=(m != should)[~bad].mean(), badrate=bad.mean())


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=4000)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--dim", type=int, default=128)
    p.add_argument("--ff", type=int, default=384)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--look", default="1,2")
    p.add_argument("--copy", type=float, default=0.34)
    p.add_argument("--better", type=float, default=0.28)
    p.add_argument("--worse", type=float, default=0.28)
    p.add_argument("--init", default="")
    p.add_argument("--check", type=float, default=0.5)
    p.add_argument("--compile", type=int, default=0)
    p.add_argument("--minutes", type=float, default=0)
    args = p.parse_args()
    torch.manual_seed(args.seed)
    rng, gen = random.Random(args.seed), np.random.default_rng(args.seed)
    tok = make_tokenizer()
    cfg = LlamaConfig(vocab_size=len(VOCAB), hidden_size=args.dim, intermediate_size=args.ff, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.heads, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=T["<|bos|>"], eos_token_id=T["<|end|>"], pad_token_id=T["<|pad|>"])
    model = LlamaForCausalLM.from_pretrained(args.init) if args.init else LlamaForCausalLM(cfg)
    print(sum(q.numel() for q in model.parameters()), "parameters", flush=True)
    fwd = torch.compile(lambda i: model(input_ids=i, use_cache=False).logits) if args.compile else (lambda i: model(input_ids=i, use_cache=False).logits)
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    t0 = time.time()
    for step in range(args.steps):
        lr = args.lr * min(1, (step + 1) / 100) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for g in opt.param_groups:
            g["lr"] = lr
        ids, labels, check = batch(rng, gen, args, args.batch)
        logits = fwd(ids)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, len(VOCAB)), labels[:, 1:].reshape(-1))
        opt.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 500 == 499:
            model.save_pretrained(args.out)
            tok.save_pretrained(args.out)
        if step % 100 == 0 or step + 1 == args.steps:
            with torch.no_grad():
                ce = torch.nn.functional.cross_entropy(logits.reshape(-1, len(VOCAB)), labels[:, 1:].reshape(-1), reduction="none").view(len(ids), -1)
                tail = ce[:, -(WIDTH + 2):].mean(1)
                c = torch.from_numpy(check)
            print(step, f"{time.time()-t0:.0f}s loss {loss.item():.4f} first {ce[:, :-(WIDTH+2)][~c].sum(1).mean()/(WIDTH+2):.4f} check {tail[c].mean():.4f} improve {tail[~c].mean():.4f}", {k: round(float(v), 3) for k, v in report(model, args).items()} if step % 500 == 0 or step + 1 == args.steps else "", flush=True)
    model.save_pretrained(args.out)
    tok.save_pretrained(args.out)


if __name__ == "__main__":
    main()
