"""What a user asks for and gets: plans, couplings, and every option of prune."""

import inspect
import io
import json
from pathlib import Path

import networkx as nx
import pytest
import timm
import torch
import torchvision
from graphs import GRAPHS
from rich.console import Console
from torch import nn
from torchvision.models import VisionTransformer

import fxprune
from fxprune import Plan
from fxprune.cli import models
from fxprune.reports.formatting import as_text
from fxprune.reports.profile import profile


def images(size=32, batch=2, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def resnet(**options):
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None, num_classes=10, **options).eval()


def vit(**options):
    torch.manual_seed(0)
    options = {"num_layers": 2, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 64, **options}
    return VisionTransformer(image_size=32, patch_size=8, num_classes=10, **options).eval()


MODELS = {"resnet": resnet, "vit": vit}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def run(model, x):
    with torch.no_grad():
        return model(x)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def share(small, model):
    return sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())


@every_model
def test_plan_survives_json_and_prunes_a_fresh_copy_the_same(build):
    model, x = build(), images()
    pruned = fxprune.prune(model, 0.5, example_inputs=x, verify=False)
    plan = fxprune.plan_of(pruned)
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json()
    json.loads(plan.to_json())

    fresh = build()  # the same seed, so the same values
    for applied in (again.apply(fresh), again.apply(fresh, example_inputs=images(seed=1))):
        assert shapes(applied) == shapes(pruned)
        assert all(torch.equal(value, pruned.state_dict()[k]) for k, value in applied.state_dict().items())
        assert torch.equal(run(applied, x), run(pruned, x))
        assert fxprune.plan_of(applied) == plan


def test_plan_carries_over_to_other_values():
    x = images()
    plan = fxprune.plan_of(fxprune.prune(resnet(), 0.5, example_inputs=x, verify=False))
    torch.manual_seed(7)
    other = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    assert fxprune.verify(other, plan.apply(other), x).ok


def test_plan_is_readable():
    model = resnet()
    plan = fxprune.plan_of(fxprune.prune(model, 0.5, example_inputs=images(), verify=False))
    cut, total = len(plan.slices), len(plan.shapes)
    assert repr(plan).startswith(f"Plan({cut} of {total} tensors cut, ")
    assert "conv1.weight: (64, 3, 7, 7) -> (32, 3, 7, 7)" in str(plan)
    assert plan.masks(model)["conv1.weight"].sum() == 32 * 3 * 49


def check_graph(coupling):
    """The graph is drawn from the ties, the families from their solution: they must tell the same story."""
    graph = coupling.to_networkx()
    assert all(graph.nodes[n]["tensor"] == n[0] and graph.nodes[n]["dim"] == n[1] for n in graph)
    components = sorted(sorted({(name, dim) for name, dim, _ in c}) for c in nx.connected_components(graph))
    assert components == sorted(sorted(set(f.members)) for f in coupling.families)
    for component in nx.connected_components(graph):
        assert len({family for *_, family in component}) == 1
    return graph


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small", "densenet121", "googlenet"])
def test_components_are_families_in_torchvision(name):
    model, _ = models.load(f"torchvision:{name}")
    coupling = fxprune.couple(model, images(64))
    graph = check_graph(coupling)
    assert sum(data["indices"] for n, data in graph.nodes(data=True) if n[:2] == ("conv1.weight", 0)) in (
        0,
        64,
        24,
    )


@pytest.mark.parametrize("attention", ["heads", "dims"])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "test_byobnet"])
def test_components_are_families_in_timm(name, attention):
    model = timm.create_model(name).eval()
    check_graph(fxprune.couple(model, images(model.pretrained_cfg["input_size"][-1]), attention=attention))


@pytest.mark.parametrize("name", sorted(GRAPHS)[::9])
def test_components_are_families_in_conformance_graphs(name):
    model, inputs = GRAPHS[name].make()
    coupling = fxprune.couple(model, inputs)
    check_graph(coupling)
    assert json.loads(json.dumps(coupling.to_dict())) == coupling.to_dict()
    assert str(coupling).startswith(type(model).__name__)


def test_coupling_counts_every_parameter():
    model = resnet()
    coupling = fxprune.couple(model, images())
    by_name = {f.name: f for f in coupling.families}
    first = by_name["layer1.0.conv1"]
    assert (first.units, first.width, first.frozen) == (64, 1, None)
    assert first.parameters == 2 * 64 * 64 * 9 + 2 * 64  # its own weight, the next one's, scale and shift
    assert by_name["fc"].frozen == "is an output of the model"
    assert by_name["fc"].parameters == 10 * 512 + 10
    largest = coupling.prunable[0]
    assert largest.parameters == max(f.parameters for f in coupling.families)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_weights_that_need_no_gradient_couple_alike(build):
    """Torch decomposes a linear layer otherwise then: into a batched product with the expanded weight."""
    learning, still = (fxprune.couple(build().requires_grad_(flag), images()) for flag in (True, False))
    assert learning.to_dict() == still.to_dict()


def test_printed_coupling_lists_the_largest_first_and_the_reasons():
    text = str(fxprune.couple(resnet(), images()))
    lines = text.splitlines()
    assert lines[0] == "ResNet: 12 prunable families of 2,880 units, 2 families kept whole"
    assert "layer4.0.conv2" in lines[4]
    assert "is an output of the model" in text.partition("kept whole  ")[2]
    assert all(line == line.rstrip() for line in lines)


def test_ratio_by_glob():
    model, x = resnet(), images()
    ratio = {"layer4.*.bn1": 0.75, "layer4": 0.25, "layer1.*.bn1": 0.5}
    small = fxprune.prune(model, ratio, example_inputs=x)
    now = shapes(small)
    assert now["layer4.0.conv1.weight"][0] == 128  # the first glob that matches counts
    assert now["layer4.0.conv2.weight"][0] == 384
    assert now["layer1.0.conv1.weight"][0] == 32
    assert now["layer2.0.conv1.weight"][0] == 128, "no glob names it"
    assert small.meta["verification"].ok


def test_ratio_for_everything_by_glob_is_a_ratio():
    model, x = resnet(), images()
    whole = fxprune.prune(model, 0.5, example_inputs=x, verify=False)
    assert shapes(fxprune.prune(model, {"*": 0.5}, example_inputs=x, verify=False)) == shapes(whole)


def test_freeze_by_glob_and_by_module():
    model, x = resnet(), images()
    before = shapes(model)
    requests = {"layer2*": ["layer2."], ("layer1.0.conv1", "fc"): ["layer1.0.conv1.", "fc."]}
    for freeze, kept in requests.items():
        now = shapes(fxprune.prune(model, 0.5, example_inputs=x, freeze=freeze, verify=False))
        held = [name for name in before if name.startswith(tuple(kept))]
        assert held and all(now[name] == before[name] for name in held)
        assert now["layer4.0.conv1.weight"] != before["layer4.0.conv1.weight"]
    now = shapes(fxprune.prune(model, 0.5, example_inputs=x, freeze=model.layer3[1], verify=False))
    assert all(now[name] == before[name] for name in before if name.startswith("layer3.1."))


def test_printing_takes_no_glob_for_markup():
    coupling = fxprune.couple(resnet(), images(), freeze="layer[bold1]*")
    assert "is frozen by freeze='layer[bold1]*'" in as_text(coupling, width=200)
    assert "is frozen by freeze='layer[bold1]*'" in marked_up(coupling)


def marked_up(renderable):
    """What a console with rich's own settings shows."""
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


def test_frozen_families_say_so():
    coupling = fxprune.couple(resnet(), images(), freeze="layer1.0.conv1")
    reasons = {f.name: f.frozen for f in coupling.families}
    assert reasons["layer1.0.conv1"] == (
        "is frozen by freeze='layer1.0.conv1', which holds layer1.0.bn1:0, layer1.0.conv2:1 too"
    )


def test_a_channel_of_a_transposed_grouped_convolution_counts_once():
    """Its weight names an output channel once for every input of the group: the family is as wide as the channels."""
    net = nn.Sequential(nn.ConvTranspose2d(8, 16, 2, groups=2), nn.ReLU(), nn.Conv2d(16, 4, 1))
    x = torch.randn(1, 8, 4, 4)
    family = next(f for f in fxprune.couple(net, x).families if f.name == "0:1")
    assert (family.units, family.width) == (16, 1)
    small = fxprune.prune(net, 0.4, example_inputs=x, round_to=4)
    assert small.get_submodule("2").weight.shape == (4, 12, 1, 1)


@pytest.mark.parametrize("round_to", [1, 8, 24])
def test_kept_counts_are_multiples(round_to):
    model, x = resnet(), images()
    small = fxprune.prune(model, 0.3, example_inputs=x, round_to=round_to, verify=False)
    before, now = shapes(model), shapes(small)
    changed = {name: now[name][0] for name in now if name.endswith("conv1.weight") and now[name] != before[name]}
    assert changed and all(count % round_to == 0 for count in changed.values())
    assert all(count >= 0.65 * before[name][0] for name, count in changed.items())


def test_whole_heads_or_dimensions_within_them():
    model, x = vit(), images()
    qkv = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    heads = fxprune.prune(model, 0.5, example_inputs=x, attention="heads")
    dims = fxprune.prune(model, 0.5, example_inputs=x, attention="dims")
    assert heads.meta["verification"].ok and dims.meta["verification"].ok
    assert shapes(heads)[qkv] == shapes(dims)[qkv] == (72, 24)

    kept = fxprune.plan_of(heads).masks(model)[qkv].any(1).view(3, 4, 12)  # q, k and v; heads; dimensions
    assert (kept.all(-1) | ~kept.any(-1)).all(), "a head stays or goes whole"
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[1], kept[2])
    kept = fxprune.plan_of(dims).masks(model)[qkv].any(1).view(3, 4, 12)
    assert (kept.sum(-1) == 6).all(), "every head keeps half of its dimensions"
    assert torch.equal(kept[0], kept[1]), "queries meet keys"


def test_stronger_ratio_leaves_less():
    model, x = resnet(), images()
    left = [share(fxprune.prune(model, r, example_inputs=x, verify=False), model) for r in (0.25, 0.5, 0.75)]
    assert left == sorted(set(left), reverse=True) and left[0] < 1
    assert 0.25 <= left[1] <= 0.33


def test_a_glob_names_the_layer_that_writes_and_not_the_one_that_reads():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    small = fxprune.prune(model, {"2": 0.5}, example_inputs=torch.randn(2, 4))
    now = shapes(small)
    assert now["0.weight"] == (8, 4)
    assert now["2.weight"] == (3, 8)


def test_functions_hide_no_packages():
    home = Path(fxprune.__file__).parent
    functions = [name for name in fxprune.__all__ if not inspect.ismodule(getattr(fxprune, name))]
    assert functions and not [n for n in functions if (home / n / "__init__.py").exists() or (home / f"{n}.py").exists()]


def test_verify_says_that_a_pruned_model_is_in_another_precision():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    small = fxprune.prune(model, 0.5, x).bfloat16()
    with pytest.raises(fxprune.PruneError) as caught:
        fxprune.verify(model, small, x)
    wanted = (
        "the original is torch.float32, and the pruned model torch.bfloat16\n  at Sequential\n  fix: both in one precision: "
    )
    assert str(caught.value) == f"{wanted}pruned.to(torch.float32)"


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, lambda m: torch.compile(m, backend="eager")]
)
def test_a_pruned_model_may_be_wrapped(wrap):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
    small = fxprune.prune(model, 0.5, x)
    assert fxprune.plan_of(wrap(small)) == small.plan
    assert fxprune.verify(model, wrap(small), x).ok
    assert fxprune.report(model, wrap(small)).parameters == fxprune.report(model, small).parameters
    assert [m.path for m in profile(model, x, wrap(small)).modules if m.after is None] == []
    torch.testing.assert_close(fxprune.repair(model, wrap(small), [x])(x), fxprune.repair(model, small, [x])(x))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_masks_of_a_wrapped_model(wrap):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
    small = fxprune.prune(model, 0.5, x)
    small.plan.check(wrap(model))
    masks = small.plan.masks(wrap(model))
    assert sorted(masks) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    torch.testing.assert_close(fxprune.masks.zeroed(wrap(model), masks)(x), small(x))
    wrapped = wrap(model)
    fxprune.masks.hold(wrapped, small.plan)
    torch.testing.assert_close(wrapped(x), small(x))


@pytest.mark.parametrize("kind", [list, dict])
def test_inputs_that_contain_themselves_are_refused(kind):
    class Ignores(nn.Linear):
        def forward(self, x, others=None):
            return super().forward(x)

    others = kind()
    others.append(others) if kind is list else others.update(own=others)
    model, x = Ignores(4, 8), torch.randn(2, 4)
    for ask in (
        lambda: fxprune.prune(model, 0.5, (x, others), release="*"),
        lambda: fxprune.prune(model, 0.5, x, release="*", criterion="wanda", data=[((x, others), 0)]),
    ):
        with pytest.raises(fxprune.PruneError, match=r"^a list or a dict contains itself"):
            ask()


def test_what_needs_values_says_so_on_the_meta_device():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to("meta"), torch.randn(3, 4)
    small = fxprune.prune(model, 0.5, x, criterion="random", verify=False)
    for ask in (lambda: fxprune.repair(model, small, [x]), lambda: fxprune.masks.masked(model, small.plan)):
        with pytest.raises(fxprune.PruneError, match=r"^0.weight is on the meta device: it has no values\n"):
            ask()
