"""Plans of models that were pruned several times are plans of the original, and fit it whether or not it has run."""

import copy
import itertools

import pytest
import torch
from graphs import GRAPHS
from refusals import IMAGES, net
from stepping import IMAGES as IMAGES16
from stepping import vit
from torch import nn

import fxprune
from fxprune import PruneError
from fxprune.passes.ir.slice_algebra import compose_slices, same_slices
from fxprune.passes.ir.slices import TensorSlice, apply_slices


def mlp():
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


GRAPH_NAMES = sorted(name for name, graph in GRAPHS.items() if not graph.heads)[::60]
MODELS = {
    "mlp": (lambda: (mlp().eval(), torch.randn(2, 4)), {}),
    "net": (lambda: (net().eval(), IMAGES), {}),
    "vit": (lambda: (vit(), IMAGES16), {}),
    "vit in dims": (lambda: (vit(), IMAGES16), {"attention": "dims"}),
    **{name: (GRAPHS[name].make, {}) for name in GRAPH_NAMES},
}


@pytest.mark.parametrize("name", MODELS)
def test_what_was_pruned_twice_has_a_plan_of_the_original(name):
    build, options = MODELS[name]
    model, x = build()
    once = fxprune.prune(model, 0.3, example_inputs=x, **options)
    try:
        twice = fxprune.prune(once, 0.4, example_inputs=x, **options)
    except PruneError as error:
        assert "can be pruned" in error.what  # nothing is left to remove
        return
    plan = fxprune.plan_of(twice)
    assert plan.shapes == fxprune.plan_of(once).shapes and plan == twice.plan
    again = fxprune.Plan.from_json(plan.to_json()).apply(model)
    args = x if isinstance(x, tuple) else (x,)
    with torch.no_grad():
        outs = [m(**x) if isinstance(x, dict) else m(*args) for m in (again, twice)]
    if isinstance(outs[0], torch.Tensor):
        assert torch.equal(*outs)
    assert {n: tuple(p.shape) for n, p in again.named_parameters()} == {n: tuple(p.shape) for n, p in twice.named_parameters()}
    assert fxprune.verify(model, twice, x).ok and fxprune.verify(once, twice, x).ok


class OneHeadLeft(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        y = self.first(x)
        return self.head(y + self.attention(y, y, y, need_weights=False)[0])


def test_dimensions_of_the_one_head_that_a_first_step_left(tmp_path):
    """Whole heads go first, then dimensions of the last one: what both left is no choice of heads, and is one of dimensions."""
    torch.manual_seed(0)
    model, x = OneHeadLeft().eval(), torch.randn(8, 5, 6)
    once = fxprune.prune(model, 0.5, x)
    twice = fxprune.prune(once, 0.4, x)
    assert once.attention.out_proj.in_features == 8 > twice.attention.out_proj.in_features
    fxprune.save(twice, tmp_path / "twice.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "twice.safetensors", model)(x), twice(x))
    assert fxprune.verify(model, twice, x).ok and fxprune.report(model, twice, x)
    for method in ("compensate", "merge"):
        fxprune.repair(model, twice, [x], method=method)


def test_three_times_and_a_checkpoint(tmp_path):
    model, x = mlp(), torch.randn(2, 4)
    small = model
    for _ in range(3):
        small = fxprune.prune(small, 0.3, example_inputs=x)
    fxprune.save(small, tmp_path / "small.safetensors")
    again = fxprune.load(tmp_path / "small.safetensors", mlp())
    assert torch.equal(again(x), small(x)) and again.get_submodule("0").out_features == 7
    by_hand = [fxprune.plan_of(model := fxprune.prune(model, 0.3, example_inputs=x)) for _ in range(3)]
    assert by_hand[-1] == fxprune.plan_of(small)


def test_a_pruned_model_that_was_changed_is_an_original_of_its_own():
    x = torch.randn(2, 4)
    once = fxprune.prune(mlp(), 0.5, example_inputs=x)
    once.set_submodule("2", nn.Linear(8, 7))
    twice = fxprune.prune(once, 0.5, example_inputs=x)
    assert fxprune.plan_of(twice).shapes["2.weight"] == (7, 8)
    assert torch.equal(fxprune.plan_of(twice).apply(once)(x), twice(x))


def test_plans_of_different_models_are_not_composed():
    x = torch.randn(2, 4)
    plan = fxprune.plan_of(fxprune.prune(mlp(), 0.5, example_inputs=x))
    with pytest.raises(PruneError, match=r"0.weight has shape \(16, 4\) there, and \(8, 4\) is left of it here"):
        plan.compose(plan)
    other = fxprune.plan_of(fxprune.prune(net(), 0.5, example_inputs=IMAGES))
    with pytest.raises(PruneError, match="this one knows nothing of"):
        plan.compose(other)


def random_slices(shape, generator):
    """Slices of one kind or the other: along single dimensions, or along two together with rows of equal length."""
    if torch.rand((), generator=generator) < 0.5:
        found = []
        for d in range(2):
            n = int(torch.randint(1, shape[d] + 1, (), generator=generator))
            keep = torch.randperm(shape[d], generator=generator)[:n].sort().values
            found.append(TensorSlice((d,), keep, (n,)))
        return found
    rows = int(torch.randint(1, shape[0] + 1, (), generator=generator))
    columns = int(torch.randint(1, shape[1] + 1, (), generator=generator))
    kept_rows = torch.randperm(shape[0], generator=generator)[:rows].sort().values
    keep = [r * shape[1] + torch.randperm(shape[1], generator=generator)[:columns].sort().values for r in kept_rows]
    return [TensorSlice((0, 1), torch.cat(keep), (rows, columns))]


def test_composed_slices_leave_what_one_after_the_other_leaves():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        tensor = torch.arange(6 * 5 * 2).view(6, 5, 2)
        first = random_slices(tensor.shape, generator)
        left = apply_slices(first, tensor)
        second = random_slices(left.shape, generator)
        composed = compose_slices(first, second, tensor.shape)
        assert torch.equal(apply_slices(composed, tensor), apply_slices(second, left))


def test_slices_are_the_same_where_they_leave_the_same():
    single = [TensorSlice((0,), torch.tensor([0, 2]), (2,)), TensorSlice((1,), torch.tensor([1]), (1,))]
    joint = [TensorSlice((0, 1), torch.tensor([1, 7]), (2, 1))]
    other = [TensorSlice((0, 1), torch.tensor([1, 6]), (2, 1))]
    assert same_slices(single, joint, (3, 3)) and not same_slices(single, other, (3, 3)) and not same_slices(joint, [], (3, 3))


class Lazy(nn.Module):
    """Makes a table in its first forward, one way or the other, and reads it through a layer."""

    def __init__(self, way):
        super().__init__()
        self.way, self.inner, self.outer = way, nn.Linear(4, 8), nn.Linear(8, 3)
        if way == "replaced":
            self.register_buffer("table", torch.zeros(1, 1), persistent=False)
        elif way == "none":
            self.table = None

    def forward(self, x):
        made = getattr(self, "table", None)
        if made is None or made.shape[0] != 8:
            self.table = torch.linspace(1, 2, 8)
        return self.outer(self.inner(x) * self.table)


@pytest.mark.parametrize("way", ["replaced", "none", "attribute"])
def test_plans_fit_models_that_have_run_and_that_have_not(way, tmp_path):
    torch.manual_seed(0)
    fresh, x = Lazy(way).eval(), torch.randn(2, 4)
    ran = copy.deepcopy(fresh)
    ran(x)
    for source, target in itertools.product((fresh, ran), repeat=2):
        held = str(vars(target))
        small = fxprune.prune(source, 0.5, example_inputs=x)
        plan = fxprune.Plan.from_json(fxprune.plan_of(small).to_json())
        applied = plan.apply(target)
        assert torch.equal(applied(x), small(x)) and fxprune.verify(target, applied, x).ok
        fxprune.save(small, tmp_path / "small.safetensors")
        assert torch.equal(fxprune.load(tmp_path / "small.safetensors", target)(x), small(x))
        assert str(vars(target)) == held, "it is not touched"


def test_a_plan_that_removes_what_is_kept_here_is_refused():
    """The shapes are the same, and the other model returns what this one sums over."""

    class Summed(nn.Module):
        def __init__(self, returns):
            super().__init__()
            self.returns, self.inner = returns, nn.Linear(4, 8)

        def forward(self, x):
            return self.inner(x) if self.returns else self.inner(x).relu().sum(1)

    x = torch.randn(2, 4)
    plan = fxprune.plan_of(fxprune.prune(Summed(False), 0.5, example_inputs=x))
    with pytest.raises(PruneError, match=r"it removes channels of inner.weight, of which one is an output of the model"):
        plan.apply(Summed(True))


def swin_twice():
    """Layers of two heads with a table of positions are left with one, and then lose dimensions of that."""
    from torchvision.models import SwinTransformer

    model = SwinTransformer([4, 4], 16, [2], [2], [2, 2], num_classes=3).eval()
    x = torch.randn(1, 3, 16, 16)
    once = fxprune.prune(model, 0.5, x)
    return model, x, once, fxprune.prune(once, 0.5, x)


def t5_by_depth_then_width():
    """The first layer keeps what says how many positions there are; its queries then lose other channels than all heads do."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_decoder_layers=1, num_heads=4)
    model, ids = T5ForConditionalGeneration(config).eval(), torch.arange(10).view(2, 5)
    x = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    light = {p.data_ptr() for p in model.encoder.block[0].layer[0].parameters()}
    criterion = lambda weight: torch.full_like(weight, 0.0 if weight.data_ptr() in light else 1.0)  # noqa: E731
    once = fxprune.prune(model, 0.15, x, depth="only", criterion=criterion)
    assert "encoder.block.0.layer.0.SelfAttention.o.weight" in once.plan.removed
    return model, x, once, fxprune.prune(once, 0.5, x)


@pytest.mark.parametrize("build", [swin_twice, t5_by_depth_then_width])
def test_steps_that_no_coupling_of_the_original_allows_at_once(build, tmp_path):
    """The plan of both holds each of them, and they are taken one after the other."""
    torch.manual_seed(0)
    model, x, once, twice = build()
    plan = fxprune.Plan.from_json(fxprune.plan_of(twice).to_json())
    assert plan == fxprune.plan_of(twice) and [step.shapes == plan.shapes for step in plan.steps] == [True, False]
    fxprune.save(twice, tmp_path / "twice.safetensors")
    every = [load(model) for load in (plan.apply, lambda m: fxprune.load(tmp_path / "twice.safetensors", m))]
    every += [fxprune.load(tmp_path / "twice.safetensors", model, same_class=True), twice]
    with torch.no_grad():
        outs = [m(**x)["logits"] if isinstance(x, dict) else m(x) for m in every]
    assert torch.equal(outs[0], outs[3]) and torch.equal(outs[1], outs[3]) and torch.allclose(outs[2], outs[3], atol=1e-5)
    assert type(every[2]) is type(model) and fxprune.plan_of(every[1]) == plan
    assert fxprune.verify(once, twice, x).ok
    with pytest.raises(PruneError, match="fix: the model that the last step was made of"):
        fxprune.verify(model, twice, x)


def test_steps_that_are_none_of_the_plan_are_refused():
    torch.manual_seed(0)
    model, _, _, twice = swin_twice()
    data = fxprune.plan_of(twice).to_dict()
    data["steps"][1]["keep"] = {}
    with pytest.raises(PruneError, match="this is no plan: its steps leave"):
        fxprune.Plan.from_dict(data).apply(model)
    data["steps"][0]["steps"] = []
    with pytest.raises(PruneError, match="this is no plan: a step of it has steps"):
        fxprune.Plan.from_dict(data)
