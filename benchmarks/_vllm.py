"""vLLM's arm of a chain, with its prefix cache; it runs in an environment that has vllm and nothing of ours."""

from __future__ import annotations

import argparse
import os
from typing import Any

import _child


def main() -> None:
    """Answer questions of contexts with token ids."""
    parser = argparse.ArgumentParser(description="vLLM's arm of chain.py.")
    parser.add_argument("--folder", required=True, help="model folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=64)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # GiB; all in this process
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    wire = _child.Wire()  # before vllm writes its log
    from vllm import LLM, SamplingParams, __version__  # type: ignore[import-not-found]

    engine = LLM(args.folder, dtype="bfloat16", max_num_seqs=args.slots, max_model_len=2048)
    while (question := wire.receive()) is not None:
        if question["turn"] == 0:  # every run begins with an empty cache, as the other arms do
            engine.reset_prefix_cache()
        # No seed: its generators by request cost vLLM time, and on a CPU it fails with them where it cuts a prefill.
        limits: dict[str, Any] = {"max_tokens": question["max_new_tokens"], "stop_token_ids": question["ends"]}
        params = SamplingParams(temperature=question["temperature"], **limits)
        prompts = [{"prompt_token_ids": ids} for ids in question["contexts"]]
        watch = _child.Stopwatch()
        out = engine.generate(prompts, params, use_tqdm=False)
        took = watch.read()
        wire.send(took | {"answers": [list(one.outputs[0].token_ids) for one in out], "version": f"vllm {__version__}"})


if __name__ == "__main__":
    main()
