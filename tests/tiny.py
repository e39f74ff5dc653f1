"""A tiny random model with a real tokenizer and chat template, saved as an ordinary folder."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}<u>{{ m['content'] }}"
    "{% else %}<a>{{ m['content'] }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<u>", "<a>", "<unk>"]
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
SUMS = string.digits + "+"
"""Characters with which a random model hits a digit of a sum now and then; all others are unknown tokens."""


def tokenizer(template: str | None = TEMPLATE, characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    raw.decoder = decoders.Fuse()  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<u>", "<a>"],
    )
    made.chat_template = template  # type: ignore[assignment]
    return made


def save(
    folder: Path,
    *,
    seed: int = 0,
    context: int = 512,
    template: str | None = TEMPLATE,
    characters: str = CHARACTERS,
) -> Path:
    """Write the model; another seed gives other weights."""
    torch.manual_seed(seed)
    words = tokenizer(template, characters)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
