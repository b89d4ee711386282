"""Residual branches go as units: exact against the original in which a hook multiplies the branch's result by zero."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn

import fxprune
from fxprune.passes.errors import GuardError

X = torch.randn(2, 3, 32, 32)
IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def first(out: Any) -> torch.Tensor:
    while not isinstance(out, torch.Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


def silenced(model: nn.Module, modules: Iterable[str]) -> nn.Module:
    """The original, in which what some modules return (the first of several) is multiplied by zero."""
    made = copy.deepcopy(model)
    for path in modules:
        zero = lambda m, a, out: (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0  # noqa: E731
        made.get_submodule(path).register_forward_hook(zero)
    return made


def call(model: nn.Module, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return first(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def randomised(model: nn.Module) -> nn.Module:
    """With weights that let every branch matter, and statistics that are not those of a fresh norm."""
    generator = torch.Generator().manual_seed(1)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_floating_point() and "inv_freq" not in name:
            with torch.no_grad():
                t.copy_(torch.rand(t.shape, generator=generator) * 0.4 + (0.2 if "var" in name else -0.1))
    return model.eval()


def swin() -> nn.Module:
    return tv.SwinTransformer([2, 2], 16, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.5, num_classes=5)


def convnext() -> nn.Module:
    return tv.ConvNeXt([tv.convnext.CNBlockConfig(8, 16, 2), tv.convnext.CNBlockConfig(16, None, 2)], 0.5, num_classes=5)


def vit() -> nn.Module:
    return tv.VisionTransformer(32, 8, 3, 4, 16, 32, num_classes=5)


def resnet() -> nn.Module:
    return tv.ResNet(tv.resnet.Bottleneck, [2, 1, 1, 2], num_classes=5)


def llama() -> nn.Module:
    import transformers as hf

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2))


def bert() -> nn.Module:
    import transformers as hf

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60}
    return hf.BertModel(hf.BertConfig(**sizes))


def t5() -> nn.Module:
    import transformers as hf

    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "num_layers": 2, "d_ff": 24, "vocab_size": 60}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes))


ENCODER = "encoder.layers.encoder_layer_"
VIT = ((0, "self_attention", "ln_1"), (1, "mlp", "ln_2"))
LLAMA = (
    (0, "self_attn", "input_layernorm"),
    (1, "mlp", "post_attention_layernorm"),
    (2, "self_attn", "input_layernorm"),
    (2, "mlp", "post_attention_layernorm"),
)
DECODER = {"input_ids": IDS, "use_cache": False}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS[:, :7].contiguous(), "use_cache": False}
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, int, dict[str, list[str]]]] = {
    # the number of branches, and of some of them the module whose result it is with all that goes
    "resnet": (resnet, X, 2, {"layer4.1.bn3": [f"layer4.1.{m}{i}" for m in ("conv", "bn") for i in (1, 2, 3)]}),
    "mobilenet": (
        lambda: tv.mobilenet_v2(width_mult=0.25),
        X,
        10,
        {f"features.{i}.conv": [f"features.{i}.conv"] for i in (3, 12)},
    ),
    "vit": (vit, X, 6, {f"{ENCODER}{i}.{m}": [f"{ENCODER}{i}.{m}", f"{ENCODER}{i}.{n}"] for i, m, n in VIT}),
    "swin": (
        swin,
        X,
        8,
        {
            "features.1.0.attn": ["features.1.0.attn", "features.1.0.norm1"],
            "features.1.1.attn": ["features.1.1.attn", "features.1.1.norm1"],  # shifted windows
            "features.3.0.mlp": ["features.3.0.mlp", "features.3.0.norm2"],
        },
    ),
    "convnext": (
        convnext,
        X,
        4,
        {f"features.{i}.block": [f"features.{i}.block", f"features.{i}.layer_scale"] for i in ("1.1", "3.0")},
    ),
    "llama": (
        llama,
        DECODER,
        6,
        {f"model.layers.{i}.{m}": [f"model.layers.{i}.{m}", f"model.layers.{i}.{n}"] for i, m, n in LLAMA},
    ),
    "bert": (
        bert,
        {"input_ids": IDS},
        6,
        {
            "encoder.layer.0.attention.output.dense": [
                "encoder.layer.0.attention.self",
                "encoder.layer.0.attention.output.dense",
            ],
            "encoder.layer.1.output.dense": ["encoder.layer.1.intermediate", "encoder.layer.1.output.dense"],
        },
    ),
    "t5": (
        t5,
        BOTH,
        10,
        {  # the first layer computes the positions that the others read, from the sizes of its queries and keys: these stay
            "encoder.block.0.layer.0.SelfAttention": [f"encoder.block.0.layer.0.SelfAttention.{m}" for m in "vo"],
            "encoder.block.1.layer.1.DenseReluDense": [
                "encoder.block.1.layer.1.DenseReluDense",
                "encoder.block.1.layer.1.layer_norm",
            ],
            "decoder.block.1.layer.1.EncDecAttention": [
                "decoder.block.1.layer.1.EncDecAttention",
                "decoder.block.1.layer.1.layer_norm",
            ],
        },
    ),
}


def least(model: nn.Module, modules: Iterable[str]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A criterion by which the branches that end in some modules matter least."""
    light = {p.data_ptr() for path in modules for p in model.get_submodule(path).parameters()}
    return lambda weight: torch.full_like(weight, 0.0 if weight.data_ptr() in light else 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_a_branch_goes_whole_and_adds_nothing(name):
    make, inputs, total, gone = MODELS[name]
    torch.manual_seed(0)
    model = randomised(make())
    wanted = call(silenced(model, gone), inputs)
    assert not torch.allclose(wanted, call(model, inputs))  # they matter
    ratio = (len(gone) + 0.5) / total
    pruned = fxprune.prune(model, ratio, inputs, depth="only", criterion=least(model, gone), verify=True)
    assert pruned.verification.ok and not pruned.verification.refused
    torch.testing.assert_close(call(pruned, inputs), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(call(pruned.flat(), inputs), wanted, rtol=1e-5, atol=1e-6)
    prefixes = tuple(f"{path}." for paths in gone.values() for path in paths)
    removed = {key for key in model.state_dict() if f"{key}.".startswith(prefixes)}
    assert pruned.state_dict().keys() == model.state_dict().keys() - removed
    assert count(pruned) == count(model) - sum(p.numel() for key, p in model.named_parameters() if key in removed)
    for path in {path for paths in gone.values() for path in paths}:
        with pytest.raises(AttributeError):
            getattr(pruned.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2])
    pruned.train()
    first(pruned(**inputs) if isinstance(inputs, dict) else pruned(inputs)).sum().backward()
    assert any(p.grad is not None for p in pruned.parameters())


# -- small models ----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """`x + f(x)`, and an output that is none of the branch's."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    """A head over some layers; the last ones are heavier."""

    def __init__(self, count: int = 4, make: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Linear(5, 8), nn.ModuleList(make() for _ in range(count)), nn.Linear(8, 3)
        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                for parameter in layer.parameters():
                    parameter.mul_(1 + i)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


V = torch.randn(6, 5)


def removed(pruned: nn.Module) -> list[int]:
    """The layers of a stack that have lost their branch."""
    return [i for i in range(4) if not any(True for _ in pruned.get_submodule(f"layers.{i}").parameters())]


def without(model: nn.Module, *layers: int) -> nn.Module:
    made = copy.deepcopy(model)
    for i in layers:
        made.layers[i].forward = lambda x: x
    return made


@pytest.mark.parametrize(("ratio", "gone"), [(0.25, [0]), (0.49, [0]), (0.5, [0, 1]), (0.9, [0, 1, 2])])
def test_a_ratio_is_a_share_of_the_branches(ratio, gone):
    model = Stack().eval()
    pruned = fxprune.prune(model, ratio, V, depth="only")
    assert removed(pruned) == gone
    torch.testing.assert_close(pruned(V), without(model, *gone)(V))
    assert len(pruned.layers) == 4 and torch.equal(pruned.layers[0](V @ torch.ones(5, 8)), V @ torch.ones(5, 8))
    assert pruned.head.weight.shape == model.head.weight.shape


def test_a_mapping_names_branches():
    model = Stack().eval()
    assert removed(fxprune.prune(model, {"layers.[23]": 0.5}, V, depth="only")) == [2]


def test_one_budget_over_widths_and_depth():
    model = Stack().eval()
    layer, rest = count(model.layers[0]), count(model.embed) + count(model.head)
    pruned = fxprune.prune(model, params=rest + 2 * layer, example_inputs=V, depth="only")
    assert removed(pruned) == [0, 1] and count(pruned) == rest + 2 * layer
    pruned = fxprune.prune(model, params=rest + 2 * layer - 1, example_inputs=V, depth="only")
    assert removed(pruned) == [0, 1, 2]
    macs = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) * len(V)
    pruned = fxprune.prune(model, macs=macs - 1, example_inputs=V, depth="only")
    assert removed(pruned) == [0]
    for ranking in ("local", "global"):
        pruned = fxprune.prune(model, params=0.4, example_inputs=V, depth=True, ranking=ranking, verify=True)
        assert pruned.verification.ok and removed(pruned) and 0.35 < count(pruned) / count(model) <= 0.4
    pruned = fxprune.prune(model, 0.5, V, depth=True)
    assert removed(pruned) == [0, 1] and pruned.layers[3].up.weight.shape == (6, 4)
    with pytest.raises(fxprune.PruneError, match="cannot be met"):
        fxprune.prune(model, params=0.05, example_inputs=V, depth="only")


def test_a_large_branch_gives_small_ones_back():
    """The last branch that goes for a budget may be larger than all before it: then those need not go."""
    model = Stack().eval()
    model.layers[1] = nn.Sequential(nn.Identity())  # no branch
    big = Layer()
    big.up, big.down = nn.Linear(8, 200), nn.Linear(200, 8)
    model.layers[2] = big.eval()
    score = {id(p): i for i, layer in enumerate(model.layers) for p in layer.parameters()}
    order = {p.data_ptr(): score[id(p)] for p in model.parameters() if id(p) in score}
    criterion = lambda w: torch.full_like(w, float(order.get(w.data_ptr(), 9)))  # noqa: E731
    pruned = fxprune.prune(model, params=0.5, example_inputs=V, depth="only", criterion=criterion)
    assert removed(pruned) == [1, 2]  # 1 never had parameters


def test_units_that_do_nothing_go_before_branches_that_do():
    """Units compete by what the loss changes for what they cost; scores of branches are brought to that scale."""

    class Squares:
        normalise = "loss"

        def __call__(self, parameter):
            return parameter.square()

    torch.manual_seed(0)
    model = Stack().eval()
    for layer in model.layers:
        with torch.no_grad():
            layer.up.weight[2:].mul_(1e-3), layer.up.bias[2:].zero_(), layer.down.weight[:, 2:].mul_(1e-3)
    how = {"criterion": Squares(), "ranking": "global", "depth": True, "depth_criterion": lambda stream, branch: 1.0}
    small = fxprune.prune(model, example_inputs=V, data=[V], macs=0.5, freeze_outputs=["embed"], **how)
    assert removed(small) == [] and small.layers[0].up.out_features == 2


class Scaled(nn.Module):
    """A branch with the factor `scale`, whose derivative is what first-order scores estimate."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.scale = torch.ones(())

    def forward(self, x):
        return x + self.scale * torch.tanh(self.proj(x))


def ordered(scores: list[float]) -> list[int]:
    return sorted(sorted(range(len(scores)), key=scores.__getitem__)[:2])


def test_scores():
    torch.manual_seed(3)
    model = Stack(4, Scaled).eval()
    data = [(torch.randn(7, 5), torch.randint(3, (7,))), (torch.randn(2, 5), torch.randint(3, (2,)))]
    loss = F.cross_entropy

    def mean(of: Callable[[Any, Any], torch.Tensor]) -> torch.Tensor:
        return sum(of(x, y) * len(x) for x, y in data) / 9

    def streams(x):
        found = [model.embed(x)]
        for layer in model.layers:
            found.append(layer(found[-1]))
        return found

    taylor, influence, change, size = [], [], [], []
    for i, layer in enumerate(model.layers):
        layer.scale = torch.ones((), requires_grad=True)
        taylor.append(float(mean(lambda x, y: torch.autograd.grad(loss(model(x), y), layer.scale)[0]).abs()))
        layer.scale = torch.ones(())
        with torch.no_grad():
            cosine = lambda x, y: F.cosine_similarity(streams(x)[i], streams(x)[i + 1]).mean()  # noqa: E731
            influence.append(1 - float(mean(cosine)))
            change.append(float(mean(lambda x, y: loss(without(model, i)(x), y) - loss(model(x), y))))
            size.append(float(mean(lambda x, y: (streams(x)[i + 1] - streams(x)[i]).norm())))

    def found(how: Any, **options: Any) -> list[int]:
        return removed(fxprune.prune(model, 0.5, V, depth="only", depth_criterion=how, data=data, **options))

    assert found("influence") == found(None) == ordered(influence)
    assert found("taylor", loss=loss) == ordered(taylor)
    assert found("loss", loss=loss) == ordered(change)
    assert found(lambda stream, added: added.norm()) == ordered(size)
    assert found(lambda stream, added: -added.norm()) == ordered([-s for s in size])
    assert len({tuple(ordered(scores)) for scores in (taylor, influence, change, [-s for s in size])}) > 1  # they differ
    assert removed(fxprune.prune(model, 0.5, V, depth="only", depth_criterion="weights")) == [0, 1]


class Net(nn.Module):
    """One layer of a kind between a layer that is a stream's first and a head."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Conv2d(3, 8, 3, padding=1), block, nn.Conv2d(8, 4, 1)
        self.other = nn.Sequential(nn.Conv2d(4, 4, 1))  # a second branch, so that half is one

    def forward(self, x):
        y = self.head(self.block(self.first(x)))
        return y + self.other(y) * 3


class Written(nn.Module):
    """The sum is written to in place, and the stream is read after that."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        out = self.norm(self.conv(x))
        out += x
        F.relu_(out)
        return out - 0.5 * x


class Inplace(Written):
    """The branch is added to the stream's own memory, of which there are other views."""

    def forward(self, x):
        view = x[:, :4]
        x += self.norm(self.conv(x))
        return torch.cat([x, view], 1)[:, 4:].relu_()


class Gamma(Written):
    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.shift = nn.Parameter(torch.rand(8, 1, 1)), nn.Parameter(torch.rand(()))

    def forward(self, x):
        return x.add(torch.sigmoid(self.norm(self.conv(x)) * self.gamma) + self.shift, alpha=2)  # not zero where weights are


class Counted(Written):
    """The branch counts its calls; the count is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + self.norm(self.conv(x))


class Parallel(Written):
    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.side(x) + self.norm(self.conv(x)) + x


class Leaking(Written):
    """What the branch computes on its way is read by others, too."""

    def forward(self, x):
        inner = self.conv(x)
        return x + self.norm(inner).relu() + inner.mean()


BLOCKS = {"written": Written, "inplace": Inplace, "gamma": Gamma, "counted": Counted, "parallel": Parallel, "leaking": Leaking}
# what is left of each without the branch that ends in its norm, written anew
LEFT: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "written": lambda m, x: x.relu() - 0.5 * x,
    "inplace": lambda m, x: torch.cat([x, x[:, :4]], 1)[:, 4:].relu(),
    "gamma": lambda m, x: x,
    "counted": lambda m, x: x,
    "parallel": lambda m, x: x + m.side(x),
    "leaking": lambda m, x: x + m.conv(x).mean(),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_kinds_of_branches(kind):
    torch.manual_seed(0)
    model = Net(BLOCKS[kind]())
    model(X)
    model.eval()
    light = {p.data_ptr() for p in model.block.parameters()} - {
        p.data_ptr() for n, p in model.block.named_parameters() if "side" in n
    }
    criterion = lambda w: torch.full_like(w, 0.0 if w.data_ptr() in light else 1.0)  # noqa: E731
    pruned = fxprune.prune(model, 0.5, X, depth="only", criterion=criterion, verify=True)
    assert pruned.verification.ok
    reference = copy.deepcopy(model)
    reference.block.forward = lambda x: LEFT[kind](model.block, x)
    given = X.clone()
    with torch.no_grad():
        torch.testing.assert_close(pruned(given), reference(X), rtol=1e-5, atol=1e-6)
        assert torch.equal(given, X)
    left = {"counted": ["calls"], "parallel": ["side.bias", "side.weight"], "leaking": ["conv.bias", "conv.weight"]}
    assert sorted(pruned.block.state_dict()) == left.get(kind, [])
    if kind == "counted":
        before = float(pruned.block.calls)
        pruned(X)
        assert float(pruned.block.calls) == before + 1


def test_both_operands_of_a_sum_of_branches():
    model = Net(Parallel())
    model(X)
    model.eval()
    pruned = fxprune.prune(model, 0.67, X, depth="only", criterion=least(model, ["block"]), verify=True)
    reference = copy.deepcopy(model)
    reference.block.forward = lambda x: x
    torch.testing.assert_close(pruned(X), reference(X))
    assert pruned.verification.ok and not pruned.block.state_dict()


class Shared(nn.Module):
    """Two layers have the same weights: neither can go without the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        for _ in range(2):
            x = x + self.layer(x).relu()
        return self.head(x)


class Placed(Stack):
    """What is added to the stream at its start is computed from its size, and not from the stream."""

    def __init__(self):
        super().__init__()
        self.places = nn.Embedding(8, 5)

    def forward(self, x):
        return super().forward(x + self.places(torch.arange(x.shape[0], device=x.device)))


def test_what_is_no_branch():
    model = Placed().eval()
    with torch.no_grad():
        model.places.weight.zero_()  # nothing would score lower
    pruned = fxprune.prune(model, 0.5, V, depth="only", criterion="magnitude")
    assert "places.weight" in dict(pruned.named_parameters()) and len(removed(pruned)) == 2
    with pytest.raises(fxprune.PruneError, match="by parameters that nothing else uses"):
        fxprune.prune(Shared(), 0.5, V, depth="only")
    with pytest.raises(fxprune.PruneError, match="every residual branch holds a tensor that is frozen"):
        fxprune.prune(Stack(), 0.5, V, depth="only", freeze="layers*")
    assert removed(fxprune.prune(Stack(), 0.5, V, depth="only", freeze="layers.0")) == [1]


class Stateful(nn.Module):
    """A block as of Mamba: the stream is kept in another precision, and in evaluation a state within the branch is returned.

    As in Doge the stream is scaled by what is learned.
    """

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8))
        self.norm, self.inner, self.outer = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        residual = x.to(torch.float64)
        state = self.inner(self.norm(x))
        out = (residual * self.scale + self.outer(state.relu())).to(x.dtype)
        return out, None if self.training else state


class States(Stack):
    def forward(self, x):
        x, states = self.embed(x), []
        for layer in self.layers:
            x, state = layer(x)
            states.append(state)
        return self.head(x), states


def test_a_branch_beside_a_copy_of_its_stream_that_runs_on_in_evaluation():
    """What the returned state is computed from stays; the last layer of each branch goes, in training too."""
    model = States(3, Stateful).eval()
    pruned = fxprune.prune(model, 0.4, V, depth="only", criterion=least(model, ["layers.1.outer"]))
    assert pruned.verification.ok and pruned.meta["plan"].removed == {"layers.1.outer.weight", "layers.1.outer.bias"}
    for mode in (False, True):
        torch.testing.assert_close(pruned.train(mode)(V), silenced(model, ["layers.1.outer"]).train(mode)(V))


def test_vectors_go_with_the_layers_that_only_names():
    """The norm in front of an FFN is in no module that `only` names; what `freeze` names stays."""
    model, ids = llama(), torch.randint(50, (1, 6))
    pruned = fxprune.prune(model, 0.5, ids, depth="only", only="*mlp*")
    gone = {
        name.partition(".mlp")[0]
        for name in set(dict(model.named_modules())) - set(dict(pruned.named_modules()))
        if ".mlp." in name
    }
    assert len(gone) == 1
    reference = silenced(model, [f"{gone.pop()}.mlp"])
    torch.testing.assert_close(call(pruned, ids), call(reference, ids))
    with pytest.raises(fxprune.PruneError, match=r"frozen \(model.layers.0.self_attn.o_proj: "):
        fxprune.prune(model, 0.5, ids, depth="only", only="*mlp*", freeze="*layernorm*")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": "all"}, "depth must be True, False, 'only' or 'blocks', not 'all'"),
        ({"depth": 1}, "depth must be True, False, 'only' or 'blocks', not 1"),
        ({"depth_criterion": "taylor"}, "depth_criterion is given without depth"),
        ({"depth": True, "depth_criterion": "taylr"}, "depth_criterion must be one of"),
        ({"depth": True, "depth_criterion": "influence"}, "depth_criterion='influence' looks at data"),
        ({"depth": True, "depth_criterion": "taylor", "data": [V]}, "needs a loss"),
        ({"depth": True, "depth_criterion": lambda s, a: "much", "data": [V]}, "which is no number"),
        ({"depth": True, "criterion": "taylor"}, "gives branches no score by their weights alone"),
        ({"depth": "only", "ratio": 0.1}, "no residual branch can be removed by so little"),
    ],
)
def test_what_is_refused(options, said):
    with pytest.raises(fxprune.PruneError, match=said):
        fxprune.prune(Stack(), example_inputs=V, **options)


# -- plans and files -------------------------------------------------------------------------------------------------


def test_plans():
    model = Stack().eval()
    pruned = fxprune.prune(model, 0.5, V, depth=True)
    plan = fxprune.Plan.from_json(pruned.plan.to_json())
    assert plan == pruned.plan and plan.to_dict()["format"] == "fxprune.plan/2"
    assert plan.removed == {f"layers.{i}.{n}" for i in (0, 1) for n, _ in model.layers[i].named_parameters()}
    assert not any(plan.masks(model)["layers.0.up.weight"].flatten())
    fresh = Stack().eval()
    again = plan.apply(fresh)
    assert removed(again) == [0, 1] and again.layers[3].up.weight.shape == (6, 4)
    assert fxprune.verify(fresh, again, V).ok
    assert "without the residual branches of layers.0, layers.1" in " ".join(str(fxprune.report(model, pruned, V)).split())
    assert fxprune.prune(model, 0.5, V).plan.to_dict()["format"] == "fxprune.plan/1"
    data = plan.to_dict()
    with pytest.raises(fxprune.PruneError, match="this is no plan"):
        fxprune.Plan.from_dict({**data, "format": "fxprune.plan/1"})
    keep = {**data["keep"], "layers.2.up.weight": data["keep"]["layers.0.up.weight"]}
    with pytest.raises(fxprune.PruneError, match="it removes what is no residual branch there"):
        fxprune.Plan.from_dict({**data, "keep": keep}).apply(fresh)


def test_a_pruned_model_is_pruned_again(tmp_path):
    model = Stack().eval()
    once = fxprune.prune(model, 0.25, V, depth="only")
    twice = fxprune.prune(once, 0.5, V, depth=True)
    assert removed(twice) == [0, 1]
    torch.testing.assert_close(twice.plan.apply(model)(V), twice(V))
    assert fxprune.verify(once, twice, V).ok
    path = tmp_path / "twice.safetensors"
    fxprune.save(twice, path)
    torch.testing.assert_close(fxprune.load(path, Stack())(V), twice(V))
    for other in (copy.deepcopy(twice), pickle.loads(pickle.dumps(twice))):
        assert torch.equal(other(V), twice(V))


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "llama", "bert"])
def test_same_class(name):
    make, inputs, total, gone = MODELS[name]
    model = randomised(make())
    options = {"depth": "only", "criterion": least(model, gone)}
    pruned = fxprune.prune(model, (len(gone) + 0.5) / total, inputs, same_class=True, **options)
    assert type(pruned) is type(model)
    torch.testing.assert_close(call(pruned, inputs), call(silenced(model, gone), inputs), rtol=1e-5, atol=1e-6)
    prefixes = tuple(f"{path}." for paths in gone.values() for path in paths)
    assert {n for n, _ in pruned.named_parameters()} == {n for n, _ in model.named_parameters() if not n.startswith(prefixes)}
    assert ("config" in pruned.meta["stale"]) == hasattr(model, "config")
    if name == "mobilenet":
        x = torch.randn(1, *pruned.features[2](pruned.features[:2](X)).shape[1:])
        assert torch.equal(pruned.features[3](x), x)


def test_generation_and_caches():
    """A cache counts by its first layer: one that a removed attention would have to write to is refused."""
    model = randomised(llama())
    model.generation_config.pad_token_id = 0

    def tokens(model: nn.Module, **options: Any) -> list[list[int]]:
        mask = torch.ones_like(IDS)
        return model.generate(IDS, attention_mask=mask, max_new_tokens=3, do_sample=False, **options).tolist()

    for path in ("model.layers.1.mlp", "model.layers.0.self_attn"):
        options = {"depth": "only", "criterion": least(model, [path])}
        pruned = fxprune.prune(model, 0.2, DECODER, same_class=True, **options)
        wanted = tokens(silenced(model, [path]))
        assert tokens(pruned, use_cache=False) == wanted
        if "mlp" in path:
            assert tokens(pruned) == wanted
        else:
            with pytest.raises(GuardError, match="cannot write to a DynamicCache: use_cache=False"):
                tokens(pruned)
    pruned = fxprune.prune(model, 0.2, {"input_ids": IDS}, verify=True, **options)  # which returns a cache
    assert pruned.verification.ok  # the keys and values of a removed attention lie in what is returned: they are computed still
    assert pruned.plan.removed == {f"model.layers.0.self_attn.{m}_proj.weight" for m in "qo"}
    narrow = fxprune.prune(model, 0.5, {"input_ids": IDS}, verify=True)  # a cache is no output: it follows the model's widths
    for small, heads in ((pruned, 2), (narrow, 1)):
        layers = small(input_ids=IDS).past_key_values.layers
        assert {t.shape for layer in layers for t in (layer.keys, layer.values)} == {(len(IDS), heads, IDS.shape[1], 4)}


def test_a_branch_whose_module_adds_it_to_the_stream_itself():
    """BLOOM's FFN does: layers of other widths return zeros, and all forwards are the class's own, with a cache, too."""
    import transformers as hf

    model = randomised(hf.BloomForCausalLM(hf.BloomConfig(hidden_size=16, n_layer=3, n_head=2, vocab_size=60)))
    mask = torch.ones_like(IDS)
    layers = ["transformer.h.1.mlp.dense_h_to_4h", "transformer.h.1.mlp.dense_4h_to_h"]
    options = {"depth": "only", "criterion": least(model, layers)}
    pruned = fxprune.prune(model, 0.2, {"input_ids": IDS, "attention_mask": mask}, same_class=True, **options)
    assert pruned.meta["plan"].removed > {f"{path}.weight" for path in layers}
    assert not any("forward" in vars(module) for module in pruned.modules())
    wanted = silenced(model, layers[1:])
    assert torch.allclose(call(pruned, {"input_ids": IDS}), call(wanted, {"input_ids": IDS}), atol=1e-5)
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    for cache in (True, False):
        assert torch.equal(pruned.generate(IDS, use_cache=cache, **options), wanted.generate(IDS, use_cache=cache, **options))


class Labelled(Stack):
    """Returns its loss where it is given labels."""

    def forward(self, x, scale=1.0, labels=None):
        out = super().forward(x) * scale
        return out if labels is None else {"loss": F.mse_loss(out, labels), "out": out}


@pytest.mark.parametrize("how", ["influence", "taylor", "loss"])
def test_batches_may_hold_other_arguments_than_the_example(how):
    """They are scored by a program of their own; a number that the example gives holds for it, too."""
    model = randomised(Labelled(4, Layer))
    data = [{"x": torch.randn(6, 5, generator=torch.Generator().manual_seed(i)), "labels": torch.zeros(6, 3)} for i in range(2)]
    options = {"depth": "only", "data": data, "depth_criterion": how}
    found = fxprune.prune(model, 0.5, {"x": V, "scale": 3.0}, **options)
    scored = fxprune.prune(model, 0.5, {"x": V, "scale": 3.0, "labels": torch.zeros(len(V), 3)}, **options)
    assert removed(found) == removed(scored) and len(removed(found)) == 2
    with pytest.raises(
        fxprune.PruneError, match=r"^the model raises on a batch of data: TypeError: .* unexpected keyword argument 'other'"
    ):
        fxprune.prune(model, 0.5, V, **options | {"data": [{"x": V, "other": V}]})


class Skipping(Stack):
    """Runs no layer where it is given labels."""

    def forward(self, x, labels=None):
        return super().forward(x) if labels is None else self.head(self.embed(x))


def test_a_branch_that_does_not_run_with_the_arguments_of_a_batch():
    data = [{"x": V, "labels": torch.zeros(6, 3)}]
    with pytest.raises(fxprune.PruneError, match=r"does not run with the arguments of a batch of data\n  at layers\.0"):
        fxprune.prune(Skipping().eval(), 0.5, V, depth="only", data=data, depth_criterion="influence")


def test_the_report_says_that_nothing_but_branches_was_removed():
    model = Stack(4, Layer).eval()
    found = fxprune.report(model, fxprune.prune(model, 0.5, V, depth="only"), ratios=())
    assert found.branches and not found.shrunk
    assert {c.reason for c in found.whole if c.family.frozen is None} == {"stays, as nothing but residual branches was removed"}


def test_what_a_function_of_ones_own_returns_is_said_without_the_node_that_it_was_asked_at():
    with pytest.raises(fxprune.PruneError) as caught:
        fxprune.prune(Stack().eval(), 0.5, V, depth="only", data=[V], depth_criterion=lambda stream, added: "x")
    assert str(caught.value) == "depth_criterion <lambda> returns 'x', which is no number\n  fix: float(score)"


def test_the_ratio_that_is_advised_removes_a_branch():
    model = Stack(3, Layer).eval()
    with pytest.raises(fxprune.PruneError, match=r"no residual branch can be removed by so little") as caught:
        fxprune.prune(model, 0.05, V, depth="only")
    advised = float(str(caught.value).rpartition("ratio=")[2].split()[0])
    assert len(fxprune.prune(model, advised, V, depth="only").plan.removed) > 0
