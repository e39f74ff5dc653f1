"""Transformers' arms of a chain: `generate` in batches, and continuous batching (`generate_batch`)."""

from __future__ import annotations

import argparse
from typing import Any

import _child
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from upturn.models import load

Ids = list[list[int]]
PAGES = {
    "cpu": ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=2048),
    "cuda": ContinuousBatchingConfig(max_memory_percent=0.3),
}
"""On a CPU 64k tokens of cache in pages of 256: left to itself it takes most of the memory. On a GPU it is left to
itself but for a limit, since other arms wait there."""


def in_batches(model: Any, contexts: Ids, config: GenerationConfig, size: int) -> Ids:
    """`generate` on left-padded batches, its own KV cache, SDPA."""
    answers: Ids = []
    for first in range(0, len(contexts), size):
        part, device = contexts[first : first + size], model.device
        width = max(map(len, part))
        ids = torch.tensor([[config.pad_token_id] * (width - len(row)) + row for row in part], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in part], device=device)
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        answers += out[:, width:].tolist()
    return answers


def continuous(model: Any, contexts: Ids, config: GenerationConfig) -> Ids:
    """`generate_batch`: paged cache, requests join and leave the running batch. On a GPU the manager stays.

    There it captures CUDA graphs when it is made, which a server would do once. It samples as it was made to, so
    another temperature needs a new one.
    """
    device, how = model.device.type, (config.do_sample, config.temperature)
    if getattr(model, "sampled_as", how) != how:
        model.destroy_cached_continuous_batching_manager()
    model.sampled_as = how
    out = model.generate_batch(
        inputs=contexts,
        generation_config=config,
        continuous_batching_config=PAGES[device],
        persistent_manager=device == "cuda",
    )
    failed = [one.error for one in out.values() if one.error]
    if failed or len(out) < len(contexts):
        raise SystemExit(f"generate_batch answered {len(out)} of {len(contexts)} requests: {failed[:1]}")
    ordered = sorted(out, key=lambda request: int(request.rpartition("_")[2]))
    return [out[request].generated_tokens for request in ordered]


def up_to_end(ids: list[int], ends: list[int]) -> list[int]:
    """The answer without what stands behind its end token."""
    stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def main() -> None:
    """Answer questions of contexts with token ids: in batches of the size asked for, 0 for continuous batching."""
    parser = argparse.ArgumentParser(description="Transformers' arm of chain.py.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    _child.add_device(parser)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model: Any = load.load(args.model, args.dtype, device=args.device).model

    def handle(question: dict[str, Any]) -> dict[str, Any]:
        torch.manual_seed(question["seed"])
        how: dict[str, Any] = {"temperature": question["temperature"], "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            do_sample=question["temperature"] > 0,
            max_new_tokens=question["max_new_tokens"],
            eos_token_id=question["ends"],
            pad_token_id=question["ends"][0],
            **(how if question["temperature"] else {}),
        )
        contexts, size = question["contexts"], question["batch"]
        watch = _child.Stopwatch()
        answers = in_batches(model, contexts, config, size) if size else continuous(model, contexts, config)
        return watch.read() | {"answers": [up_to_end(ids, question["ends"]) for ids in answers]}

    _child.serve(handle)


if __name__ == "__main__":
    main()
