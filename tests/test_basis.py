"""prune(basis="principal"): what is rotated, that rotating changes nothing, and what is cut then."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxprune
from fxprune.basis.principal import find_rotatable, rotated_basis
from fxprune.basis.pruning import random_rotation
from fxprune.inputs import ExampleInputs
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.pipeline import Compilation

WIDTH = 12
IDS = {"input_ids": torch.arange(10).reshape(2, 5)}


def stirred(model: nn.Module) -> nn.Module:
    """A model whose gains, biases and running statistics are not those of a fresh one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p)) if p.dim() == 1 else p.add_(0.05 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(0.3 * torch.randn_like(b))
            elif name.endswith("running_var"):
                b.mul_(1 + torch.rand_like(b))
    return model.eval()


class Block(nn.Module):
    """x + mlp(norm(x)), with `change` done to the stream or to what is normalised."""

    def __init__(self, norm: nn.Module, change=None, on_normed=None) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm, nn.Linear(WIDTH, 20, bias=False), nn.Linear(20, WIDTH)
        self.change, self.on_normed = change or (lambda x: x), on_normed or (lambda x: x)

    def forward(self, x):
        x = self.change(x)
        return x + self.down(F.gelu(self.up(self.on_normed(self.norm(x)))))


class Stream(nn.Module):
    """A residual stream behind norms."""

    def __init__(self, norm=nn.LayerNorm, **changes) -> None:
        super().__init__()
        self.stem = nn.Linear(6, WIDTH)
        self.position = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.blocks = nn.Sequential(Block(norm(WIDTH)), Block(norm(WIDTH), **changes), Block(norm(WIDTH)))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x) + self.position)).mean(1))


class HandWritten(nn.Module):
    """RMSNorm as language models write it."""

    def __init__(self, width: int, gain=lambda w: w) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.ones(width)), gain

    def forward(self, x):
        y = x.float()
        return self.gain(self.weight) * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-3)).to(x.dtype)


X = torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(1))


def vit():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(16, 8, 2, 2, WIDTH, 16, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model, torch.randn(4, 3, 16, 16)


def llama(tied: bool):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "use_cache": False}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config), IDS


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=50, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), IDS


def bottleneck():
    """Two projections of MobileNetV2's, added, read by an expansion."""

    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
            self.a = nn.Sequential(nn.Conv2d(8, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH))
            self.b = nn.Sequential(nn.Conv2d(8, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH))
            self.expand = nn.Sequential(nn.Conv2d(WIDTH, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6())
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.expand(self.a(x) + self.b(x)).mean((2, 3)))

    return Bottleneck(), torch.randn(4, 3, 8, 8)


def scaled_branches():
    """Layer scale: what is added to the stream is scaled by a parameter first."""

    class Scaled(Block):
        def __init__(self, norm):
            super().__init__(norm)
            self.gamma = nn.Parameter(torch.rand(WIDTH))

        def forward(self, x):
            return x + self.gamma * self.down(F.gelu(self.up(self.norm(x))))

    model = Stream()
    model.blocks[1] = Scaled(nn.LayerNorm(WIDTH))
    return model, X


LINEAR = {
    "LayerNorm": (lambda: (Stream(), X), "stem"),
    "LayerNorm without parameters": (lambda: (Stream(lambda n: nn.LayerNorm(n, elementwise_affine=False)), X), "stem"),
    "RMSNorm": (lambda: (Stream(nn.RMSNorm), X), "stem"),
    "hand-written": (lambda: (Stream(HandWritten), X), "stem"),
    "layer scale": (scaled_branches, "stem"),
    "vit": (vit, "conv_proj"),
    "llama, tied": (lambda: llama(True), "model.embed_tokens:1"),
    "llama": (lambda: llama(False), "model.embed_tokens:1"),
    "gpt2": (gpt2, "transformer.wte:1"),
    "bottleneck": (bottleneck, "a.0"),
    "pair of layers": (lambda: (nn.Sequential(nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)), X), "0"),
}


def found_in(model, x):
    inputs = ExampleInputs.parse(x, model).check(model)
    return find_rotatable(model, Compilation(model, inputs, CouplingOptions()).couple())


def output_of(model, x):
    with torch.no_grad():
        made = model(**x) if isinstance(x, dict) else model(x)
    return made if isinstance(made, torch.Tensor) else made.logits


@pytest.mark.parametrize("name", LINEAR)
def test_rotation_alone_changes_nothing(name):
    make, family = LINEAR[name]
    model, x = make()
    stirred(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    found, _ = found_in(model, x)
    assert [f.name for f in found] == [family]
    basis = rotated_basis(found, [random_rotation(f.linear.size) for f in found])
    rotated = basis.apply(model)
    wanted = output_of(model, x)
    assert (output_of(rotated, x) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # the original is not touched
    changed = [n for n, p in rotated.named_parameters() if n not in before or not torch.equal(p, before[n])]
    assert {m.name for m in found[0].linear.members} <= set(changed)


REFUSED = {
    "relu": ({"change": F.relu}, "relu"),
    "relu on what is normalised": ({"on_normed": F.relu}, "relu"),
    "softmax over channels": ({"change": lambda x: x.softmax(-1)}, "softmax"),
    "scale by data": ({"change": lambda x: x * x.mean((0, 1), keepdim=True)}, "mul"),
    "sum over channels": ({"change": lambda x: x + x.sum(-1, keepdim=True)}, "sum"),
    "number added": ({"change": lambda x: x + 1.0}, "add"),
    "square": ({"change": lambda x: x * x}, "mul"),
    "rolled": ({"change": lambda x: x.roll(1, -1)}, ""),
    "clamped": ({"change": lambda x: x.clamp(-1, 1)}, "clamp"),
    "maximum over channels": ({"change": lambda x: x - x.amax(-1, keepdim=True)}, "amax"),
    "norm of order one": ({"change": lambda x: x / x.abs().sum(-1, keepdim=True)}, "abs"),
    "two halves": ({"change": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1)}, ""),
    "centred in one place only": ({"on_normed": lambda x: x, "change": lambda x: F.rms_norm(x, (WIDTH,))}, ""),
    "sorted": ({"change": lambda x: x.sort(-1).values}, None),
    "taken by index": ({"change": lambda x: x + x[..., :1]}, None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_commute_is_not_rotated(name):
    changes, said = REFUSED[name]
    model = stirred(Stream(**changes))
    found, reasons = found_in(model, X)
    assert "stem" not in [f.name for f in found]
    if said is not None:  # else the coupling froze it
        assert said in reasons["stem"]


def test_double_precision_and_layouts_that_are_looked_at():
    """Rotations are orthogonal to double precision, and what they make is laid out as the original."""

    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, WIDTH), nn.Parameter(torch.randn(4, WIDTH, 2))

        def forward(self, x):
            return torch.view_as_real(self.first(x).to(torch.complex128) @ torch.view_as_complex(self.second).T)

    for model in (Stream(), Complex()):
        stirred(model).double()
        found, _ = found_in(model, X.double())
        rotated = rotated_basis(found, [random_rotation(f.linear.size) for f in found]).apply(model)
        wanted = output_of(model, X.double())
        assert (output_of(rotated, X.double()) - wanted).abs().max() < 1e-12 * wanted.abs().max()
    assert "first" not in [f.name for f in found] or rotated.second.is_contiguous()


class MovedNorm(nn.LayerNorm):
    """A LayerNorm over the second dimension."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class NamedNorm(nn.LayerNorm):
    """A LayerNorm with a forward of its own."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


@pytest.mark.parametrize("norm", [MovedNorm, NamedNorm])
@pytest.mark.parametrize("padding", [0, 1])
def test_norms_in_front_of_convolutions(norm, padding):
    """A shift passes a kernel of one entry only, and only a norm that does nothing else can be replaced."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv1d(6, WIDTH, 1), norm(WIDTH)
            self.read = nn.Conv1d(WIDTH, 4, 1 + 2 * padding, padding=padding)

        def forward(self, x):
            x = self.stem(x.transpose(1, 2))
            x = self.norm(x) if norm is MovedNorm else self.norm(x.transpose(1, 2)).transpose(1, 2)
            return self.read(x).relu()

    model = stirred(Net())
    found, reasons = found_in(model, X)
    assert [f.name for f in found] == (["stem"] if norm is NamedNorm and not padding else [])
    if found:
        rotated = rotated_basis(found, [random_rotation(WIDTH)]).apply(model)
        assert (output_of(rotated, X) - output_of(model, X)).abs().max() < 1e-5
    elif norm is NamedNorm:
        assert "padding" in reasons["stem"]


def test_norms_of_two_kinds_on_one_stream_are_not_rotated():
    model = Stream()
    model.blocks[1].norm = nn.RMSNorm(WIDTH)
    _, reasons = found_in(stirred(model), X)
    assert "LayerNorm" in reasons["stem"]


def test_norms_that_lead_to_the_stream_are_not_rotated():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    model = stirred(transformers.BertForSequenceClassification(config))
    found, reasons = found_in(model, IDS)
    assert not found
    assert "bert.embeddings.LayerNorm.weight" in reasons["bert.embeddings.word_embeddings:1"]


def projected(model, norms, axes):
    """The original in which every norm sees its input on some axes only."""
    kept = axes @ axes.T

    def project(module, args):
        x = args[0].double()
        return ((x - x.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else x) @ kept).to(args[0].dtype)

    return [m.register_forward_pre_hook(project) for m in model.modules() if isinstance(m, norms)]


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "hand-written", "layer scale", "vit"])
def test_the_result_is_the_original_without_the_removed_axes(name):
    model, x = LINEAR[name][0]()
    stirred(model)
    pruned = fxprune.prune(model, {LINEAR[name][1]: 0.5}, x, data=[x], basis="principal")
    (family,) = pruned.meta["basis"].families
    assert (family.axes, family.kept) == (WIDTH, WIDTH // 2)
    basis = pruned.plan.basis
    for original in (model, stirred(LINEAR[name][0]()[0])):
        if original is not model:  # other values, the same axes
            torch.manual_seed(5)
            for p in original.parameters():
                p.data += 0.1 * torch.randn_like(p)
        hooks = projected(original, (nn.LayerNorm, nn.RMSNorm, HandWritten), basis.rotations[0][:, : family.kept])
        wanted = output_of(original, x)
        for hook in hooks:
            hook.remove()
        made = pruned if original is model else pruned.plan.apply(original, x)
        assert (output_of(made, x) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_bottleneck_is_the_original_without_the_removed_axes(tmp_path):
    model, x = bottleneck()
    stirred(model)
    pruned = fxprune.prune(model, {"a.0": 0.5}, x, data=[x], basis="principal")
    axes = pruned.plan.basis.rotations[0][:, : WIDTH // 2]
    hook = model.expand.register_forward_pre_hook(
        lambda m, args: torch.einsum("nchw,cd->ndhw", args[0], (axes @ axes.T).float())
    )
    wanted = output_of(model, x)
    hook.remove()
    assert (output_of(pruned, x) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert type(pruned.get_submodule("a.1")) is nn.Identity and pruned.get_submodule("a.0").bias.shape == (WIDTH // 2,)
    fxprune.save(pruned, tmp_path / "small.safetensors")
    assert torch.equal(output_of(fxprune.load(tmp_path / "small.safetensors", bottleneck()[0]).eval(), x), output_of(pruned, x))


def test_axes_beat_channels_where_the_stream_has_few_directions():
    model = stirred(Stream())
    few = torch.linalg.qr(torch.randn(WIDTH, 3))[0]
    with torch.no_grad():
        for written in (model.stem, *(b.down for b in model.blocks)):
            written.weight.copy_(few @ (few.T @ written.weight))
            written.bias.copy_(few @ (few.T @ written.bias))
        model.position.copy_(model.position @ few @ few.T)
    wanted = output_of(model, X)
    by_axes = fxprune.prune(model, {"stem": 0.75}, X, data=[X], basis="principal")
    by_channels = fxprune.prune(model, {"stem": 0.75}, X, data=[X])
    errors = [float((output_of(m, X) - wanted).abs().max() / wanted.abs().max()) for m in (by_axes, by_channels)]
    assert by_axes.stem.weight.shape == by_channels.stem.weight.shape == (3, 6)
    assert errors[0] < 1e-5 < 0.1 < errors[1]


def test_axes_are_those_of_what_the_norms_read():
    model = stirred(Stream(nn.RMSNorm))
    seen = []
    norms = [m for m in model.modules() if isinstance(m, nn.RMSNorm)]
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for m in norms]
    output_of(model, X)
    for hook in hooks:
        hook.remove()
    pruned = fxprune.prune(model, {"stem": 0.5}, X, data=[X[:4], X[4:]], basis="principal")
    normed = [F.rms_norm(x.double(), (WIDTH,), eps=torch.finfo(torch.float32).eps) for x in seen]
    rows = [x.reshape(-1, WIDTH) for x in normed[:3]] + [normed[3].mean(1)]  # the head reads a mean over positions
    moment = sum(r.T @ r / len(r) for r in rows)
    values, vectors = torch.linalg.eigh(moment)
    axes = pruned.plan.basis.rotations[0]
    assert ((axes.T @ vectors.flip(1)).abs().diagonal() > 1 - 1e-4).all()
    assert abs(pruned.meta["basis"].families[0].energy - float(values.flip(0)[:6].sum() / values.sum())) < 1e-5


def test_a_rotated_model_is_saved_and_repaired(tmp_path):
    model = stirred(Stream())
    pruned = fxprune.prune(model, 0.5, X, data=[X], basis="principal")
    wanted = output_of(pruned, X)
    assert fxprune.verify(model, pruned, X).ok
    fxprune.save(pruned, tmp_path / "small.safetensors")
    with torch.device("meta"):
        form = Stream()
    for original in (Stream(), form):
        loaded = fxprune.load(tmp_path / "small.safetensors", original)
        assert torch.equal(output_of(loaded.eval(), X), wanted)
        assert loaded.plan == pruned.plan and loaded.meta["basis"] == pruned.meta["basis"]
    again = fxprune.Plan.from_json(loaded.plan.to_json()).apply(model, X)
    assert torch.equal(output_of(again, X), wanted)
    target = output_of(model, X)
    whole, _ = pruned.plan.in_basis(model, whole=True)
    assert (output_of(whole, X) - target).abs().max() < 1e-5 * target.abs().max()
    repaired = fxprune.repair(model, pruned, [X], held_out=0)
    assert (output_of(repaired, X) - target).square().mean() < (wanted - target).square().mean()
    assert "principal axes" in str(fxprune.report(model, pruned, X))


def test_same_class():
    model, x = llama(True)
    stirred(model)
    pruned = fxprune.prune(model, 0.5, x, data=[x], basis="principal")
    made = fxprune.prune(model, 0.5, x, data=[x], basis="principal", same_class=True)
    assert type(made) is type(model)
    assert torch.equal(output_of(made, x), output_of(pruned, x))
    assert made.lm_head.weight is not made.model.embed_tokens.weight


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_is_met(seed):
    torch.manual_seed(seed)
    model = stirred(Stream())
    pruned = fxprune.prune(model, params=0.5, example_inputs=X, data=[X], basis="principal")
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(pruned) <= 0.5 * count(model)
    assert pruned.meta["basis"].families[0].kept < WIDTH


def test_bad_arguments():
    model = stirred(Stream())
    for arguments, said in [
        ({"basis": "foo", "data": [X]}, "basis"),
        ({"basis": "principal"}, "looks at data"),
        ({"basis": "principal", "data": [X], "inplace": True}, "inplace"),
        ({"basis": "principal", "data": [X], "remove": {"stem": [0]}, "ratio": None}, "remove"),
    ]:
        with pytest.raises(fxprune.PruneError, match=said):
            fxprune.prune(model, **{"ratio": 0.5, "example_inputs": X, **arguments})
    with pytest.warns(fxprune.PruneWarning, match="no family can be rotated"):
        fxprune.prune(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), 0.5, X, data=[X], basis="principal")


def test_a_plan_with_a_basis_refuses_other_models_and_damage():
    model = stirred(Stream())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = fxprune.prune(model, 0.5, X, data=[X], basis="principal").plan
    with pytest.raises(fxprune.PruneError):
        plan.apply(nn.Linear(3, 3), torch.randn(1, 3))
    with pytest.raises(fxprune.PruneError, match="change of basis"):
        plan.check(model)
    rotated, rest = plan.in_basis(model)
    rest.check(rotated)
    steps = [["rotate", "x", 0, "", 7]], [["no", "x", 0, "", 1]], 3
    for damage in (*({"steps": some} for some in steps), {"rotations": ["AAAA", "AAA="]}):
        data = plan.to_dict()
        data["basis"] = {**data["basis"], **damage}
        with pytest.raises(fxprune.PruneError):
            fxprune.Plan.from_dict(data)


def test_data_that_are_no_numbers_are_refused():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)).eval(), torch.full((4, 6), float("nan"))
    with pytest.raises(fxprune.PruneError, match="finds NaN or infinity in what is read of a family"):
        fxprune.prune(model, 0.5, torch.randn(4, 6), data=[x], basis="principal")
