"""llama.cpp's arm of a chain; it runs in an environment that has llama_cpp and nothing of ours.

One sequence per prompt in one context; a turn feeds only what a sequence has not seen, then all decode together.
Tokens are chosen by llama.cpp's own samplers.
"""

from __future__ import annotations

import argparse
import ctypes
from typing import Any

import _child

BATCH = 2048
"""Most tokens of one call."""
Feed = list[tuple[int, int, int, bool]]
"""(sequence, place, token, whether its logits are wanted)."""


class Engine:
    """A model with one cache for all sequences."""

    def __init__(self, path: str, sequences: int, length: int, threads: int) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self.lib = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = sequences * length, BATCH, sequences
        params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.model or not self.context:
            raise SystemExit(f"llama.cpp refuses {path}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def decode(self, feed: Feed) -> None:
        """One call."""
        batch = self.batch
        batch.n_tokens = len(feed)
        for i, (sequence, place, token, wanted) in enumerate(feed):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if code := self.lib.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode returned {code}")

    def sampler(self, temperature: float, seed: int) -> Any:
        """Greedy, or temperature and a draw."""
        lib = self.lib
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if temperature == 0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
        else:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(temperature))
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))
        return chain

    def generate(
        self, contexts: list[list[int]], seen: list[list[int]], ends: set[int], most: int, sampler: Any
    ) -> list[list[int]]:
        """Answer all contexts; `seen` holds what each sequence has in its cache, and is kept up to date."""
        answers: list[list[int]] = [[] for _ in contexts]
        running = self._prefill(contexts, seen, sampler, answers)
        while running := [s for s in running if answers[s][-1] not in ends and len(answers[s]) < most]:
            self.decode([(s, len(seen[s]), answers[s][-1], True) for s in running])
            for place, s in enumerate(running):
                seen[s].append(answers[s][-1])
                answers[s].append(self.lib.llama_sampler_sample(sampler, self.context, place))
        return answers

    def _prefill(
        self, contexts: list[list[int]], seen: list[list[int]], sampler: Any, answers: list[list[int]]
    ) -> list[int]:
        """Feed what is new of each context, whole contexts to a call, and choose the first tokens."""
        calls: list[Feed] = [[]]
        for s, context in enumerate(contexts):
            same = 0
            while same < min(len(seen[s]), len(context) - 1) and seen[s][same] == context[same]:
                same += 1
            self.lib.llama_memory_seq_rm(self.memory, s, same, -1)
            new: Feed = [(s, i, context[i], i == len(context) - 1) for i in range(same, len(context))]
            if len(calls[-1]) + len(new) > BATCH:
                calls.append([])
            calls[-1] += new
            seen[s] = list(context)
        for feed in calls:
            self.decode(feed)
            for place, (s, _, _, wanted) in enumerate(feed):
                if wanted:
                    answers[s].append(self.lib.llama_sampler_sample(sampler, self.context, place))
        return list(range(len(contexts)))


def main() -> None:
    """Answer questions of contexts with token ids."""
    parser = argparse.ArgumentParser(description="llama.cpp's arm of chain.py.")
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="longest context with its answer")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    engine = Engine(args.gguf, args.sequences, args.length, args.threads)
    seen: list[list[int]] = [[] for _ in range(args.sequences)]

    def handle(question: dict[str, Any]) -> dict[str, Any]:
        sampler = engine.sampler(question["temperature"], question["seed"])
        if question["turn"] == 0:  # every run begins with an empty cache, as the other arms do
            engine.lib.llama_memory_clear(engine.memory, False)
            seen[:] = [[] for _ in seen]
        watch = _child.Stopwatch()
        ends = set(question["ends"])
        answers = engine.generate(question["contexts"], seen, ends, question["max_new_tokens"], sampler)
        took = watch.read()
        engine.lib.llama_sampler_free(sampler)
        return took | {"answers": answers, "version": f"llama-cpp-python {engine.lib.__version__}"}

    _child.serve(handle)


if __name__ == "__main__":
    main()
