"""A pruned model of the original's own class: what its own methods do, and what comes back from disk."""

import pytest
import torch
import transformers
from torch import nn

import fxprune

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
DECODER = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0, "eos_token_id": 2}
MODELS = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    "Qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER)),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=40, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
    ),
    "BERT": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=40)),
}


def pair(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids = torch.randint(3, 60, (2, 12))
    return model, ids, fxprune.prune(model, 0.5, example_inputs={"input_ids": ids}, same_class=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_class_stays_and_computes_what_the_graph_does(name):
    model, ids, small = pair(name)
    graph = fxprune.prune(model, 0.5, example_inputs={"input_ids": ids})
    assert type(small) is type(model)
    assert sum(p.numel() for p in small.parameters()) < 0.4 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert torch.allclose(small(ids).logits, graph(input_ids=ids)["logits"], atol=1e-5)
    assert graph.meta["verification"].ok


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_checkpoint_comes_back_from_disk(name, tmp_path):
    model, ids, small = pair(name)
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small(ids).logits)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "BERT"])
def test_generation_with_the_cache_is_that_without(name):
    _, ids, small = pair(name)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(small.generate(ids, use_cache=True, **options), small.generate(ids, use_cache=False, **options))


def test_configuration_and_attributes_say_what_is_left():
    model, _, small = pair("Llama")
    assert (small.config.hidden_size, small.config.num_attention_heads, small.config.num_key_value_heads) == (16, 2, 1)
    assert small.config.intermediate_size == 24
    assert small.model.layers[0].self_attn.head_dim == 8
    assert model.config.hidden_size == 32, "the original's configuration is its own"


class Plain(nn.Module):
    """Keeps its width in an attribute."""

    def __init__(self, literal):
        super().__init__()
        self.width, self.literal = 12, literal
        self.inner, self.outer = nn.Linear(4, 24), nn.Linear(12, 3)

    def forward(self, x):
        size = 12 if self.literal else self.width
        a, b = self.inner(x).split(size, -1)
        return self.outer(a * b.sigmoid())


def test_a_class_without_a_configuration_keeps_its_attributes_right():
    x = torch.randn(2, 4)
    small = fxprune.prune(Plain(literal=False), 0.5, example_inputs=x, same_class=True)
    assert type(small) is Plain and small.width == 6 and small.inner.out_features == 12


def test_a_class_with_a_size_in_its_code_is_refused():
    with pytest.raises(fxprune.PruneError) as caught:
        fxprune.prune(Plain(literal=True), 0.5, example_inputs=torch.randn(2, 4), same_class=True)
    assert str(caught.value).splitlines() == [
        "the pruned model cannot stay a Plain: its own forward holds sizes that no attribute has",
        "  at Plain",
        "  fix: take the GraphModule that prune returns without same_class",
    ]
