"""The benchmark room: formulas worked by hand, the table writer, pieces of single benchmarks."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_room import module

from upturn.models.native import ops

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


# the roofline

TOY = {
    "num_hidden_layers": 2,
    "hidden_size": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 8,
    "vocab_size": 10,
}


def test_weights_of_a_toy_model():
    s = module("_roofline").shape(TOY)
    # q 4x4, k 4x2, v 4x2, o 4x4 = 48; gate, up, down 3 x 32 = 96
    assert s.head_dim == 2
    assert s.layer_weights == 2 * (48 + 96)
    assert s.head_weights == 40


def test_a_training_step_of_the_toy_model():
    roofline = module("_roofline")
    work = roofline.train(roofline.shape(TOY), tokens=3, targets=2, pairs=6)
    # linear 6 (288 * 3 + 40 * 2); attention 3 * 4 * 2 layers * 2 heads * 2 wide * 6 pairs
    assert work.flops == 6 * (864 + 80) + 576
    # per weight: 6 bytes in the passes, 10 for the sum, 24 for the update
    # activations: inputs and outputs of a layer (8 + 6 + 6 + 8 + 12 + 12 + 12) * 2 layers * 3 tokens, 14 * 2 targets
    assert work.bytes == 328 * 40 + 6 * (64 * 2 * 3 + 28)


def test_a_decode_step_of_the_toy_model():
    roofline = module("_roofline")
    work = roofline.decode(roofline.shape(TOY), tokens=3, chosen=3, keys=15)
    assert work.flops == 2 * (288 + 40) * 3 + 4 * 2 * 2 * 2 * 15
    assert work.bytes == 2 * 328 + 2 * 2 * 2 * 1 * 2 * 15 + 4 * 10 * 3


def test_the_formula_counts_the_weights_of_a_real_layer(tiny_model: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    s = module("_roofline").shape(model.config)
    layers = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.dim() == 2)
    assert s.layer_weights == layers
    assert s.head_weights == model.lm_head.weight.numel()


def test_the_roof_is_the_longer_of_arithmetic_and_memory():
    work = module("_roofline").Work(flops=100, bytes=10)
    assert work.intensity == 10
    assert work.seconds(flops_per_second=10, bytes_per_second=100) == 10
    assert work.seconds(flops_per_second=1000, bytes_per_second=2) == 5


def test_operators_fall_into_their_groups():
    profile = module("_profile")
    names = ("aten::mm", "aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::copy_", "aten::mul")
    titles = ("linear layers", "attention", "attention", "copies and casts", profile.OTHERS)
    assert tuple(profile.group(name) for name in names) == titles
    assert profile.shares([("aten::mm", 3.0), ("aten::mul", 1.0)]) == {"linear layers": 0.75, profile.OTHERS: 0.25}


@pytest.mark.skipif(not ops.usable(torch.zeros(1)), reason="no C compiler, or not Linux")
def test_the_profile_sees_kernels():
    logits, uniform, kernel = torch.zeros(200, 5000), torch.full((200,), 0.5), ops.sample
    shares = module("_profile").of(lambda: ops.sample(logits, uniform, 1.0))
    assert next(iter(shares)) == "choice of tokens and their log-probs"
    assert ops.sample is kernel


# sums of what was measured


def test_stages_are_added_up_by_kind_and_generated_tokens_counted():
    names = {"generate measure base": 5, "generate iteration 1": 7, "train iteration 1": 9, "drift iteration 1": 3}
    stages = [{"name": name, "seconds": seconds, "tokens": 10 * seconds} for name, seconds in names.items()]
    found = module("stages").by_kind(stages)
    assert found == {"generate": 12, "train": 9, "total": 21, "tokens": 120}


def test_what_whole_chains_take_beyond_their_first_turns_are_the_later_turns():
    chain = module("chain")
    run = {"seconds": 5.0, "cpu_seconds": 9.0, "drafts": 8, "tokens": 80}
    run |= {"first": {"seconds": 2.0, "cpu_seconds": 3.0, "drafts": 2, "tokens": 30}}
    assert chain._part(run, chain.LATER) == {"seconds": 3.0, "cpu_seconds": 6.0, "drafts": 6, "tokens": 50}


# rows and the table


def test_a_goal_is_of_the_ratio_where_there_is_a_peer():
    rows = module("_rows")
    assert rows.against("a", "x/s", 60, 10, version="", options="", goal=">= 6").met is True
    assert rows.against("a", "MiB", 60, 100, version="", options="", goal="<= 0.5").met is False
    assert rows.row("a", "s", 0.29, goal="< 0.3").met is True
    assert rows.row("a", "s", 0.3, goal="< 0.3").met is False
    assert rows.missing("a", "s", "gpu", goal=">= 4").met is None


def record(rows: list[Any], **options: Any) -> dict[str, Any]:
    where = {"cpu": "A CPU", "cpu_id": "X 1 2 3", "cores": 2, "threads": 2, "memory_gib": 8, "python": "3.11"}
    where |= {"torch": "2", "transformers": "5", "commit": "0123456789abcdef", "changed_files": 0}
    where |= {"date": "2026-01-02T03:04:05", "load_average": 0.1, "flags": options.pop("flags", [])}
    return {
        "benchmark": "speed",
        "command": "python benchmarks/speed.py",
        "options": options,
        "where": where,
        "rows": [row.model_dump() for row in rows],
    }


def test_the_table_holds_every_row_and_leaves_the_prose(tmp_path: Path):
    rows, table = module("_rows"), module("table")
    found = [
        rows.against("step | fast", "tokens/s", 12345.6, 1000, version="trl 1", options="as it comes", goal=">= 10"),
        rows.missing("step", "tokens/s", "gpu", goal=">= 4"),
    ]
    (tmp_path / "speed.json").write_text(json.dumps(record(found)))
    (tmp_path / "other.json").write_text(json.dumps({"benchmark": "other", "arms": {}}))
    document = f"before\n{table.BEGIN}\nstale\n{table.END}\nafter\n"
    text = table.replace(document, table.markdown(table.read(tmp_path)))
    lines = [line for line in text.splitlines() if line.startswith("| step")]
    assert lines == [
        "| step / fast | cpu | >= 10 | **12.35** |",
        "| step | gpu | >= 4 | – |",
        "| step / fast | cpu | tokens/s | 12,350 | 1,000 | 12.35 | >= 10 | yes | trl 1; as it comes |",
        "| step | gpu | tokens/s | – | – | – | >= 4 | – | not measured |",
    ]
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "stale" not in text and "0123456789," in text and "quick check" not in text
    assert table.replace(text, table.markdown(table.read(tmp_path))) == text


def test_goals_stand_side_by_side_for_each_kind_of_processor():
    rows, table = module("_rows"), module("table")
    amx, plain = {"flags": ["amx_bf16", "avx2"]}, {"flags": ["avx2"]}
    found = [
        record([rows.row("wait", "s", 0.2, goal="< 0.3"), rows.row("speed", "x", 3)], **plain),
        record([rows.row("wait", "s", 0.4, goal="< 0.3")], prompts=96, **amx),
        record([rows.row("wait", "s", 0.1, goal="< 0.3")], prompts=256, **amx),
    ]
    lines = list(table.overview(found))
    assert lines[-3:] == [
        "| what | device | goal | AMX | AVX2 |",
        "|---|---|---|---|---|",
        "| wait | cpu | < 0.3 | 0.4 (96), **0.1** (256) | **0.2** |",
    ]


def test_a_gpu_has_a_column_of_its_own_and_what_it_measured_is_not_missing(tmp_path: Path):
    rows, table = module("_rows"), module("table")
    said = {"version": "", "options": "", "goal": ">= 8", "device": "gpu"}
    names = ("chains, against it", "chains, greedy, against it", "chains, against another")
    of_cpu = record([rows.missing(name, "x", "gpu", goal=">= 8") for name in names[::2]], flags=["avx2"])
    of_gpu = record([rows.against(names[1], "x", 9, 1, **said), rows.row("wait", "s", 1, goal="< 2")], flags=["avx2"])
    of_gpu["where"] |= {"gpu": "NVIDIA H100 80GB HBM3", "driver": "1.2", "cuda": "13.0"}
    for place, one in enumerate((of_cpu, of_gpu)):
        (tmp_path / f"{place}.json").write_text(json.dumps(one))
    records = table.read(tmp_path)
    assert list(table.overview(records))[-5:] == [
        "| what | device | goal | AVX2 | H100 |",
        "|---|---|---|---|---|",
        "| wait | cpu | < 2 | **1** | – |",
        "| chains, against another | gpu | >= 8 | – | – |",
        "| chains, greedy, against it | gpu | >= 8 | – | **9** |",
    ]
    assert "NVIDIA H100 80GB HBM3 (driver 1.2, CUDA 13.0); A CPU" in "\n".join(table.heading(records[1]))


def test_a_quick_check_is_named_as_such():
    table = module("table")
    assert "quick check" in "\n".join(table.heading(record([], quick=True)))


def test_what_is_not_measured_is_told_once_and_sizes_by_the_heading(tmp_path: Path):
    rows, table = module("_rows"), module("table")
    for name, prompts in (("one", 96), ("two", [64, 128])):
        found = [rows.missing("step", "tokens/s", "gpu"), rows.row(name, "s", 1)]
        (tmp_path / f"{name}.json").write_text(json.dumps(record(found, prompts=prompts)))
    text = table.markdown(table.read(tmp_path))
    assert text.count("not measured") == 1
    assert "prompts 96." in text and "prompts 64 128." in text


def test_the_table_needs_its_markers():
    table = module("table")
    with pytest.raises(ValueError, match="no '<!-- table"):
        table.replace("prose alone", "table")
    assert table.BEGIN in table.DOCUMENT.read_text() and table.END in table.DOCUMENT.read_text()


# the pieces of single benchmarks


def test_a_line_is_fitted_by_relative_errors():
    found = module("scale").line([(1, 5.0), (2, 7.0), (3, 9.0)])
    assert found == pytest.approx({"fixed": 3, "unit": 2, "r2": 1, "worst_relative_error": 0}, abs=1e-9)
    assert module("scale").line([(1, 1.0), (2, 9.0), (3, 2.0)])["r2"] < 0.98


def test_rows_of_trl_are_the_six_sequences_of_a_pair():
    pytest.importorskip("trl")
    trl = module("_trl")
    types = importlib.import_module("upturn.types")
    contexts = ((1,), (1, 9), (1, 8, 8))
    group = [types.Sample(context, target) for context in contexts for target in ((5, 2), (6, 6, 2))]
    rows = list(trl.preference_rows([group]))
    assert [row["prompt_ids"] for row in rows] == [list(context) for context in contexts]
    assert all(row["chosen_ids"] == [5, 2] and row["rejected_ids"] == [6, 6, 2] for row in rows)
    # longest sequences 4, 5, 6; batches of 2 pad to 5 and 6, chosen and rejected each
    assert trl.padded(rows, 2) == 2 * 2 * 5 + 2 * 6


@pytest.mark.parametrize("share", [True, False])
def test_our_arm_steps_and_counts(tiny_model: Path, share: bool):
    training = module("_training")
    load = importlib.import_module("upturn.models.load")
    loaded = load.load(str(tiny_model), "float32", device="cpu")
    found = training.data("keywords", 2, loaded)
    arm = training.Arm(loaded, found, share=share, budget=100_000)
    before = [p.detach().clone() for p in loaded.model.parameters()]
    answer = arm.answer({})
    assert answer["logical_tokens"] == found.logical_tokens
    assert (answer["computed_tokens"] < found.logical_tokens) is share
    assert answer["targets"] == 3 * sum(len(p.chosen.token_ids) + len(p.rejected.token_ids) for p in found.pairs)
    assert any(not torch.equal(old, new) for old, new in zip(before, loaded.model.parameters(), strict=True))


def test_a_random_model_has_the_weights_that_the_formula_counts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    shapes, roofline = module("_shapes"), module("_roofline")
    load = importlib.import_module("upturn.models.load")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(shapes.SHAPES, "small", small | {"intermediate_size": 48})
    made = shapes.random("small", load.load(str(tiny_model), "float32", device="cpu"), "cpu").model
    s = roofline.shape(shapes.config("small"))
    assert s.layer_weights == sum(p.numel() for n, p in made.named_parameters() if "layers" in n and p.dim() == 2)
    assert s.head_weights == made.get_input_embeddings().weight.numel()  # tied: the output layer is the same weight
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    billions = [roofline.shape(shapes.config(f"qwen2.5-{size}b")).layer_weights / 1e9 for size in (0.5, 1.5)]
    assert billions == pytest.approx([0.36, 1.31], abs=0.01)


def test_a_converted_model_rotates_neighbours():
    pytest.importorskip("gguf")
    gguf = module("_gguf")
    weight = torch.arange(8.0)[:, None]  # two heads of width 4: halves (0, 1 | 2, 3) and (4, 5 | 6, 7)
    assert gguf.interleave(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert gguf.theirs("model.layers.7.self_attn.o_proj") == "blk.7.attn_output"
    assert gguf.theirs("lm_head") == "output"
