"""Bad input: the exact message, and a model that is bit for bit what it was."""

import pytest
import torch
from refusals import IMAGES, Net, net, refuses, untouched
from torch import nn

import fxprune

NAN = float("nan")
IN_RANGE = "ratio=0.5 removes half of every family"
ARGUMENTS = "a tensor, a tuple of positional arguments, or a dict of keyword arguments; (batch,) for what is one argument"
RUNS = "example_inputs on which model(*example_inputs) runs"
WHY = "print(fxprune.couple(model, example_inputs)) says why each family stays"
FROM_INPUT = "is tied to an input of the model (at %stem in stem)"


class Broken(nn.Module):
    """Its inner module cannot run."""

    class Inner(nn.Module):
        def forward(self, x):
            raise KeyError("lost")

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.inner = Broken.Inner()
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


class Picky(nn.Module):
    """The root's own code refuses."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x):
        if x.shape[0] < 3:
            raise ValueError("a batch of at least three")
        return self.layer(x)


@pytest.mark.parametrize("ratio", [1.0, 1, 1.5, -0.1, NAN, float("inf"), "0.5", True, [0.5]])
def test_ratio_out_of_range(ratio):
    model = net()
    what = f"ratio must be a number in [0, 1), not {ratio!r}"
    refuses(lambda: fxprune.prune(model, ratio, example_inputs=IMAGES), model, what=what, fix=IN_RANGE)


def test_ratio_without_a_glob():
    model = net()
    what, fix = "ratio is an empty mapping, which removes nothing", "ratio={'layer1': 0.5}, or ratio=0.5"
    refuses(lambda: fxprune.prune(model, {}, example_inputs=IMAGES), model, what=what, fix=fix)


@pytest.mark.parametrize("verify", ["maybe", None, 2])
def test_verify_that_is_neither(verify):
    model = net()
    what, fix = f"verify must be True, False or 'auto', not {verify!r}", "verify='auto'"
    refuses(lambda: fxprune.prune(model, 0.5, example_inputs=IMAGES, verify=verify), model, what=what, fix=fix)


@pytest.mark.parametrize("freeze", [3, [3], None, ["stem", 3]])
def test_freeze_that_names_nothing(freeze):
    model = net()
    item = freeze[-1] if isinstance(freeze, list) else freeze
    what, fix = f"freeze names {item!r}, which is neither a glob nor a module", "freeze='layer1', or model.layer1"
    refuses(lambda: fxprune.prune(model, 0.5, example_inputs=IMAGES, freeze=freeze), model, what=what, fix=fix)


def test_attention_that_couple_does_not_know():
    model = net()
    what = "attention must be one of heads, queries, dims, not 'y'"
    refuses(lambda: fxprune.couple(model, IMAGES, attention="y"), model, what=what, fix="attention='heads'")


@pytest.mark.parametrize("value", [1.0, -0.1, NAN, "half"])
def test_ratio_of_one_glob_out_of_range(value):
    model = net()
    refuses(
        lambda: fxprune.prune(model, {"stem": 0.5, "body": value}, example_inputs=IMAGES),
        model,
        what=f"ratio['body'] must be a number in [0, 1), not {value!r}",
        fix=IN_RANGE,
    )


@pytest.mark.parametrize("argument", ["ratio", "freeze"])
def test_glob_that_matches_nothing(argument):
    model = net()
    request = {"ratio": {"bdy": 0.5}} if argument == "ratio" else {"freeze": ["stem", "bdy"]}
    refuses(
        lambda: fxprune.prune(model, example_inputs=IMAGES, **request),
        model,
        what=f"the glob 'bdy' in {argument} matches no module",
        fix="one of the names of model.named_modules(), such as body",
    )


def test_glob_that_is_like_nothing():
    model = net()
    refuses(
        lambda: fxprune.prune(model, example_inputs=IMAGES, freeze="zzz*"),
        model,
        what="the glob 'zzz*' in freeze matches no module",
        fix="one of the names of model.named_modules()",
    )


def test_frozen_module_of_another_model():
    model, other = net(), net()
    refuses(
        lambda: fxprune.prune(model, example_inputs=IMAGES, freeze=other.stem),
        model,
        what="freeze names a Conv2d that is not part of the model",
        fix="model.layer1",
    )


def test_example_inputs_missing():
    model = net()
    refuses(
        lambda: fxprune.prune(model),
        model,
        what="example inputs are missing",
        fix="example_inputs=torch.randn(1, 3, 224, 224), or what forward takes",
    )


@pytest.mark.parametrize(
    "inputs, why",
    [
        ((), "missing a required argument: 'x'"),
        ({}, "missing a required argument: 'x'"),
        ((IMAGES, 1.0, IMAGES), "too many positional arguments"),
        ({"img": IMAGES}, "it has no argument 'img'"),
        ({"x": IMAGES, "size": 2}, "it has no argument 'size'"),
    ],
)
def test_example_inputs_of_other_names(inputs, why):
    model = net()
    refuses(
        lambda: fxprune.prune(model, example_inputs=inputs),
        model,
        what=f"the example inputs do not fit forward: {why}",
        where="Net.forward(x, scale=1.0)",
        fix=ARGUMENTS,
    )


def test_example_inputs_on_another_device():
    model = net()
    refuses(
        lambda: fxprune.prune(model, example_inputs=IMAGES.to("meta")),
        model,
        what="the example inputs are on meta, the model on cpu",
        where="Net",
        fix="example_inputs.to('cpu')",
    )


def test_example_inputs_of_another_dtype():
    model = net()
    refuses(
        lambda: fxprune.prune(model, example_inputs=IMAGES.double()),
        model,
        what="the example inputs are torch.float64, the model is torch.float32",
        where="Net",
        fix="example_inputs.to(torch.float32)",
    )


@pytest.mark.parametrize("convert", [torch.Tensor.half, torch.Tensor.double, lambda x: x.to(torch.bfloat16)])
def test_example_inputs_that_the_model_converts(convert):
    class Converts(nn.Sequential):
        def forward(self, x):
            return super().forward(convert(x))

    model = Converts(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(convert(IMAGES).dtype)
    small = fxprune.prune(model, 0.5, example_inputs=IMAGES)
    assert small.verification.ok and small[0].out_channels == 4
    assert torch.equal(small(IMAGES), fxprune.prune(model, 0.5, example_inputs=convert(IMAGES))(IMAGES))


REFUSED = {"channels": torch.zeros(2, 5, 8, 8), "dimensions": torch.zeros(8), "integers": IMAGES.long()}


@pytest.mark.parametrize("inputs", REFUSED.values(), ids=REFUSED.keys())
def test_example_inputs_that_the_first_layer_refuses(inputs):
    model = net()
    with pytest.raises(Exception) as own, torch.no_grad():
        model.stem(inputs)
    error = refuses(
        lambda: fxprune.prune(model, example_inputs=inputs),
        model,
        what=f"the model's own forward raises {type(own.value).__name__}: {own.value}",
        where="%stem (stem)",
        fix=RUNS,
    )
    assert type(error.__cause__) is type(own.value)


def test_forward_that_raises_in_a_submodule():
    model = Broken()
    error = refuses(
        lambda: fxprune.prune(model, example_inputs=torch.zeros(2, 4)),
        model,
        what="the model's own forward raises KeyError: 'lost'",
        where="%inner (inner)",
        fix=RUNS,
    )
    assert isinstance(error.__cause__, KeyError)


def test_forward_that_raises_at_the_root():
    model = Picky()
    error = refuses(
        lambda: fxprune.prune(model, example_inputs=torch.zeros(2, 4)),
        model,
        what="the model's own forward raises ValueError: a batch of at least three",
        where="Picky",
        fix=RUNS,
    )
    assert isinstance(error.__cause__, ValueError)


def test_freeze_that_leaves_nothing_to_prune():
    model = net()
    reasons = f"is an output of the model, or is frozen by freeze='*', or {FROM_INPUT}"
    refuses(
        lambda: fxprune.prune(model, example_inputs=IMAGES, freeze="*"),
        model,
        what=f"nothing in the model can be pruned: every family {reasons}",
        where="Net",
        fix=f"freeze less; {WHY}",
    )


def test_nothing_to_prune():
    model = nn.Sequential()
    model.stem = nn.Conv2d(3, 4, 3)
    reasons = f"is an output of the model, or {FROM_INPUT}"
    refuses(
        lambda: fxprune.prune(model, example_inputs=IMAGES),
        model,
        what=f"nothing in the model can be pruned: every family {reasons}",
        where="Sequential",
        fix=f"release='*' lets outputs shrink; {WHY}",
    )


class Gated(nn.Module):
    """What each of its layers returns is weighted by one entry of a gate, and goes with it alone or not at all."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.layers = nn.ModuleList(nn.Linear(6, 5) for _ in range(3))

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers], -1) @ self.gate(x).softmax(-1).unsqueeze(-1)


def test_families_of_a_single_unit():
    model, x = Gated(), torch.rand(2, 6)
    refuses(
        lambda: fxprune.prune(model, example_inputs=x),
        model,
        what="nothing in the model can be pruned: every family has a single unit, or is tied to an input of the model"
        " (at %gate in gate)",
        where="Gated",
        fix=WHY,
    )
    coupling = fxprune.couple(model, x)
    assert not coupling.prunable
    assert [f.name for f in coupling.frozen if f.frozen == "has a single unit"] == ["layers.0", "layers.1", "layers.2"]


def test_no_parameters():
    model = nn.ReLU()
    refuses(
        lambda: fxprune.prune(model, example_inputs=IMAGES),
        model,
        what="nothing in the model can be pruned",
        where="ReLU",
        fix=WHY,
    )


def test_round_to_larger_than_every_family():
    model = net()
    refuses(
        lambda: fxprune.prune(model, example_inputs=IMAGES, round_to=9),
        model,
        what="round_to=9 is larger than every family (the largest has 8 channels)",
        fix="round_to<=8",
    )


@pytest.mark.parametrize("round_to", [0, -4, 1.5, "8", True, None])
def test_round_to_is_no_positive_integer(round_to):
    model = net()
    refuses(
        lambda: fxprune.prune(model, example_inputs=IMAGES, round_to=round_to),
        model,
        what=f"round_to must be a positive integer, not {round_to!r}",
        fix="round_to=8",
    )


def test_attention_of_another_kind():
    model = net()
    refuses(
        lambda: fxprune.prune(model, example_inputs=IMAGES, attention="x"),
        model,
        what="attention must be one of heads, queries, dims, not 'x'",
        fix="attention='heads'",
    )


def test_unknown_criterion():
    model = net()
    refuses(
        lambda: fxprune.prune(model, example_inputs=IMAGES, criterion="luck"),
        model,
        what="there is no criterion 'luck'",
        fix=f"one of {', '.join(sorted(fxprune.criteria.CRITERIA))}",
    )


def test_model_on_meta():
    model = Net().to("meta")
    for inputs in (IMAGES, IMAGES.to("meta")):
        refuses(
            lambda: fxprune.prune(model, example_inputs=inputs),
            model,
            what="the model is on the meta device: it has no weights to score or to cut",
            where="Net",
            fix="model.to_empty(device='cpu') and load its weights, then prune; or criterion='random', unverified",
        )


@pytest.mark.parametrize("options", [{"verify": True}, {"latency": 0.5}, {"same_class": True}], ids=lambda o: next(iter(o)))
def test_model_on_meta_that_would_have_to_run(options):
    model = Net().to("meta")
    refuses(
        lambda: fxprune.prune(model, example_inputs=IMAGES, criterion="random", **options),
        model,
        what="the model is on the meta device: it has no weights to score or to cut",
        where="Net",
        fix="model.to_empty(device='cpu') and load its weights, then prune; or criterion='random', unverified",
    )


@pytest.mark.parametrize("call", [fxprune.prune, fxprune.couple], ids=["prune", "couple"])
@pytest.mark.parametrize("model, kind", [(len, "builtin_function_or_method"), (nn.Linear, "type")])
def test_model_that_is_no_module(call, model, kind):
    refuses(
        lambda: call(model, example_inputs=IMAGES),
        what=f"model is of type {kind}, not a torch.nn.Module",
        fix="pass the module itself",
    )


def test_success_leaves_everything_alone_too():
    model = net()
    with untouched(model):
        pruned = fxprune.prune(model, example_inputs=IMAGES, verify=True)
        fxprune.couple(model, IMAGES)
        fxprune.verify(model, pruned, IMAGES)
        fxprune.report(model, pruned, IMAGES)
        fxprune.plan_of(pruned).apply(model)


def test_a_ratio_too_small_for_any_unit():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(2, 4)
    refuses(
        lambda: fxprune.prune(model, 0.25, example_inputs=x),
        model,
        what="nothing in the model can be pruned by so little: no family has a whole unit to lose",
        where="Sequential",
        fix="a larger ratio, or a smaller round_to",
    )


class Grows(nn.Module):
    """Has a result written into an empty tensor, which takes on its shape: no rule follows that."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        into = x.new_empty(0)
        torch.mul(x[:, :, 0], 2, out=into)
        return self.b(self.a(x).relu()) + into.shape[0]


def test_what_the_compiler_cannot_follow(monkeypatch):
    monkeypatch.delenv("FXPRUNE_STRICT", raising=False)  # which lets errors of the compiler's own out
    with pytest.raises(fxprune.PruneError) as raised:
        fxprune.prune(Grows().eval(), example_inputs=torch.randn(3, 4, 8))
    assert raised.value.what.startswith("the model's program cannot be followed: ValueError: ")
    assert raised.value.where == "Grows" and raised.value.fix.startswith("report it with the model")


TABLE = torch.ones(3).numpy()
SHORTENED = f"1{'0' * 17}...{'0' * 19}"  # of a number of 401 digits


@pytest.mark.parametrize(
    "request_, what",
    [
        ({"ratio": {None: 0.5}}, "ratio names None, which is no glob over module names"),
        ({"ratio": 10**400}, f"ratio must be a number in [0, 1), not {SHORTENED}"),
        ({"floor": 10**400}, f"floor must be a number in [0, 1], not {SHORTENED}"),
        ({"ranking": TABLE}, "ranking must be one of local, global, isomorphic, not a ndarray of shape (3,)"),
        ({"verify": TABLE}, "verify must be True, False or 'auto', not a ndarray of shape (3,)"),
        ({"scopes": {"early": 3}}, "scopes must name globs, not {'early': 3}"),
    ],
)
def test_arguments_of_other_types(request_, what):
    """Each is named, and none ends in an error of Python's."""
    with pytest.raises(fxprune.PruneError) as caught:
        fxprune.prune(net(), example_inputs=IMAGES, **request_)
    assert caught.value.what == what and caught.value.fix
