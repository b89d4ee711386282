"""A pruned model of the original's own class: what its own methods do, and what comes back from disk."""

import copy
import pickle
import sys
import types
from typing import TypedDict

import pytest
import torch
import transformers
from torch import nn
from typing_extensions import Unpack

import fxprune
from fxprune.inputs import ExampleInputs
from fxprune.passes.errors import GuardError
from fxprune.passes.rewrite.pruned_module import RewrittenForward
from fxprune.same_class import attributes, configuration
from fxprune.same_class.saving import SavePretrained

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


def test_a_module_with_a_size_in_its_code_gets_its_program():
    model, x = Plain(literal=True), torch.randn(2, 4)
    small = fxprune.prune(model, 0.5, example_inputs=x, same_class=True)
    assert type(small) is Plain and small.verification.ok
    assert torch.allclose(small(x), fxprune.prune(model, 0.5, example_inputs=x)(x), atol=1e-6)
    assert isinstance(vars(small)["forward"], RewrittenForward) and "forward" not in vars(small.inner)
    again = pickle.loads(pickle.dumps(small))
    assert type(again) is Plain and torch.equal(again(x), small(x))


class Backbone(nn.Module):
    """Holds its width where no forward reads it."""

    def __init__(self):
        super().__init__()
        self.num_features, self.hidden, self.doubtful = 12, 20, 16
        self.stem, self.blocks = (
            nn.Linear(4, 16),
            nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 12), nn.Linear(12, 16)),
        )
        self.head = nn.Linear(16, 12)
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        return self.fc(self.head(self.blocks(self.stem(x))))


def test_attributes_that_nothing_reads_follow_or_are_said_to_be_stale():
    small = fxprune.prune(
        Backbone(), {"stem": 0.25, "blocks.*": 0.5, "head": 0.5}, example_inputs=torch.randn(2, 4), same_class=True
    )
    assert small.num_features == small.fc.in_features == 6, "the nearest tensors of that size"
    assert small.hidden == small.blocks[0].out_features == 10
    assert small.doubtful == 16 and small.meta["stale"] == ("doubtful",), "12 of the stem, 8 before the head"


class Numbered(nn.Module):
    """Holds a width that no forward reads, and two numbers of that size which one reads."""

    def __init__(self):
        super().__init__()
        self.index, self.width, self.factor = 12, 12, 12
        self.inner, self.outer = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.outer(self.inner(x)) * self.factor + self.index


class Told(nn.Module):
    """A layer with its width written down, which its forward does not read; `steps` looks like one, and is read."""

    def __init__(self, steps):
        super().__init__()
        self.layer, self.width = nn.Linear(8, 8), 8
        if steps:
            self.steps = 8

    def forward(self, x):
        return self.layer(x) * getattr(self, "steps", 1)


def test_widths_of_many_modules_are_tried_together(monkeypatch):
    runs = []
    plain = attributes.numbers_left
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *[Told(steps=at == 5) for at in range(16)], nn.Linear(8, 3)).eval()
    counted = lambda model, made, is_exact, *more: plain(model, made, lambda: runs.append(1) or is_exact(), *more)  # noqa: E731
    monkeypatch.setattr(attributes, "numbers_left", counted)
    small = fxprune.prune(model, 0.5, example_inputs=torch.randn(2, 8), same_class=True)
    assert [layer.width for layer in list(small)[1:-1]] == [4] * 16 and small[6].steps == 8
    assert 1 <= len(runs) <= 12  # not as many as there are modules


def test_a_number_that_is_no_width_does_not_keep_a_width_from_following():
    small = fxprune.prune(Numbered(), 0.5, example_inputs=torch.randn(2, 4), same_class=True)
    assert (small.index, small.width, small.factor) == (12, 6, 12) and small.inner.out_features == 6


def test_a_model_whose_own_forwards_fit_runs_a_few_times(monkeypatch):
    """Its error is measured where something has changed since, and not before each step that may mend it."""
    runs = []
    plain = ExampleInputs.call
    monkeypatch.setattr(ExampleInputs, "call", lambda inputs, model: (runs.append(1), plain(inputs, model))[1])
    fxprune.prune(Plain(literal=False).eval(), 0.5, example_inputs=torch.randn(2, 4), same_class=True, verify=False)
    assert 3 <= len(runs) <= 7


class Gate(nn.Module):
    """Takes a mask or none, and has a size in its code."""

    def forward(self, x, mask=None):
        a, b = x.split(12, -1)
        return nn.functional.scaled_dot_product_attention(a, b, b, attn_mask=mask)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.gate, self.outer = nn.Linear(4, 24), Gate(), nn.Linear(12, 3)

    def forward(self, x, mask=None):
        return self.outer(self.gate(self.inner(x), mask))


def test_a_program_refuses_none_where_a_tensor_was_captured():
    x, mask = torch.randn(2, 5, 4), torch.ones(5, 5).tril().bool()
    small = fxprune.prune(Masked(), 0.5, example_inputs=(x, mask), same_class=True)
    assert isinstance(vars(small.gate)["forward"], RewrittenForward)
    small(x, mask)
    with pytest.raises(GuardError, match="a tensor where it is None now"):
        small(x)


class Stages(nn.Module):
    """Describes the outputs of its modules, as backbones do."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.Linear(12, 3)
        self.info = [
            {"module": "stem", "channels": 8, "stride": 2, "note": "first"},
            {"module": "body", "channels": 12, "stride": 4},
        ]
        self.others = [{"module": "nowhere", "channels": 8}]

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def test_records_that_name_modules_follow_their_outputs():
    model = Stages()
    small = fxprune.prune(model, {"stem": 0.5, "body": 0.25}, example_inputs=torch.randn(2, 3, 16, 16), same_class=True)
    assert small.info == [
        {"module": "stem", "channels": 4, "stride": 2, "note": "first"},
        {"module": "body", "channels": 9, "stride": 4},
    ]
    assert small.others == model.others and model.info[1]["channels"] == 12 and small.meta["stale"] == ()


class Options:
    """A configuration that each of two layers reads its heads from."""

    def __init__(self):
        self.heads, self.unrelated = 4, 4

    def to_dict(self):
        return vars(self)


class Heads(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.options = Options()
        self.a, self.b = Heads(self.options), Heads(self.options)

    def forward(self, x):
        return self.b(self.a(x))


def test_a_number_of_a_shared_configuration_is_each_layers_own():
    model, x = TwoLayers(), torch.randn(2, 5, 16)
    small = fxprune.prune(model, {"a.qkv": 0.5, "b.qkv": 0.25}, example_inputs=x, same_class=True)
    assert (small.a.config.heads, small.b.config.heads, model.options.heads) == (2, 3, 4)
    assert not any(isinstance(vars(m).get("forward"), RewrittenForward) for m in small.modules())
    longer = torch.randn(3, 7, 16)
    graph = fxprune.prune(model, {"a.qkv": 0.5, "b.qkv": 0.25}, example_inputs=x)
    assert torch.allclose(small(longer), graph(longer), atol=1e-6)


class Dropping(nn.Module):
    """Its module returns what it reads off a tensor and the caller drops."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 24), nn.Linear(12, 8)

        def forward(self, x):
            a, b = self.a(x).split(12, -1)
            y = self.b(a * b)
            return y, y[:, 0]

    def __init__(self):
        super().__init__()
        self.inner, self.head = self.Inner(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.inner(x)[0])


@pytest.mark.parametrize("same_class", [False, True])
def test_a_module_still_returns_what_its_caller_drops(same_class):
    x = torch.randn(2, 5, 4)
    small = fxprune.prune(Dropping(), 0.5, example_inputs=x, same_class=same_class)
    y, first = small.inner(x)
    assert torch.equal(first, y[:, 0]) and torch.equal(small(x), small.head(y))


def test_few_models_are_built_to_find_a_configuration(monkeypatch):
    built = []
    build = configuration.build
    monkeypatch.setattr(configuration, "build", lambda *given: built.append(1) or build(*given))
    torch.manual_seed(0)
    model, ids = MODELS["Llama"]().eval(), torch.randint(3, 60, (2, 12))
    small = fxprune.prune(model, params=0.7, ranking="global", example_inputs={"input_ids": ids}, same_class=True)
    assert "config" in small.meta["stale"]
    numbers = len(list(configuration.numbers(model.config)))
    assert len(built) <= numbers + configuration.MOST_TRIED + 2


class Scaled(nn.Module):
    """Built from a configuration, from which it computes a number that is no size."""

    def __init__(self, config):
        super().__init__()
        self.config, self.scale = config, config.width**0.5
        self.inner, self.norm = nn.Linear(4, config.width), nn.BatchNorm1d(config.width)
        self.up, self.down = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, 3)

    def forward(self, x):
        return self.down(self.up(self.norm(self.inner(x)) * self.scale).tanh())


def test_a_width_that_numbers_are_computed_from_stays_for_a_configuration():
    model = Scaled(types.SimpleNamespace(width=12, hidden=8)).eval()
    with pytest.warns(fxprune.PruneWarning, match="is width, which Scaled computes other numbers from"):
        small = fxprune.prune(model, 0.5, torch.randn(2, 4), same_class=True)
    assert small.meta["stale"] == () and (small.config.width, small.config.hidden) == (12, 4)
    fresh = Scaled(small.config).eval()
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(torch.ones(2, 4)), small(torch.ones(2, 4)))


def test_a_configuration_follows_the_family_that_was_pruned():
    model = Scaled(types.SimpleNamespace(width=12, hidden=12)).eval()
    small = fxprune.prune(model, {"up": 0.25}, torch.randn(2, 4), same_class=True)
    assert small.config.hidden == 9 and small.meta["stale"] == ()


class OwnLoader(Scaled):
    """Loads weights in its own way, as some libraries' models do."""

    def load_state_dict(self, state_dict, strict=True):
        return super().load_state_dict(state_dict, strict)


def test_a_configuration_is_found_for_a_class_with_its_own_load_state_dict():
    model = OwnLoader(types.SimpleNamespace(width=12, hidden=12)).eval()
    small = fxprune.prune(model, {"up": 0.25}, torch.randn(2, 4), same_class=True)
    assert type(small) is OwnLoader
    assert small.config.hidden == 9 and small.meta["stale"] == ()


@pytest.mark.parametrize(
    ("kind", "share", "more"),
    [
        ("Bloom", 0.25, {"use_cache": False}),
        ("Bloom", 0.5, {}),  # what hands on a cache has no calls of the layers
        ("Bloom", 0.5, {"attention_mask": torch.ones(2, 12, dtype=torch.long)}),  # the number of heads is a size there
        ("Mpt", 0.25, {"use_cache": False}),
    ],
)
def test_layers_select_from_what_the_model_computes_for_all_heads(kind, share, more):
    """ALiBi: the slopes of all of the original's heads; the heads that are left are not the first ones."""
    torch.manual_seed(0)
    if kind == "Bloom":
        config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=60)
        model = transformers.BloomForCausalLM(config).eval()
        weights = [block.self_attention.query_key_value.weight for block in model.transformer.h]
    else:
        config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=60, max_seq_len=40, use_cache=False)
        model = transformers.MptForCausalLM(config).eval()
        weights = [block.attn.Wqkv.weight for block in model.transformer.blocks]
    with torch.no_grad():
        for weight in weights:  # 3 by head, or head by 3
            weight.view(4, 3, 8, 32)[0].mul_(1e-3) if kind == "Bloom" else weight.view(3, 4, 8, 32)[:, 0].mul_(1e-3)
    ids = torch.randint(3, 60, (2, 12))
    graph = fxprune.prune(model, share, {"input_ids": ids, **more})
    small = fxprune.prune(model, share, {"input_ids": ids, **more}, same_class=True)
    assert not any(isinstance(vars(m).get("forward"), RewrittenForward) for m in small.modules())
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for model in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        with torch.no_grad():
            found = model(ids, use_cache=False, output_hidden_states=True)
            assert torch.allclose(found.logits, graph(input_ids=ids, **more)["logits"], atol=1e-5)
            three = model(torch.cat([ids, ids[:1]]), use_cache=False).logits
        assert torch.allclose(three[:2], found.logits, atol=1e-5), "a batch of another size selects for each of its inputs"
        assert len(found.hidden_states) == 3
        assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


class Flags(TypedDict, total=False):
    note: bool
    negate: bool


class Flagged(nn.Module):
    """Its width is a literal, so that it gets a program; one of its flags changes what it computes."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x, **flags: Unpack[Flags]):
        y = self.outer(self.inner(x).reshape(-1, 8).relu())
        return -y if flags.get("negate") else y


class Flagging(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.last = Flagged(), nn.Linear(6, 2)

    def forward(self, x, **flags):
        return self.last(self.part(x, **flags))


def test_a_program_takes_flags_that_change_nothing_and_refuses_others():
    x = torch.randn(3, 6)
    small = fxprune.prune(Flagging(), 0.5, x, same_class=True)
    assert isinstance(vars(small.part)["forward"], RewrittenForward)
    wanted = small(x)
    assert torch.equal(small(x, note=True), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(small))(x, note=False), wanted)
    with pytest.raises(GuardError, match="Flagged was not captured with negate, and takes x: prune with that in"):
        small(x, negate=True)
    with pytest.raises(GuardError, match="not captured with note"):
        small(x, note="a text")


def test_a_graph_says_which_keywords_it_takes():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).eval()
    ids = torch.randint(3, 60, (2, 12))
    graph = fxprune.prune(model, 0.5, {"input_ids": ids})
    with pytest.raises(
        GuardError, match="LlamaForCausalLM was not captured with output_attentions, labels, and takes input_ids"
    ):
        graph(input_ids=ids, output_attentions=True, labels=ids)


def test_save_pretrained_needs_nothing_imported_before(monkeypatch, tmp_path):
    """`fxprune.save` is imported when it is first used, and this may be its first use."""
    monkeypatch.delattr(SavePretrained, "save", raising=False)
    monkeypatch.delitem(sys.modules, "fxprune.checkpoints.checkpoint", raising=False)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    small = fxprune.prune(model, 0.5, torch.randn(1, 4), same_class=True)
    with pytest.raises(fxprune.PruneError, match="no configuration builds the original"):
        SavePretrained(small)(tmp_path / "small")


class Masks(nn.Module):
    """Keeps half of the tokens, which it draws, and has a width in its code."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        y = self.a(x)
        order = torch.rand(y.shape[:2], device=y.device).argsort(1)[:, :2, None]
        y = y.gather(1, order.expand(-1, -1, y.shape[-1]))
        return self.c(self.b(y).reshape(-1, 12).relu())


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_that_draws_numbers_draws_the_same_ones_when_it_is_compared(inside):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Dropout(0.0), Masks()).eval() if inside else Masks().eval(), torch.randn(2, 4, 8)
    before = torch.get_rng_state()
    graph, small = (fxprune.prune(model, 0.5, example_inputs=x, verify=False, same_class=same) for same in (False, True))
    assert type(small) is type(model) and sum(p.numel() for p in small.parameters()) < 0.6 * sum(
        p.numel() for p in model.parameters()
    )
    assert torch.equal(torch.get_rng_state(), before)
    outputs = []
    for made in (graph, small):
        torch.manual_seed(1)
        outputs.append(made(x))
    assert torch.allclose(*outputs, atol=1e-6)


class Listed(nn.Module):
    """Stages that are lists of layers, which the model itself runs, and records of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = ((3, 12), (12, 20), (20, 20))
        self.stages = nn.ModuleList(nn.ModuleList([nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b)]) for a, b in sizes)
        self.head = nn.Linear(20, 4)
        self.feature_info = [{"num_chs": b, "reduction": 2**i, "module": f"stages.{i}"} for i, (_, b) in enumerate(sizes)]

    def forward(self, x):
        for stage in self.stages:
            for layer in stage:
                x = layer(x)
            x = x.relu()
        return self.head(x.mean((2, 3)))


def test_records_that_name_lists_follow_what_is_in_them():
    model = Listed().eval()
    small = fxprune.prune(model, 0.5, example_inputs=torch.randn(2, 3, 8, 8), same_class=True)
    assert [(info["num_chs"], info["reduction"]) for info in small.feature_info] == [(6, 1), (10, 2), (10, 4)]
    assert [info["num_chs"] for info in model.feature_info] == [12, 20, 20] and small.meta["stale"] == ()


class Stage(nn.Module):
    def __init__(self, inputs, outputs, tokens):
        super().__init__()
        self.layer, self.tokens = nn.Conv2d(inputs, outputs, 1), tokens

    def forward(self, x):
        y = self.layer(x).relu()
        return (y.mean(1, keepdim=True), y.flatten(2).transpose(1, 2)) if self.tokens else y


class Mixed(nn.Module):
    """A stage that returns an image, and one that returns tokens, behind something else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = Stage(3, 12, False), Stage(12, 20, True), nn.Linear(20, 4)
        self.feature_info = [{"num_chs": 12, "module": "first"}, {"num_chs": 20, "module": "second"}]

    def forward(self, x):
        shade, tokens = self.second(self.first(x))
        return self.head(tokens.mean(1)) + shade.mean()


def test_records_of_outputs_of_several_layouts():
    small = fxprune.prune(Mixed().eval(), 0.5, example_inputs=torch.randn(2, 3, 8, 8), same_class=True)
    assert [info["num_chs"] for info in small.feature_info] == [6, 10] and small.meta["stale"] == ()


class Nameless(Mixed):
    """The same, and records of what is no module, or of the model, by the size of a tensor nearby."""

    def __init__(self):
        super().__init__()
        self.before, self.behind = nn.Conv2d(3, 3, 1), nn.Linear(4, 20)
        self.feature_info += [{"num_chs": 3, "module": ""}, {"num_chs": 3, "module": "nowhere"}]

    def forward(self, x):
        return self.behind(super().forward(self.before(x)))


def test_records_that_name_no_module_leave_the_others_to_their_outputs():
    """There are two widths that were 20: that of the second stage, and that of the last layer, which stays."""
    x = torch.randn(2, 3, 8, 8)
    small = fxprune.prune(Nameless().eval(), 0.5, example_inputs=x, freeze="before", same_class=True)
    assert small.second.layer.out_channels == 10 and small.behind.out_features == 20
    assert [info["num_chs"] for info in small.feature_info] == [6, 10, 3, 3] and small.meta["stale"] == ()


class Named(nn.Module):
    """Keeps something of its own under a name that a pruned model has a use for, too."""

    def __init__(self, name, value):
        super().__init__()
        self.a, self.b, self.name = nn.Linear(6, 16), nn.Linear(16, 3), name
        setattr(self, name, value)

    def forward(self, x):
        own = getattr(self, self.name)
        return self.b(
            own(self.a(x)) if callable(own) else self.a(x).view(-1, own["width"]) if type(own) is dict else self.a(x) * own
        )


@pytest.mark.parametrize(
    "name, value",
    [
        ("meta", {"width": 16}),
        ("verification", 3),
        ("verification", nn.Tanh()),
        ("plan", 3),
        ("recompile", 3),
        ("flat", nn.Tanh()),
    ],
)
def test_what_a_model_keeps_under_the_names_of_a_result_is_kept(name, value):
    torch.manual_seed(0)
    model, x = Named(name, value).eval(), torch.randn(4, 6)
    small = fxprune.prune(model, 0.5, x, same_class=True)
    torch.testing.assert_close(small(x), fxprune.prune(model, 0.5, x)(x))
    again = fxprune.prune(small, 0.5, x, same_class=True)
    assert again.a.out_features == 4 and fxprune.plan_of(again).kept_shape("a.weight") == (4, 6)
    torch.testing.assert_close(again(x), fxprune.prune(small, 0.5, x)(x))


def test_a_place_for_the_plan_that_the_model_has_taken_is_refused():
    with pytest.raises(fxprune.PruneError, match=r"^a member of the model is called 'meta', as is where the plan"):
        fxprune.prune(Named("meta", 3).eval(), 0.5, torch.randn(4, 6), same_class=True)
