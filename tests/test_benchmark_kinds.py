"""`examples/benchmarks/kinds.py`: models of transformers that nobody chose, a few of those that once failed."""

import pytest


@pytest.fixture
def kinds(benchmarks):
    pytest.importorskip("transformers")
    import kinds

    return kinds


@pytest.mark.parametrize("kind", ["bloom", "ctrl", "dinov3_vit", "mixtral", "idefics3", "vit_mae"])
def test_kinds_that_once_failed_are_exact(kinds, kind):
    row = kinds.measure(kind)
    assert row["status"] == "exact", row
    assert row["params_after"] < 0.8 * row["params"] and "capture" in row


def test_a_kind_that_cannot_be_built_says_why(kinds):
    row = kinds.measure("autoformer")
    assert row["status"] == "unbuilt" and "prediction_length" in row["reason"]


def test_the_table_lists_what_is_not_exact(kinds):
    rows = [
        {"kind": "a", "status": "exact", "params": 10, "capture": "symbolic", "compared": ["another batch is refused: why"]},
        {"kind": "b", "status": "inexact", "params": 10, "reason": "error 1.0e+00", "capture": "opaque: whole (why)"},
        {"kind": "c", "status": "unbuilt", "reason": "no inputs"},
    ]
    text = kinds.table(rows)
    assert "3 kinds, 1 unbuilt; of the other 2: 1 exact, 1 inexact" in text and "1 of them are captured as one node" in text
    assert "a second batch: 0 are exact there too, 1 refuse it, 0 originals do not take it" in text
    assert "| b | 0.0 | inexact | error 1.0e+00 |" in text and "| a |" not in text


def test_numbers_of_a_configuration_follow_its_heads(kinds):
    """Kinds that small numbers alone do not build: as many keys as heads, turned dimensions, and sections of the turns."""
    pytest.importorskip("transformers")
    for kind, least in (("deepseek_v3", 4), ("gptj", 4), ("qwen2_vl_text", 2)):
        model, inputs = kinds.built(kind)
        config = model.config
        assert config.num_attention_heads == 4 and sum(p.numel() for p in model.parameters()) < 3e6, kind
        assert getattr(config, "num_key_value_heads", least) == least and set(inputs) == {"input_ids"}, kind
