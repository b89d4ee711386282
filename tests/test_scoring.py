"""Scoring in any precision that leaves everything as it was; and what it refuses."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from refusals import IMAGES, net, refuses, untouched
from scored import GRADIENTS, NEED_DATA, agree, batch, built, scores
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune import criteria
from fxprune.criteria.aggregation import NORMALISE, REDUCE
from fxprune.criteria.scorer import SMALL
from fxprune.passes.coupling.couple import analyse
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.passes.ir.labels import Factor


@pytest.fixture
def small():
    return built()


def stepped(dtype):
    """A model whose units differ clearly in size: unit i of 8 has weights near 2^i."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for p, dim in ((model[0].weight, 0), (model[1].weight, 0), (model[2].weight, 1)):
            p.copy_(torch.rand_like(p) + 0.5)
            p.mul_((2.0 ** (order.float() / 2)).reshape([-1 if d == dim else 1 for d in range(p.dim())]))
    return model.to(dtype)


ANYWHERE = sorted(criteria.CRITERIA.keys() - {"reap"})  # which scores experts, and nothing else: see test_experts.py


@pytest.mark.parametrize("criterion", [name for name in ANYWHERE if name != "random"])
def test_bfloat16_ranks_as_float32(criterion):
    x, y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        data = [(x.to(dtype), y)]
        values = scores(stepped(dtype), x.to(dtype), criterion, data, lambda out, y: out.float().square().mean())
        found.append(values["0"].argsort().tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_under_autocast(small, criterion):
    model = small.float()
    x, y = batch()
    data = [(x.float(), y)]
    plain = scores(model, x.float(), criterion, data, F.cross_entropy)["one"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scores(model, x.float(), criterion, data, F.cross_entropy)["one"]
    assert found.isfinite().all()
    if criterion != "grasp":  # signed: what nearly cancels has no relative precision
        torch.testing.assert_close(found, plain, rtol=0.25, atol=0.05 * float(plain.max()))


def test_everything_is_left_as_it_was(small):
    model = net()
    model.train()
    x, y = IMAGES, torch.zeros(2, dtype=torch.int64)
    for criterion in ANYWHERE:
        with untouched(model):
            rule = criteria.Gates(steps=3) if criterion == "gates" else criterion
            fxprune.prune(model, 0.5, example_inputs=x, criterion=rule, data=[(x, y)], loss=F.cross_entropy)


def test_parameters_that_need_no_gradient_are_scored_all_the_same(small):
    x, y = batch()
    wanted = scores(small, x, "taylor", [(x, y)], F.cross_entropy)
    with torch.no_grad():
        agree(scores(small.requires_grad_(False), x, "taylor", [(x, y)], F.cross_entropy), wanted)


def test_a_batch_of_keywords_goes_to_the_loss_whole():
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x, target=None):
            return {"out": self.down(self.up(x).relu())}

    model, x, y = Keyed(), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    loss = lambda out, given: F.cross_entropy(out["out"], given["target"])  # noqa: E731
    a = scores(model, x, "taylor", [{"x": x, "target": y}], loss)
    b = scores(model, x, "taylor", [(x, y)], lambda out, y: F.cross_entropy(out["out"], y))
    agree(a, b)


def prune(model, criterion, **options):
    return lambda: fxprune.prune(model, 0.5, example_inputs=IMAGES, criterion=criterion, **options)


BATCHES = "data=[(images, labels), ...], or a DataLoader of such pairs"
LABELS = torch.zeros(2, dtype=torch.int64)


def test_a_criterion_of_the_wrong_shape():
    def rows(weight):
        return weight.flatten(1).sum(1) if weight.dim() > 1 else weight

    model = net()
    refuses(
        prune(model, rows),
        model,
        what="the criterion rows returns shape (8,) for a parameter of shape (8, 3, 3, 3)",
        where="stem.weight (family stem)",
        fix="return the importance of each element, as a tensor of the parameter's shape",
    )


def test_a_criterion_that_gives_nan():
    def broken(weight):
        return weight * math.nan

    model = net()
    refuses(
        prune(model, broken),
        model,
        what="the criterion broken gives NaN",
        where="family stem",
        fix="look for NaN among its parameters (and in the data and the loss, where it reads them)",
    )


@pytest.mark.parametrize("criterion", GRADIENTS)
def test_a_loss_that_is_nan(criterion):
    model = net()
    name = type(criteria.CRITERIA[criterion]).__name__
    refuses(
        prune(model, criterion, data=[(IMAGES, LABELS)], loss=lambda out, y: F.cross_entropy(out, y) * math.nan),
        model,
        what=f"the criterion {name} gives NaN",
        where="family stem",
        fix="look for NaN among its parameters (and in the data and the loss, where it reads them)",
    )


def test_a_criterion_that_gives_infinity():
    """Where families compete, nothing can be divided by it; where they do not, it says what goes last."""

    class Sure:
        normalise = "mean"

        def __call__(self, weight):
            return weight.abs() if weight.dim() == 1 else torch.where(weight == weight.max(), math.inf, weight.abs())

    model = net()
    refuses(
        prune(model, Sure(), ranking="global"),
        model,
        what="the criterion Sure gives infinity, which 'mean' cannot make comparable",
        where="family stem",
        fix="finite scores, or normalise='none'",
    )
    unsure = Sure()
    unsure.normalise = "none"
    for criterion, ranking in ((Sure(), "local"), (unsure, "global")):
        kept = fxprune.prune(model, 0.5, example_inputs=IMAGES, criterion=criterion, ranking=ranking)
        assert model.stem.weight.max() in kept.get_parameter("stem.weight")


@pytest.mark.parametrize("result, got", [(1.0, "a float"), (None, "a NoneType"), (torch.ones(3), "shape (3,)")])
def test_a_criterion_that_gives_something_else(result, got):
    def odd(weight):
        return result

    model = net()
    refuses(
        prune(model, odd),
        model,
        what=f"the criterion odd returns {got} for a parameter of shape (8, 3, 3, 3)",
        where="stem.weight (family stem)",
        fix="return the importance of each element, as a tensor of the parameter's shape",
    )


def test_a_criterion_that_raises():
    def broken(weight):
        raise ValueError("no")

    model = net()
    error = refuses(
        prune(model, broken),
        model,
        what="the criterion broken raises ValueError: no",
        where="stem.weight (family stem)",
        fix="return the importance of each element, as a tensor of the parameter's shape",
    )
    assert isinstance(error.__cause__, ValueError)


@pytest.mark.parametrize(("criterion", "instead"), [(3, "'magnitude'"), (fxprune.Magnitude, "Magnitude()")])
def test_what_is_no_criterion(criterion, instead):
    model = net()
    what = f"criterion must be a name or a callable, not {criterion!r}"
    refuses(prune(model, criterion), model, what=what, fix=f"criterion={instead}, or a function of a parameter")


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_data_that_is_missing_or_empty(criterion):
    model = net()
    name = type(criteria.CRITERIA[criterion]).__name__
    missing = f"the criterion {name} needs data"
    refuses(prune(model, criterion, loss=F.cross_entropy), model, what=missing, fix=BATCHES)
    refuses(
        prune(model, criterion, data=[], loss=F.cross_entropy),
        model,
        what="data holds no batches",
        fix=f"{BATCHES}; one that was read to its end is empty",
    )


def test_a_loader_of_nothing():
    model = net()
    loader = DataLoader(TensorDataset(IMAGES[:0], LABELS[:0]), batch_size=2)
    refuses(
        prune(model, "taylor", data=loader, loss=F.cross_entropy),
        model,
        what="data holds no batches",
        fix=f"{BATCHES}; one that was read to its end is empty",
    )


def test_progress_is_shown_of_each_pass_over_the_data(monkeypatch):
    bars = []

    def bar(items, *said):
        bars.append(said)
        return items

    monkeypatch.setattr("fxprune.criteria.calibration.progress_bar", bar)
    prune(net(), "grasp", data=[(IMAGES, LABELS)], loss=F.cross_entropy)()
    assert bars == [("scoring by GraSP", "batch")] * 2


@pytest.mark.parametrize("data", [3, IMAGES, {"x": IMAGES}])
def test_data_that_is_no_batches(data):
    model = net()
    what = f"data must be batches, not a {type(data).__name__}"
    refuses(prune(model, "wanda", data=data), model, what=what, fix=BATCHES)


@pytest.mark.parametrize("criterion", GRADIENTS)
def test_a_loss_that_is_no_scalar(criterion):
    model = net()
    vector = lambda out, y: torch.stack([F.cross_entropy(out, y)] * 2)  # noqa: E731
    refuses(
        prune(model, criterion, data=[(IMAGES, LABELS)], loss=vector),
        model,
        what="the loss must be a scalar, not a tensor of shape (2,)",
        fix="a mean over the batch: loss(...).mean()",
    )
    refuses(
        prune(model, criterion, data=[(IMAGES, LABELS)], loss=lambda out, y: 0.5),
        model,
        what="the loss must be a scalar, not a float",
        fix="a mean over the batch: loss(...).mean()",
    )


def test_a_loss_that_depends_on_nothing():
    model = net()
    refuses(
        prune(model, "taylor", data=[(IMAGES, LABELS)], loss=lambda out, y: torch.tensor(1.0)),
        model,
        what="the loss does not depend on the model's parameters",
        fix="a loss made of the model's output",
    )


def test_a_loss_that_raises():
    """One batch is passed where a list of them is meant."""

    def paired(out, y):
        return F.cross_entropy(out, y)

    paired.__qualname__ = "paired"
    model = net()
    error = refuses(
        prune(model, "taylor", data=(IMAGES, LABELS), loss=paired),
        model,
        what="the loss raises TypeError: paired() missing 1 required positional argument: 'y'",
        fix="a function of the output and the target of a batch, or of the output alone where data has no targets",
    )
    assert isinstance(error.__cause__, TypeError)


def test_data_that_the_model_does_not_take():
    model = net()
    with untouched(model), pytest.raises(fxprune.PruneError, match="the model raises on a batch of data: RuntimeError: "):
        prune(model, "wanda", data=[IMAGES[:, :2]])()


def test_a_loss_that_is_missing():
    model = net()
    what = "the criterion Taylor needs a loss, and the output of the model holds none"
    fix = "loss=torch.nn.functional.cross_entropy, or labels in the batches of a model that takes them"
    refuses(prune(model, "taylor", data=[(IMAGES, LABELS)]), model, what=what, fix=fix)


def test_data_that_can_be_read_once():
    """GraSP needs it twice."""
    model = net()
    once = iter([(IMAGES, LABELS)])
    refuses(
        prune(model, "grasp", data=once, loss=F.cross_entropy),
        model,
        what="data holds no batches",
        fix=f"{BATCHES}; one that was read to its end is empty",
    )


@pytest.mark.parametrize("option", ["reduce", "normalise"])
def test_options_that_do_not_exist(option):
    table = {"reduce": REDUCE, "normalise": NORMALISE}[option]
    refuses(
        lambda: fxprune.Magnitude(**{option: "best"}),
        what=f"{option} must be one of {', '.join(table)}, not 'best'",
        where="criterion Magnitude",
        fix=f"{option}={next(iter(table))!r}",
    )


def test_bn_scale_where_there_is_none():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(1, 4)
    refuses(
        lambda: fxprune.prune(model, 0.5, example_inputs=x, criterion="bn_scale"),
        model,
        what="the criterion BNScale scores nothing in this model",
        where="Sequential",
        fix="criterion='magnitude'",
    )


class Elementwise:
    """A criterion that may be given blocks of a parameter."""

    elementwise, __name__ = True, "Elementwise"

    def __init__(self, function):
        self.function = function

    def __call__(self, weight):
        return self.function(weight)


def test_blocks_are_scored_as_whole_parameters_are(small, monkeypatch):
    monkeypatch.setattr("fxprune.criteria.scorer.BLOCK", 16)
    monkeypatch.setattr("fxprune.criteria.scorer.SMALL", 1)
    x = batch()[0]
    for p in (1, 2, 3):
        whole = scores(small, x, lambda w, p=p: w.abs() ** p)
        agree(scores(small, x, fxprune.Magnitude(p=p)), whole)
        agree(scores(small, x, Elementwise(lambda w, p=p: w.abs() ** p)), whole)


def fails(weight):
    raise ValueError("no room")


@pytest.mark.parametrize(
    "function, what",
    [
        (fails, "raises ValueError: no room"),
        (lambda w: None, "returns a NoneType for a parameter of shape (64, 32, 3, 3)"),
        (lambda w: w[0], "returns shape (32, 3, 3) for a parameter of shape (64, 32, 3, 3)"),
    ],
)
def test_scores_of_blocks_are_checked_too(function, what):
    """Of a parameter that is large enough not to be scored together with others."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 3))
    assert model[2].weight.numel() > SMALL
    only_large = Elementwise(lambda w: function(w) if w.numel() > SMALL else w.square())
    with pytest.raises(fxprune.PruneError, match=re.escape(what)):
        fxprune.prune(model, 0.5, example_inputs=IMAGES, criterion=only_large)


@pytest.mark.parametrize("method", ["score_dims", "score_units", "finish_layer"])
def test_a_method_of_the_protocol_must_be_callable(method):
    criterion = Elementwise(torch.square)
    setattr(criterion, method, 3)
    model = net()
    refuses(
        lambda: fxprune.prune(model, 0.5, example_inputs=IMAGES, criterion=criterion),
        model,
        what=f"{method} must be a method, not 3",
        where="criterion Elementwise",
    )


@pytest.mark.parametrize("criterion", [name for name in ANYWHERE if name != "bn_scale"])  # that one looks at vectors alone
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_repeated_rows_of_labels_are_scored_as_if_each_were_looked_at(criterion, layer, monkeypatch):
    """The weight of a grouped convolution names an input (of a transposed one, an output) once for every other channel."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 1), nn.GELU(), layer(12, 24, 3, groups=3), nn.GELU(), nn.Flatten(), nn.LazyLinear(4)]
    model, x = nn.Sequential(*layers).double(), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    model(x)
    model.eval()
    found = analyse(model, (x,), {}, CouplingOptions())
    assert any(f.repeats > 1 for labels in found.leaves.values() for f in labels)
    given = (model, x, criterion, [(x, torch.arange(5) % 4)], F.cross_entropy)
    briefly = scores(*given)
    monkeypatch.setattr(Factor, "runs", lambda f: (f.flat, 1))
    agree(scores(*given), briefly)
