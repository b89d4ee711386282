"""A pruned model is a model like any other: it trains, switches mode, is copied and compiled."""

import copy
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import relative_error
from refusals import untouched
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, ResNet, resnet18
from torchvision.ops import StochasticDepth

import fxprune

BACKEND = "inductor" if shutil.which("g++") else "aot_eager"


def images(size=32, batch=2, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def resnet():
    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).eval()


def vit():
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 64}
    model = VisionTransformer(image_size=32, patch_size=8, num_classes=10, **sizes).eval()
    nn.init.normal_(model.heads.head.weight)  # it starts at zero, which would stop every gradient
    return model


class Mixed(nn.Module):
    """Everything that asks whether it is in training."""

    def __init__(self, drop=0.5, skip=0.5):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.branch = nn.Conv2d(16, 16, 3, padding=1)
        self.skip = StochasticDepth(skip, "batch")
        self.layer_drop = nn.Dropout2d(drop)
        self.head = nn.Linear(16, 5)
        self.drop = drop

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.skip(self.branch(x))
        return self.head(F.dropout(self.layer_drop(x).mean((2, 3)), self.drop, self.training))


def mixed(**options):
    torch.manual_seed(0)
    return Mixed(**options).eval()


class Tied(nn.Module):
    """An embedding whose table is the last layer's weight, and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.scale = nn.Parameter(torch.randn(8), requires_grad=False)
        self.mix = nn.Linear(8, 12)
        self.back = nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words):
        x = self.embed(words) * self.scale
        return self.head(x + self.back(F.relu(self.mix(x))))


WORDS = torch.arange(14).remainder(11).view(2, 7)
MODELS = {"resnet": resnet, "vit": vit}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def halved(model, x, **options):
    return fxprune.prune(model, 0.5, example_inputs=x, verify=False, **options)


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def distinct(model, x, runs=6):
    """How many different outputs a few runs give."""
    return len({tuple(outputs(model, x).flatten().tolist()) for _ in range(runs)})


@pytest.mark.parametrize("build", [resnet, vit, mixed])
def test_names_modes_and_flags_survive(build):
    model = build()
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_(True)
    pruned = halved(model, images())
    assert list(pruned.state_dict()) == list(model.state_dict())
    now = dict(pruned.named_parameters())
    assert {n: p.requires_grad for n, p in now.items()} == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(isinstance(p, nn.Parameter) and p.grad is None for p in now.values())
    assert [b.dtype for b in pruned.buffers()] == [b.dtype for b in model.buffers()]
    assert not pruned.training


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_its_mode_stay(build, training):
    model = build().train(training)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    with untouched(model):
        pruned = fxprune.prune(model, 0.5, example_inputs=images(), verify=True)
    assert all(m.training == training for m in pruned.modules())
    mine, theirs = ({p.data_ptr() for p in m.parameters()} for m in (pruned, model))
    assert not mine & theirs, "nothing is shared"


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_survives(build, dtype):
    model, x = build().to(dtype), images().to(dtype)
    pruned = fxprune.prune(model, 0.5, example_inputs=x, verify=True)
    assert pruned.meta["verification"].ok, pruned.meta["verification"]
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert outputs(pruned, x).dtype == dtype


def test_a_layer_that_was_compiled_in_place_is_pruned_as_any_other():
    """`Module.compile()` leaves a call of the original on a layer: neither the capture nor the copy may use it."""
    plain, model = resnet(), resnet()
    for layer in (model.layer1, model.conv1):
        layer.compile(backend="aot_eager")
    pruned = fxprune.prune(model, 0.5, example_inputs=images(), verify=False)
    assert model.conv1._compiled_call_impl is not None
    assert all(m._compiled_call_impl is None for m in pruned.modules())
    assert torch.equal(pruned(images()), fxprune.prune(plain, 0.5, example_inputs=images(), verify=False)(images()))


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    model = Tied().eval()
    pruned = fxprune.prune(model, 0.5, example_inputs=WORDS, verify=True)
    assert pruned.meta["verification"].ok
    table = pruned.get_parameter("embed.weight")
    assert table is pruned.get_parameter("head.weight")
    assert table.shape == (11, 4)
    assert pruned.get_parameter("scale").shape == (4,) and not pruned.get_parameter("scale").requires_grad


@pytest.mark.parametrize("build", [lambda: resnet18(num_classes=10).eval(), vit], ids=["resnet18", "vit"])
def test_gradients_reach_every_parameter(build):
    pruned = halved(build(), images()).train()
    pruned(images(batch=4)).square().sum().backward()
    silent = [name for name, p in pruned.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@every_model
def test_training_lowers_the_loss(build):
    pruned, x, y = halved(build(), images()).train(), images(batch=8), torch.arange(8)
    optimiser = torch.optim.SGD(pruned.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(pruned(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_batch_statistics_follow_the_original():
    model, x = mixed(), images(batch=4)
    pruned = halved(model, images())
    kept = fxprune.plan_of(pruned).masks(model)["norm.running_mean"]
    for mode in (False, True, False):
        before = pruned.norm.running_mean.clone()
        outputs(model.train(mode), x), outputs(pruned.train(mode), x)
        assert torch.equal(before, pruned.norm.running_mean) != mode, "they change in training only"
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(pruned.norm, name), getattr(model.norm, name)[kept])
        assert pruned.norm.num_batches_tracked == model.norm.num_batches_tracked


@pytest.mark.parametrize("options", [{"skip": 0.0}, {"drop": 0.0}, {}], ids=["dropout", "skip", "both"])
def test_randomness_is_for_training_only(options):
    x = images()
    pruned = halved(mixed(**options), x)
    assert distinct(pruned, x) == 1
    assert distinct(pruned.train(), x) > 1
    assert distinct(pruned.eval(), x) == 1
    still = halved(mixed(drop=0.0, skip=0.0), x).train()
    still.norm.eval()
    assert distinct(still, x) == 1


def test_a_layer_in_another_mode_than_the_model_stays_in_it():
    model = mixed().train()
    model.norm.eval()  # as one freezes batch norm while fine-tuning
    pruned = halved(model, images())
    assert pruned.training and not pruned.norm.training
    before = pruned.norm.running_mean.clone()
    outputs(pruned, images())
    assert torch.equal(pruned.norm.running_mean, before)


def test_a_model_pruned_in_training_is_the_same_model():
    x = images()
    evaluated, trained = halved(mixed(), x), halved(mixed().train(), x)
    assert torch.equal(outputs(trained.eval(), x), outputs(evaluated, x))
    assert distinct(trained.train(), x) > 1


@pytest.mark.parametrize("build", [resnet, vit, mixed])
def test_deepcopy(build):
    x = images()
    pruned = halved(build(), x)
    twin = copy.deepcopy(pruned)
    assert torch.equal(outputs(twin, x), outputs(pruned, x))
    assert fxprune.plan_of(twin) == fxprune.plan_of(pruned)
    with torch.no_grad():
        list(twin.parameters())[-1].add_(1)
    assert not torch.equal(outputs(twin, x), outputs(pruned, x)), "the copy has its own weights"
    outputs(twin.train(), x)
    assert twin.training and not pruned.training
    assert distinct(pruned, x) == 1
    if build is mixed:
        assert distinct(twin, x) > 1 and distinct(twin.eval(), x) == 1


@every_model
def test_pruning_twice(build):
    model, x = build(), images()
    once = halved(model, x)
    before = outputs(once, x)
    twice = fxprune.prune(once, 0.5, example_inputs=x, verify=True)
    assert twice.meta["verification"].ok
    assert sum(p.numel() for p in twice.parameters()) < 0.5 * sum(p.numel() for p in once.parameters())
    assert torch.equal(outputs(once, x), before)


@every_model
def test_compiled_the_outputs_are_the_same(build):
    x = images()
    pruned = halved(build(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = torch.compile(pruned, backend=BACKEND)
        assert relative_error(outputs(pruned, x), outputs(compiled, x)) < 1e-4
    torch.compiler.reset()


def test_an_opaque_module_that_cannot_be_cut_stays_whole() -> None:
    """Its sizes are written out where nothing rewrites them. The report says so, and the plan can be applied again."""
    from graphs import GRAPHS

    model, inputs = GRAPHS["opaque_with_sizes_written_out"].make()
    pruned = fxprune.prune(model, 0.5, example_inputs=inputs, verify=False)
    why = "belongs to a module that is not captured and fails once it is cut (RuntimeError)"
    assert pruned.meta["frozen_modules"] == {"block": why}
    assert pruned.get_submodule("block.inner").weight.shape == (24, 14)
    assert pruned.get_submodule("b").weight.shape == (20, 14)
    reasons = {c.family.name: c.reason for c in fxprune.report(model, pruned, inputs).whole}
    assert reasons["block.inner"] == f"{why} (at %block in block)"
    again = fxprune.plan_of(pruned).apply(model, inputs)
    assert torch.equal(again(inputs), pruned(inputs))


class Collects(nn.Module):
    """Has members called as methods of every module are: a list, and parameters that it keeps for an optimizer."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 12), nn.Linear(12, 3)
        self.parameters = []
        self.parameters = nn.ParameterList([self.inner.weight, self.outer.weight])
        self.modules = [1.0, 2.0]

    def forward(self, x):
        return self.outer(self.inner(x).relu() * self.modules[1])


@pytest.mark.parametrize("same_class", [False, True])
def test_members_called_as_methods_of_modules_are(same_class, tmp_path):
    torch.manual_seed(0)
    model, x = Collects().eval(), torch.randn(4, 6)
    pruned = fxprune.prune(model, 0.5, x, same_class=same_class)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    assert pruned.modules == [1.0, 2.0]
    fxprune.save(pruned, tmp_path / "small.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "small.safetensors", Collects())(x), pruned(x))
    assert fxprune.report(model, pruned, x).parameters[1] == sum(p.numel() for p in pruned.parameters())
    fxprune.repair(model, pruned, [torch.randn(8, 6) for _ in range(4)])


class Shadows(nn.Module):
    """Keeps lists under the names by which torch lists what a module holds."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)
        self.named_parameters, self.named_modules, self.named_buffers, self.modules, self.buffers = ([1.0] for _ in range(5))

    def forward(self, x):
        return self.outer(self.norm(self.inner(x)).relu() * self.modules[0])


def test_lists_that_hide_methods_of_modules(tmp_path):
    torch.manual_seed(0)
    model, x = Shadows().eval(), torch.randn(16, 6)
    pruned = fxprune.prune(model, {"inner": 0.5}, x)
    assert pruned.inner.out_features == 6
    fxprune.save(pruned, tmp_path / "small.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "small.safetensors", Shadows())(x), pruned(x))
    masked = fxprune.masks.masked(model, fxprune.plan_of(pruned))
    torch.testing.assert_close(masked(x), pruned(x))
    torch.testing.assert_close(fxprune.masks.prune_zeros(masked, x)(x), pruned(x))
    assert fxprune.prune(model, example_inputs=x, remove={"inner": [1, 2]}).inner.out_features == 10
    with pytest.warns(fxprune.PruneWarning, match="inner goes through relu"):
        fxprune.prune(model, 0.5, x, basis="principal", data=[x])
    better = fxprune.repair(model, pruned, [torch.randn(8, 6) for _ in range(4)])
    fxprune.report(model, better, x).to_html(tmp_path / "report.html")
    assert fxprune.Pruner(model, 0.5, x, mask="hold").step()(x).shape == (16, 3)


class WritesPositions(nn.Module):
    """Adds to its table of positions, of which it has a view in a batch of one, and takes images of one size."""

    def __init__(self):
        super().__init__()
        self.conv, self.positions, self.head = nn.Conv2d(3, 12, 4, 4), nn.Parameter(torch.randn(1, 64, 12)), nn.Linear(12, 3)

    def forward(self, x):
        tokens = self.positions.detach().expand(len(x), -1, -1)
        tokens = tokens.clone() if len(x) > 1 else tokens
        tokens += 1
        return self.head(tokens + self.conv(x).flatten(2).mT)


def test_the_original_stays_where_verification_learns_that_it_takes_no_other_size():
    torch.manual_seed(0)
    model = WritesPositions().eval()
    with untouched(model):
        fxprune.prune(model, 0.5, images(batch=1))
