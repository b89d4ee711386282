"""Budgets: what was asked for is met, counted on the pruned model by others than the planner."""

import pytest
import torch
import torchvision
from refusals import IMAGES, net, refuses
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer
from torchvision.models.convnext import CNBlockConfig

import fxprune
from fxprune import Magnitude


def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None, num_classes=10).eval()


def vit():
    torch.manual_seed(0)
    options = {"num_layers": 3, "num_heads": 6, "hidden_dim": 96, "mlp_dim": 192}
    return VisionTransformer(image_size=32, patch_size=8, num_classes=10, **options).eval()


def mobilenet():
    torch.manual_seed(0)
    return torchvision.models.mobilenet_v2(weights=None, num_classes=10).eval()


def regnet():
    torch.manual_seed(0)
    return torchvision.models.regnet_x_400mf(weights=None, num_classes=10).eval()


def convnext():
    torch.manual_seed(0)
    blocks = [CNBlockConfig(24, 48, 2), CNBlockConfig(48, None, 2)]
    return torchvision.models.ConvNeXt(blocks, num_classes=10).eval()


def swin():
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [2, 2]}
    return torchvision.models.SwinTransformer(patch_size=[4, 4], num_classes=10, **options).eval()


MODELS = {f.__name__: f for f in (resnet, vit, mobilenet, regnet, convnext, swin)}
X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def macs(model, x=X):
    """Half the operations that torch counts, with fused kernels off: they hide their products from its counter."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def params(model, x=None):
    return sum(p.numel() for p in model.parameters())


def memory(model, x=None):
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


COUNT = {"macs": macs, "params": params, "memory": memory}


@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.parametrize("kind", COUNT)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_budgets_are_met_within_two_percent(build, kind, share):
    model = build()
    pruned = fxprune.prune(model, example_inputs=X, verify=False, **{kind: share})
    left = COUNT[kind](pruned) / COUNT[kind](model)
    assert 0.98 * share <= left <= share


@pytest.mark.parametrize("share", [0.35, 0.4, 0.45, 0.9])
def test_a_last_step_that_is_large_is_made_up_for(share):
    """One of two heads is a fifth of this model: where it goes, finer steps of other families are taken back."""
    torch.manual_seed(0)
    options = {"num_layers": 1, "num_heads": 2, "hidden_dim": 96, "mlp_dim": 48}
    model = VisionTransformer(image_size=32, patch_size=8, num_classes=10, **options).eval()
    for ranking in ("local", "global"):
        pruned = fxprune.prune(model, example_inputs=X, params=share, ranking=ranking)
        assert pruned.verification.ok
        assert 0.98 * share <= params(pruned) / params(model) <= share


@pytest.mark.parametrize("ranking", ["global", "isomorphic"])
@pytest.mark.parametrize("build", [resnet, vit])
def test_budgets_are_met_by_competing_families(build, ranking):
    model = build()
    pruned = fxprune.prune(model, example_inputs=X, macs=0.5, ranking=ranking)
    assert pruned.verification.ok
    assert 0.49 <= macs(pruned) / macs(model) <= 0.5


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_planner_counts_as_torch_does(build):
    model = build()
    found = fxprune.feasible(model, X, ratio=0.5)
    pruned = fxprune.prune(model, 0.5, example_inputs=X, verify=False)
    assert found.macs[1:] == (macs(pruned), macs(model))
    assert found.params[1:] == (params(pruned), params(model))
    assert found.memory[1:] == (memory(pruned), memory(model))


def test_an_absolute_budget():
    model = resnet()
    limit = 1_000_000
    assert 0.98 * limit <= params(fxprune.prune(model, example_inputs=X, params=limit, verify=False)) <= limit


def test_all_of_a_model_may_stay():
    model = resnet()
    for all_of_it in (1.0, params(model)):
        with pytest.warns(fxprune.PruneWarning, match=f"^params={all_of_it} removes nothing$"):
            assert params(fxprune.prune(model, example_inputs=X, params=all_of_it, verify=False)) == params(model)


def test_the_least_is_what_the_table_says():
    model = resnet()
    least = fxprune.feasible(model, X).params[0]
    assert params(fxprune.prune(model, example_inputs=X, params=least, verify=False)) == least
    refuses(
        lambda: fxprune.prune(model, example_inputs=X, params=least - 1),
        model,
        what=f"params={least - 1} cannot be met: the least that can is {least:,} of {params(model):,} parameters",
        fix=f"params={-(-least * 1000 // params(model)) / 1000} or more, a lower floor, or freeze less",
    )


def test_a_lower_floor_meets_more():
    model = resnet()
    least = fxprune.feasible(model, X).params[0]
    assert fxprune.feasible(model, X, floor=0.02).params[0] < least / 4


def test_the_fewest_steps_are_taken():
    """One unit more would be past the budget: each hidden unit is worth 4 + 1 + 2 parameters."""
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    for limit, units in ((71, 9), (65, 9), (64, 8), (37, 5), (9, 1)):
        assert fxprune.prune(model, example_inputs=torch.randn(1, 4), params=limit).get_submodule("0").out_features == units


@pytest.mark.parametrize("ranking", ["local", "global", "isomorphic"])
def test_ties_do_not_take_more_than_the_budget(ranking):
    """All scores are equal: a threshold would keep all or nothing."""
    model = resnet()
    pruned = fxprune.prune(model, example_inputs=X, params=0.5, ranking=ranking, criterion=torch.zeros_like, verify=False)
    assert 0.49 <= params(pruned) / params(model) <= 0.5


def test_budgets_and_multiples():
    model = resnet()
    pruned = fxprune.prune(model, example_inputs=X, macs=0.5, round_to=8, verify=False)
    assert all(m.out_channels % 8 == 0 for m in pruned.modules() if isinstance(m, nn.Conv2d))
    assert 0.45 <= macs(pruned) / macs(model) <= 0.5


def test_budgets_by_a_criterion_with_data():
    model, y = resnet(), torch.tensor([3])
    loss = nn.functional.cross_entropy
    pruned = fxprune.prune(
        model, example_inputs=X, macs=0.5, criterion="taylor", data=[(X, y)], loss=loss, ranking="global", verify=False
    )
    assert 0.48 <= macs(pruned) / macs(model) <= 0.5


def test_what_only_training_runs_is_not_counted():
    """GoogLeNet's auxiliary classifiers."""
    torch.manual_seed(0)
    model = torchvision.models.googlenet(weights=None, num_classes=10, aux_logits=True, init_weights=False).eval()
    x = torch.randn(1, 3, 64, 64)
    assert fxprune.feasible(model, x).macs[2] == macs(model, x)


def test_the_table_prints():
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    lines = str(fxprune.feasible(model, torch.randn(1, 4), params=0.5)).splitlines()
    assert lines[0] == "Sequential: what pruning can bring it to"
    assert lines[2].split() == ["least", "at", "params=0.5", "original"]
    assert lines[4].split() == ["parameters", "9", "(12.5%)", "30", "(41.7%)", "72"]


# -- errors ---------------------------------------------------------------------------------------------------------------


def prune(model, **options):
    return lambda: fxprune.prune(model, example_inputs=IMAGES, **options)


def test_one_budget_at_a_time():
    model = net()
    fix = "one of ratio, params, macs, memory and latency"
    refuses(prune(model, macs=0.5, params=0.5), model, what="params and macs are both given", fix=fix)
    refuses(prune(model, ratio=0.5, macs=0.5), model, what="ratio and macs are both given", fix=fix)


@pytest.mark.parametrize("amount", [0, -1, 0.0, float("nan"), float("inf"), True])
def test_what_is_no_amount(amount):
    model = net()
    what = f"macs must be a positive number, not {amount!r}"
    refuses(
        prune(model, macs=amount), model, what=what, fix="macs=0.5 keeps half of the original; a number above 1 is absolute"
    )


WORDS = {"params": "parameters", "macs": "multiply-accumulates", "memory": "bytes"}


@pytest.mark.parametrize("kind", WORDS)
def test_a_budget_above_the_original(kind):
    model = net()
    whole = COUNT[kind](model, IMAGES)
    refuses(
        prune(model, **{kind: whole + 1}),
        model,
        what=f"{kind}={whole + 1} is above the original, which has {whole:,} {WORDS[kind]}",
        fix=f"{kind}=0.5 keeps half; an absolute amount is at most {whole}",
    )


@pytest.mark.parametrize("kind", WORDS)
def test_a_budget_below_the_floor(kind):
    """Against what is left where half of every family goes, which is all that the floor allows."""
    model = net()
    least = COUNT[kind](fxprune.prune(model, 0.5, example_inputs=IMAGES), IMAGES)
    whole = COUNT[kind](model, IMAGES)
    refuses(
        prune(model, floor=0.5, **{kind: 0.1}),
        model,
        what=f"{kind}=0.1 cannot be met: the least that can is {least:,} of {whole:,} {WORDS[kind]}",
        fix=f"{kind}={-(-least * 1000 // whole) / 1000} or more, a lower floor, or freeze less",
    )


def test_a_criterion_object_with_a_budget():
    model = resnet()
    pruned = fxprune.prune(model, example_inputs=X, macs=0.6, criterion=Magnitude(p=1), ranking="global", verify=False)
    assert 0.58 <= macs(pruned) / macs(model) <= 0.6


def test_a_kind_by_name():
    model = net()
    named = fxprune.prune(model, example_inputs=IMAGES, budget={"params": 0.5})
    assert named.plan == fxprune.prune(model, example_inputs=IMAGES, params=0.5).plan


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        ({"budget": {"joules": 0.5}}, "there is no budget of 'joules'", "one of params, macs, memory, latency"),
        ({"budget": 0.5}, "budget must be a mapping from a kind to an amount, not 0.5", "budget={'params': 0.5}"),
        (
            {"budget": {"macs": 0.5}, "macs": 0.4},
            "macs and macs are both given",
            "one of ratio, params, macs, memory and latency",
        ),
    ],
)
def test_kinds_by_name_that_are_refused(options, what, fix):
    model = net()
    refuses(lambda: fxprune.prune(model, example_inputs=IMAGES, **options), model, what=what, fix=fix)
