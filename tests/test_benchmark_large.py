"""`examples/benchmarks/large.py`, on a Llama of a few thousand parameters."""

import pytest
import torch

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}
FFN = 2 * 3 * 16 * 32


@pytest.fixture
def large(benchmarks, monkeypatch, tmp_path):
    import large

    for name, value in {
        "SIZES": {"small": SMALL},
        "BUILT": tmp_path,
        "TOKENS": dict.fromkeys(large.TOKENS, 2 * large.LENGTH),
        "SHARD": 4096,
    }.items():
        monkeypatch.setattr(large, name, value)
    return large


def test_shards_hold_the_model(large):
    from transformers import LlamaForCausalLM

    folder = large.folder_of("small")
    assert len(list(folder.glob("*.safetensors"))) > 2
    read, said = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()) and read.dtype == torch.bfloat16
    assert {n: p.shape for n, p in read.named_parameters()} == {n: p.shape for n, p in large.empty("small").named_parameters()}


@pytest.mark.parametrize("how", ["magnitude", "wanda"])
def test_half_of_each_ffn_is_left_of_a_checkpoint(large, how):
    row = large.measure("checkpoint", "small", how)
    assert row["params_after"] == row["params"] - FFN / 2 and row["peak_gib"] >= row["before_gib"] > 0 < row["seconds"]


@pytest.mark.parametrize("how", ["copy", "inplace", "inplace, same class"])
def test_half_is_left_in_memory(large, how):
    row = large.measure("memory", "small", how)
    assert row["params_after"] < row["params"] / 2 and row["peak_gib"] >= row["before_gib"] > 0 < row["seconds"]


def test_calibration_is_timed_against_a_forward(large):
    row = large.measure("calibration", "small", "flap")
    assert row["forwards"] > 0 and row["tokens"] == 2 * large.LENGTH
    assert "| calibration | small | flap |" in large.table([{"case": "calibration", "size": "small", "how": "flap", **row}])
