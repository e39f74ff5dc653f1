"""The engine on a GPU: graphs and kernels change no draft but by rounding."""

from __future__ import annotations

from functools import partial
from itertools import chain as chained
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from upturn.engines import local, sampling
from upturn.models import _slow, chat, load, policy
from upturn.strategies import chain
from upturn.tasks import carry as task_of_carry
from upturn.types import Draft, Requests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("default"),
]
Run = list[list[Draft]]


@pytest.fixture(scope="module")
def carry() -> load.Loaded:
    return load.load("carry", "float32", device="cuda")


def drafts(
    loaded: load.Loaded, model: Any = None, *, temperature: float = 0.7, top_p: float = 1.0, **how: Any
) -> tuple[Run, local.Local]:
    task = task_of_carry.load(task_of_carry.Config())
    talk = chat.load(loaded.tokenizer, loaded.end_ids, Requests(task.refine_request))
    cfg = sampling.Config(temperature=temperature, top_p=top_p, max_new_tokens=24)
    engine = local.Local(model or loaded.model, talk, cfg, seed=3, **how)
    prompts = task.prompts("train", 0, 96)
    found = [list(a.drafts) for a in engine.run(prompts, partial(chain.generate, cfg=chain.Config(turns=3)))]
    again = [list(a.drafts) for a in engine.run(prompts, partial(chain.generate, cfg=chain.Config(turns=3)))]
    assert _ids(found) == _ids(again)
    return found, engine


def _ids(run: Run) -> list[list[tuple[int, ...]]]:
    return [[draft.token_ids for draft in chain_] for chain_ in run]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_no_draft_depends_on_speculation_batch_or_graph(carry: load.Loaded, temperature: float) -> None:
    found, engine = drafts(carry, temperature=temperature, slots=80)
    assert engine.num_accepted > 0
    assert any(size.replay for size in engine._ready._lasting[1]._sizes.values())  # type: ignore[index]
    for how in ({"speculate": False, "slots": 80}, {"slots": 3}):
        assert _ids(drafts(carry, temperature=temperature, **how)[0]) == _ids(found)


def test_a_nucleus_is_not_captured(carry: load.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the device; a capture that fails would keep its memory."""
    said: list[str] = []
    monkeypatch.setattr(_slow.progress, "say", said.append)
    _, engine = drafts(carry, slots=32, top_p=0.9)
    assert not any(size.replay for size in engine._ready._lasting[1]._sizes.values())  # type: ignore[index]
    assert len(said) == 1
    assert "top_p" in said[0]


def test_drafts_are_those_of_a_cpu(carry: load.Loaded) -> None:
    found, _ = drafts(carry, slots=32)
    there, _ = drafts(load.load("carry", "float32", device="cpu"), slots=32)
    pairs = zip(chained(*_ids(found)), chained(*_ids(there)), strict=True)
    same = [one == other for one, other in pairs]
    assert sum(same) >= 0.97 * len(same), f"{sum(same)} of {len(same)}"


CONFIGS = [LlamaConfig, partial(Qwen3Config, head_dim=32), partial(Gemma2Config, head_dim=32, sliding_window=16)]


@pytest.mark.parametrize("config", CONFIGS, ids=["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_training(carry: load.Loaded, config: Any, dtype: torch.dtype) -> None:
    """Also for layers of another kind (Gemma 2: windows, soft caps), whose own forward runs."""
    from upturn import trees
    from upturn.types import Sample

    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "max_position_embeddings": 512}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": len(carry.tokenizer)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**sizes), dtype=dtype).to("cuda").eval()
    found, _ = drafts(carry, model, slots=24)
    task = task_of_carry.load(task_of_carry.Config())
    talk = chat.load(carry.tokenizer, carry.end_ids, Requests(task.refine_request))
    prompts = task.prompts("train", 0, 96)
    pairs = [(talk.context(p.text, chain_[:1]), chain_[1]) for p, chain_ in zip(prompts, found, strict=True)]
    tree = trees.build([Sample(tuple(context), draft.token_ids) for context, draft in pairs[:8]]).to("cuda")
    with torch.inference_mode():
        logprobs = policy.tree_logprobs(model, tree).cpu()
    wanted = torch.tensor([value for _, draft in pairs[:8] for value in draft.sampler_logprobs])
    assert torch.allclose(logprobs, wanted, atol=1e-4 if dtype == torch.float32 else 0.1)
