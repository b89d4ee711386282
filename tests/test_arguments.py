"""One way to ask: what is taken in which place and form, and what is said of requests that mean nothing."""

import ast
import inspect
import subprocess
import sys
import typing
import warnings
from collections import UserDict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from graphs import GRAPHS
from refusals import IMAGES, Net, untouched
from torch import nn

import fxprune
from fxprune import Plan, PruneError, PruneWarning
from fxprune.arguments import ELSEWHERE
from fxprune.criteria.catalog import CRITERIA, OTHER_NAMES, CriterionName
from fxprune.selection.budgets import KINDS
from fxprune.selection.options import Asked, AskedOfPrune, BudgetName, Ranking

torch.manual_seed(0)
ARRAY = IMAGES.numpy()
FIT = "example inputs come after it"
SHARE = "keeps half of the original"
CONV = "the model's own forward raises TypeError: conv2d() received an invalid combination of arguments - got ({}, Parameter, "
CONV += "Parameter, tuple, tuple, tuple, int), but expected one of:"
KEEPS = "one of ratio, "  # no nearest name: the list


class Seq(nn.Module):
    """Two layers of which only the first one's outputs may go."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


def prune(*args, **asked):
    return lambda m: fxprune.prune(m, *args, example_inputs=IMAGES, **asked)


# what is asked for, of a `Net`; what is said; a piece of the fix
ODD = {
    # places
    "inputs for a ratio": (lambda m: fxprune.prune(m, IMAGES), f"ratio is a Tensor: {FIT}", "prune(model, 0.5, x)"),
    "a tuple": (lambda m: fxprune.prune(m, (IMAGES,)), f"ratio is a tuple: {FIT}", "prune(model, 0.5, x)"),
    "a list": (lambda m: fxprune.prune(m, [IMAGES]), f"ratio is a list: {FIT}", "prune(model, 0.5, x)"),
    "a dict": (lambda m: fxprune.prune(m, {"x": IMAGES}), f"ratio is a dict: {FIT}", "prune(model, 0.5, x)"),
    "a mapping": (lambda m: fxprune.prune(m, UserDict(x=IMAGES)), f"ratio is a UserDict: {FIT}", "prune(model, 0.5, x)"),
    "an array": (lambda m: fxprune.prune(m, ARRAY), f"ratio is a ndarray: {FIT}", "prune(model, 0.5, x)"),
    "inputs in Pruner": (lambda m: fxprune.Pruner(m, IMAGES), f"ratio is a Tensor: {FIT}", "prune(model, 0.5, x)"),
    "no model": (
        lambda m: fxprune.prune(),
        "prune: missing a required argument: 'model'",
        "prune(model, ratio, example_inputs",
    ),
    "too many": (lambda m: fxprune.prune(m, 0.5, IMAGES, 8), "prune: too many positional arguments", "prune(model, ratio,"),
    "given twice": (
        prune(0.5, IMAGES),
        "prune: example_inputs is a Tensor of shape (2, 3, 8, 8) by its place, and given by name, too",
        "prune(model, ratio,",
    ),
    "inputs second, a ratio by name": (
        lambda m: fxprune.prune(m, IMAGES, ratio=0.5),
        "prune: ratio is a Tensor of shape (2, 3, 8, 8) by its place, and given by name, too",
        "prune(model, ratio, example_inputs, ...)",
    ),
    "a name for repair": (lambda m: fxprune.repair(m, m, zzz=1), "repair has no argument 'zzz'", "one of model, pruned, data"),
    "a loader for repair": (
        lambda m: fxprune.repair(m, m, dataloader=[IMAGES]),
        "repair has no argument 'dataloader'",
        "here it is data=[(images, labels), ...]",
    ),
    "no data for calibrate": (fxprune.calibrate, "calibrate: missing a required argument: 'data'", "calibrate(model, data,"),
    "no file for save": (fxprune.save, "save: missing a required argument: 'path'", "save(pruned, path)"),
    "a name for load": (lambda m: fxprune.load("a", m, strict=1), "load has no argument 'strict'", "one of path, model"),
    "a name for group": (
        lambda m: fxprune.couple(m, IMAGES).group("stem", channels=[1]),
        "Coupling.group has no argument 'channels'",
        "one of layer, indices",
    ),
    "a name for apply": (
        lambda m: fxprune.couple(m, IMAGES).group("stem", [1]).apply(inplace=True),
        "Group.apply has no argument 'inplace'",
        "one of verify, same_class",
    ),
    # what is no input
    "a shape": (
        lambda m: fxprune.prune(m, 0.5, (2, 3, 8, 8)),
        "the example inputs do not fit forward: too many positional arguments",
        "torch.randn(1",
    ),
    "a shape in a list": (
        lambda m: fxprune.prune(m, 0.5, [2, 3, 8, 8]),
        CONV.format("list"),
        "torch.randn(1, 3, 224, 224): list holds none",
    ),
    "a loader": (
        lambda m: fxprune.couple(m, torch.utils.data.DataLoader([1])),
        CONV.format("DataLoader"),
        "torch.randn(1, 3, 224, 224): DataLoader holds none",
    ),
    "a batch with labels": (
        lambda m: fxprune.couple(m, [IMAGES, torch.zeros(2), torch.zeros(2)]),
        CONV.format("list"),
        "the list of 3 is given as one argument",
    ),
    "not a number": (
        lambda m: fxprune.prune(m, 0.5, IMAGES * float("nan")),
        "the pruned model cannot be compared: the original itself returns nothing but NaN",
        "verify=False",
    ),
    "none for prune": (lambda m: fxprune.prune(m, 0.5), "example inputs are missing", "example_inputs=torch.randn"),
    "none for couple": (fxprune.couple, "example inputs are missing", "example_inputs=torch.randn"),
    "a ratio by place": (
        lambda m: fxprune.feasible(m, IMAGES, 0.5),
        "feasible: too many positional arguments",
        "feasible(model,",
    ),
    "no pruned model": (fxprune.report, "report: missing a required argument: 'pruned'", "report(model, pruned,"),
    "no second model": (fxprune.verify, "verify: missing a required argument: 'pruned'", "verify(model, pruned,"),
    "a module alone": (
        lambda m: fxprune.prune(m, m.stem, IMAGES),
        "ratio is a Conv2d, not a share",
        "ratio={model.layer1: 0.5}",
    ),
    # inputs
    "NumPy's array": (
        lambda m: fxprune.prune(m, 0.5, ARRAY),
        "the example inputs hold an array of NumPy's, not a tensor",
        "from_numpy",
    ),
    "in a tuple": (
        lambda m: fxprune.couple(m, (ARRAY,)),
        "the example inputs hold an array of NumPy's, not a tensor",
        "from_numpy",
    ),
    "in a dict": (
        lambda m: fxprune.feasible(m, {"x": ARRAY}),
        "the example inputs hold an array of NumPy's, not a tensor",
        "from_numpy",
    ),
    "deep inside": (
        lambda m: fxprune.couple(m, ([[ARRAY]],)),
        "the example inputs hold an array of NumPy's, not a tensor",
        "from_numpy",
    ),
    "in a batch": (
        prune(criterion="taylor", data=[(ARRAY, torch.zeros(2))], loss=nn.functional.cross_entropy),
        "a batch of data holds an array of NumPy's, not a tensor",
        "from_numpy",
    ),
    "one batch alone": (
        prune(criterion="wanda", data=UserDict(x=IMAGES)),
        "data must be batches, not a UserDict",
        "data=[(images, labels), ...]",
    ),
    # numbers
    "NumPy's ratio": (prune(np.float32(1.5)), "ratio must be a number in [0, 1), not 1.5", "ratio=0.5"),
    "NumPy's truth": (prune(np.True_), f"ratio must be a number in [0, 1), not {np.True_!r}", "ratio=0.5"),
    "a tensor's truth": (prune(torch.tensor(True)), "ratio must be a number in [0, 1), not True", "ratio=0.5"),
    "complex": (prune(0.5 + 0j), "ratio must be a number in [0, 1), not (0.5+0j)", "ratio=0.5"),
    "zero": (prune(0), "ratio=0 removes nothing", "ratio=0.5"),
    "zero as a float": (prune(0.0), "ratio=0.0 removes nothing", "ratio=0.5"),
    "zero of NumPy": (prune(np.float64(0)), "ratio=0.0 removes nothing", "ratio=0.5"),
    "zero in feasible": (lambda m: fxprune.feasible(m, IMAGES, ratio=0), "ratio=0 removes nothing", "ratio=0.5"),
    "zero everywhere": (prune({"stem": 0, "body": 0.0}), "every share in ratio is 0, which removes nothing", "ratio={'layer1'"),
    "zero by module": (lambda m: prune({m.stem: 0})(m), "every share in ratio is 0, which removes nothing", "ratio={'layer1'"),
    "a class for a module": (
        prune({nn.Linear: 0.5}),
        f"ratio names {nn.Linear!r}, which is no glob over module names",
        "ratio={'",
    ),
    "another's module": (
        prune({Net().stem: 0.5}),
        "ratio names a Conv2d that is not part of the model",
        "model.layer1",
    ),
    "a module's share": (
        lambda m: prune({m.stem: "half"})(m),
        "ratio['stem'] must be a number in [0, 1), not 'half'",
        "ratio=0.5",
    ),
    "a share of a size": (prune(round_to=np.float32(8.5)), "round_to must be a positive integer, not 8.5", "round_to=8"),
    "no size": (prune(round_to=torch.tensor(0)), "round_to must be a positive integer, not 0", "round_to=8"),
    "NumPy's floor": (prune(floor=np.float64(2)), "floor must be a number in [0, 1], not 2.0", "floor=0.1"),
    "truth for a floor": (prune(floor=np.True_), f"floor must be a number in [0, 1], not {np.True_!r}", "floor=0.1"),
    # budgets
    "a unit in small": (prune(macs="2g"), "macs must be a positive number, or one with a unit, not '2g'", "k, M, G, T"),
    "a unit of two words": (
        prune(macs="2 GMACs"),
        "macs must be a positive number, or one with a unit, not '2 GMACs'",
        "k, M, G, T",
    ),
    "nothing of it": (prune(macs="0G"), "macs must be a positive number, or one with a unit, not '0G'", SHARE),
    "below nothing": (prune(params="-1M"), "params must be a positive number, or one with a unit, not '-1M'", SHARE),
    "percent": (prune(params="50%"), "params must be a positive number, or one with a unit, not '50%'", "params=0.5"),
    "a share as a text": (prune(params="0.5"), "params must be a positive number, or one with a unit, not '0.5'", "params=0.5"),
    "bytes of parameters": (
        prune(params="5MB"),
        "params must be a positive number, or one with a unit, not '5MB'",
        "k, M, G, T",
    ),
    "an empty text": (
        prune(memory=""),
        "memory must be a positive number, or one with a unit, not ''",
        "kB, MB, GB, KiB, MiB, GiB",
    ),
    "a mixed unit": (
        prune(memory="100KB"),
        "memory must be a positive number, or one with a unit, not '100KB'",
        "kB, MB, GB, KiB",
    ),
    "digits of others": (prune(memory="１MB"), "memory must be a positive number, or one with a unit, not '１MB'", "kB, MB"),
    "truth for memory": (prune(memory=np.True_), f"memory must be a positive number, not {np.True_!r}", "memory=0.5"),
    "time without a unit": (prune(latency=20), "latency=20 has no unit", "latency='20ms' or '20s'"),
    "one of what": (prune(latency=1), "latency=1 has no unit", "latency='1ms' or '1s'"),
    "NumPy's time": (prune(latency=np.int64(20)), f"latency={np.int64(20)!r} has no unit", "latency='20ms' or '20s'"),
    "a fraction of what": (prune(latency=1.5), "latency=1.5 has no unit", "latency='1.5ms' or '1.5s'"),
    "time as a text": (prune(latency="20"), "latency must be a share up to 1, or a time, not '20'", "latency='20ms'"),
    "another unit": (prune(latency="20 min"), "latency must be a share up to 1, or a time, not '20 min'", "latency='20ms'"),
    "no time": (prune(latency="0ms"), "latency must be a share up to 1, or a time, not '0ms'", "latency='20ms'"),
    "a kind nearly right": (prune(budget={"mac": 0.5}), "there is no budget of 'mac'", "did you mean 'macs'?"),
    "a kind's unit": (
        prune(budget={"memory": "1 PB"}),
        "memory must be a positive number, or one with a unit, not '1 PB'",
        "memory=0.5 keeps half",
    ),
    "both": (prune(0.5, params="1k"), "ratio and params are both given", "one of ratio, params"),
    "no kind": (prune(budget={}), "budget is an empty mapping, which says nothing", "budget={'params': 0.5}"),
    # flags
    "a word for a flag": (prune(0.5, inplace="no"), "inplace must be True or False, not 'no'", "inplace=True"),
    "a number for a flag": (prune(0.5, same_class=1), "same_class must be True or False, not 1", "same_class=True"),
    # names
    "a class for a criterion": (
        prune(criterion=fxprune.Magnitude),
        f"criterion must be a name or a callable, not {fxprune.Magnitude!r}",
        "criterion=Magnitude()",
    ),
    "nearly magnitude": (
        prune(criterion="magnitud"),
        "there is no criterion 'magnitud'",
        "did you mean 'magnitude'? one of bn_scale",
    ),
    "nearly taylor": (prune(criterion="taylr"), "there is no criterion 'taylr'", "did you mean 'taylor'? one of"),
    "in capitals": (prune(criterion="Taylor"), "there is no criterion 'Taylor'", "did you mean 'taylor'? one of"),
    "l1": (prune(criterion="l1"), "there is no criterion 'l1'", "did you mean fxprune.Magnitude(p=1)? one of"),
    "L2": (prune(criterion="L2"), "there is no criterion 'L2'", "did you mean 'magnitude'? one of"),
    "slimming": (prune(criterion="slimming"), "there is no criterion 'slimming'", "did you mean 'bn_scale'? one of"),
    "globl": (
        prune(ranking="globl"),
        "ranking must be one of local, global, isomorphic, not 'globl'",
        "did you mean 'global'?",
    ),
    "head": (prune(attention="head"), "attention must be one of heads, queries, dims, not 'head'", "did you mean 'heads'?"),
    "a penalty": (
        lambda m: fxprune.Pruner(m, 0.5, IMAGES, regularizer="grouplasso"),
        "there is no regularizer 'grouplasso'",
        "did you mean 'group_lasso'? one of",
    ),
    "a schedule": (
        lambda m: fxprune.Pruner(m, 0.5, IMAGES, schedule="cubc"),
        "there is no schedule 'cubc'",
        "did you mean 'cubic'?",
    ),
    # arguments of other tools, and misspelled ones
    **{
        name: (prune(**{name: 1}), f"prune has no argument {name!r}", said)
        for name, said in {
            "pruning_ratio": "here it is ratio=0.5",
            "ch_sparsity": "here it is ratio=0.5",
            "pruning_ratio_dict": "here it is ratio={model.layer1: 0.5}",
            "max_pruning_ratio": "here it is floor=0.1, the share that stays",
            "ignored_layers": "here it is freeze_outputs=[model.fc] where only the outputs of a layer must stay",
            "global_pruning": "here it is ranking='global'",
            "isomorphic": "here it is ranking='isomorphic'",
            "importance": "here it is criterion='magnitude'",
            "iterative_steps": "here it is fxprune.Pruner(model, ratio, example_inputs, steps=5)",
            "unwrapped_parameters": "nothing to pass: it is found",
            "prune_head_dims": "here it is attention='dims'",
            "dummy_input": "here it is example_inputs=",
            "target_flops": "here it is macs=0.5, or macs='2G'",
            "forward_fn": "here it is example_inputs={'name': value}",
            "output_transform": "nothing to pass: outputs may be nested",
            "speed_up": "here it is macs=0.5",
            "train_loader": "here it is data=[(images, labels), ...]",
            "config_list": "here it is ratio={model.layer1: 0.5}",
            "input_size": "here it is example_inputs=torch.randn(1, 3, 224, 224)",
            "rato": "did you mean 'ratio'? one of model, ratio, example_inputs",
            "zzz": "one of model, ratio, example_inputs",
        }.items()
    },
    "couple's": (lambda m: fxprune.couple(m, IMAGES, freez="a"), "couple has no argument 'freez'", "did you mean 'freeze'?"),
    "couple's ratio": (
        lambda m: fxprune.couple(m, IMAGES, ratio=0.5),
        "couple has no argument 'ratio'",
        "one of model, example_inputs",
    ),
    "feasible's": (
        lambda m: fxprune.feasible(m, IMAGES, ch_sparsity=1),
        "feasible has no argument 'ch_sparsity'",
        "here it is ratio=0.5",
    ),
    "feasible's own": (lambda m: fxprune.feasible(m, IMAGES, verify=True), "feasible has no argument 'verify'", "one of model"),
    "what couple lacks": (
        lambda m: fxprune.couple(m, IMAGES, pruning_ratio=1),
        "couple has no argument 'pruning_ratio'",
        "here it is ratio=0.5, of fxprune.prune",
    ),
    "sensitivity's": (
        lambda m: fxprune.sensitivity(m, IMAGES, len, importance=1),
        "sensitivity has no argument 'importance'",
        "here it is criterion=",
    ),
    "Pruner's": (
        lambda m: fxprune.Pruner(m, 0.5, IMAGES, iterative_steps=5),
        "Pruner has no argument 'iterative_steps'",
        "steps=5",
    ),
    "report's": (lambda m: fxprune.report(m, m, inputs=1), "report has no argument 'inputs'", "here it is example_inputs="),
    "verify's": (
        lambda m: fxprune.verify(m, m, dummy_inputs=1),
        "verify has no argument 'dummy_inputs'",
        "here it is example_inputs=",
    ),
    # what has no effect
    "an output": (prune({"head": 0.5}), "'head' in ratio changes nothing: head is an output of the model", "may lose outputs"),
    "by module": (
        lambda m: prune({m.head: 0.5})(m),
        "'head' in ratio changes nothing: head is an output of the model",
        "may lose",
    ),
    "no channels": (prune({"drop": 0.5}), "'drop' in ratio changes nothing: no channels are made there", "may lose outputs"),
    "an input": (
        prune({"stem:1": 0.5}),
        "'stem:1' in ratio changes nothing: stem:1 is tied to an input of the model (at %stem in stem)",
        "may lose outputs",
    ),
    "what is frozen": (
        prune({"stem": 0.5}, freeze="stem"),
        "'stem' in ratio changes nothing: stem is frozen by freeze='stem'",
        "may lose outputs",
    ),
    "an output, in steps": (
        lambda m: fxprune.Pruner(m, {"head": 0.5}, IMAGES, steps=2),
        "'head' in ratio changes nothing: head is an output of the model",
        "may lose outputs",
    ),
    "too little of all": (
        prune(0.01, ranking="global"),
        "nothing in the model can be pruned by so little: no family has a whole unit to lose",
        "a larger ratio",
    ),
    # families and layers
    "a dimension too many": (prune(freeze="stem:7"), "the glob 'stem:7' in freeze matches no module", "such as stem"),
    "a family too many": (prune(freeze="stem#2"), "'stem#2' in freeze names no family of the model", "one of stem"),
    "a family of nothing": (prune({"stm:0": 0.5}), "the glob 'stm:0' in ratio matches no module", "such as stem"),
    "outputs of a number": (
        prune(freeze_outputs=3),
        "freeze_outputs names 3, which is neither a glob nor a module",
        "freeze_outputs='layer1'",
    ),
    "outputs of no module": (prune(freeze_outputs="hed"), "the glob 'hed' in freeze_outputs matches no module", "such as head"),
    "outputs of nothing": (
        lambda m: prune(freeze_outputs=m.drop)(m),
        "freeze_outputs names 'Dropout', which has no parameters",
        "freeze_outputs=[model.fc]",
    ),
}


@pytest.mark.parametrize(("call", "what", "fix"), ODD.values(), ids=ODD.keys())
def test_odd_requests(call, what, fix):
    """Each is refused by one error that says what is wrong and what to write; the model is as it was."""
    model = Net().eval()
    with untouched(model), pytest.raises(PruneError) as caught:
        call(model)
    assert caught.value.what == what
    assert fix in caught.value.fix


def test_there_are_enough_of_them():
    assert len(ODD) >= 60


def test_other_tools_arguments_are_none_of_ours():
    ours = {
        p for f in (fxprune.prune, fxprune.Pruner, fxprune.couple, fxprune.sensitivity) for p in inspect.signature(f).parameters
    }
    assert not ours & ELSEWHERE.keys()
    assert not OTHER_NAMES.keys() & CRITERIA.keys()


# -- places and forms -----------------------------------------------------------------------------------------------------


def test_one_order_everywhere():
    model, x = Net().eval(), IMAGES
    small = fxprune.prune(model, 0.5, x)
    assert (
        fxprune.prune(model, 0.5, example_inputs=x).plan
        == small.plan
        == fxprune.prune(model=model, ratio=0.5, example_inputs=x).plan
    )
    assert fxprune.Pruner(model, 0.5, x).step().plan == small.plan
    assert fxprune.prune(model, example_inputs=x, params=0.5).plan == fxprune.prune(model, None, x, params=0.5).plan
    assert fxprune.couple(model, x).to_dict() == fxprune.couple(model, example_inputs=x).to_dict()
    assert fxprune.feasible(model, x) == fxprune.feasible(model, example_inputs=x)
    assert str(fxprune.report(model, small, x)) == str(fxprune.report(model, small, example_inputs=x))
    assert fxprune.verify(model, small, x).ok and fxprune.verify(model, small, example_inputs=x).ok
    score = lambda m: float(m(x).sum())  # noqa: E731
    assert fxprune.sensitivity(model, x, score) == fxprune.sensitivity(model, example_inputs=x, evaluate=score)


class Two(nn.Module):
    """Takes two tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, y):
        return self.b((self.a(x) + y).relu())


class Listed(Two):
    """Takes a list of tensors, and says so."""

    def forward(self, xs: list[torch.Tensor], scale: float = 1.0):
        return self.b(self.a(torch.cat(xs)).relu()) * scale


class Unsaid(Two):
    """Takes a list of tensors, and does not say so."""

    def forward(self, xs):
        return self.b(self.a(xs[0] + xs[1]).relu())


X, Y = torch.randn(32, 4), torch.randn(32, 1)


@pytest.mark.parametrize(
    ("model", "given", "plain"),
    [
        (Two(), [X, Y], (X, Y)),
        (Two(), UserDict(x=X, y=Y), {"x": X, "y": Y}),
        (Seq(), [X], (X,)),
        (Listed(), [X], ([X],)),
        (Listed(), [X, X], ([X, X],)),
        (Unsaid(), [X, X], ([X, X],)),
        (Unsaid(), ([X, X],), ([X, X],)),
    ],
    ids=["two", "mapping", "one", "a list", "a longer list", "two for one", "told so"],
)
def test_forms_of_inputs(model, given, plain):
    model = model.eval()
    small = fxprune.prune(model, 0.5, given)
    assert small.plan == fxprune.prune(model, 0.5, plain).plan and small.verification.ok
    assert small.plan.slices
    assert fxprune.verify(model, small, given).ok
    assert Plan.from_json(small.plan.to_json()).apply(model).plan == small.plan


@pytest.mark.parametrize(
    ("batch", "pair"),
    [(UserDict(x=X, y=Y), False), (UserDict(x=X, y=Y), True), ({"x": X, "y": Y}, False), ([X, Y], True)],
    ids=["a mapping", "a mapping and a target", "a dict", "a list and a target"],
)
def test_forms_of_batches(batch, pair):
    model = Two().eval()
    seen = []

    def loss(out, target):
        seen.append(target)
        return out.square().mean()

    data = [(batch, torch.ones(32))] if pair else [batch]
    small = fxprune.prune(model, 0.5, (X, Y), criterion="taylor", data=data, loss=loss)
    plain = fxprune.prune(model, 0.5, (X, Y), criterion="taylor", data=[((X, Y), 0)], loss=loss)
    assert small.plan == plain.plan
    assert torch.equal(seen[0], torch.ones(32)) if pair else seen[0].keys() == {"x", "y"}
    assert fxprune.repair(model, small, data, held_out=0).meta["repair"].done


@pytest.mark.parametrize(
    "half", [np.float32(0.5), np.float64(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)], ids=repr
)
def test_numbers_of_others(half):
    model = Net().eval()
    wanted = fxprune.prune(model, 0.5, IMAGES).plan
    assert fxprune.prune(model, half, IMAGES).plan == wanted
    assert fxprune.prune(model, {"*": half}, IMAGES).plan == wanted
    budget = fxprune.prune(model, example_inputs=IMAGES, params=0.5, floor=0.5).plan
    assert fxprune.prune(model, example_inputs=IMAGES, params=half, floor=half).plan == budget


@pytest.mark.parametrize("four", [np.int64(4), np.uint16(4), torch.tensor(4), np.array(4)], ids=repr)
def test_integers_of_others(four):
    model = Net().eval()
    assert fxprune.prune(model, 0.4, IMAGES, round_to=four).plan == fxprune.prune(model, 0.4, IMAGES, round_to=4).plan
    assert len(fxprune.Pruner(model, 0.5, IMAGES, steps=four)._shares) == 4
    assert (
        fxprune.prune(model, example_inputs=IMAGES, params=four * 100).plan
        == fxprune.prune(model, example_inputs=IMAGES, params=400).plan
    )


@pytest.mark.parametrize(
    ("asked", "absolute"),
    [
        ({"params": "0.4k"}, {"params": 400}),
        ({"params": "0.0004M"}, {"params": 400}),
        ({"macs": "30 k"}, {"macs": 30_000}),
        ({"macs": ".00003G"}, {"macs": 30_000}),
        ({"memory": "1.5kB"}, {"memory": 1500}),
        ({"memory": "1.5KiB"}, {"memory": 1536}),
        ({"memory": "0.0015MB"}, {"memory": 1500}),
        ({"memory": "1500 B"}, {"memory": 1500}),
        ({"budget": {"params": "0.4k"}}, {"params": 400}),
    ],
    ids=str,
)
def test_amounts_with_units(asked, absolute):
    model = Net().eval()
    found = fxprune.prune(model, example_inputs=IMAGES, **asked)
    assert found.plan == fxprune.prune(model, example_inputs=IMAGES, **absolute).plan
    assert found.plan.slices


def test_units_are_what_they_are_called():
    assert [KINDS["macs"].absolute(f"2{u}") for u in "kMGT"] == [2e3, 2e6, 2e9, 2e12]
    assert [KINDS["memory"].absolute(f"2{u}iB") for u in "KMG"] == [2 * 1024, 2 * 1024**2, 2 * 1024**3]
    assert [KINDS["memory"].absolute(f"2{u}B") for u in "kMG"] == [2e3, 2e6, 2e9]
    assert [KINDS["latency"].absolute(f"2{u}") for u in ("s", "ms")] == [2, 0.002]


def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None, num_classes=10).eval()


PICTURE = torch.randn(1, 3, 64, 64)


def widths(model):
    return {n: m.weight.shape[0] for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def test_ratios_by_module_and_by_glob():
    model = resnet()
    asked = {model.layer1[0].conv1: 0.25, "layer1": 0.5, model.layer2: 0.75}
    named = {"layer1.0.conv1": 0.25, "layer1": 0.5, "layer2": 0.75}
    found = widths(fxprune.prune(model, asked, PICTURE, verify=False))
    assert found == widths(fxprune.prune(model, named, PICTURE, verify=False))
    assert (found["layer1.0.conv1"], found["layer1.1.conv1"], found["layer2.0.conv1"], found["layer3.0.conv1"]) == (
        48,
        32,
        32,
        256,
    )
    everything = fxprune.prune(model, {model: 0.5}, PICTURE, verify=False)
    assert widths(everything) == widths(fxprune.prune(model, 0.5, PICTURE, verify=False))


# -- names of families ----------------------------------------------------------------------------------------------------


def models():
    torch.manual_seed(0)
    short = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    short.layer3 = short.layer4 = nn.Identity()  # which have what the second stage has
    short.fc = nn.Linear(128, 10)
    yield "resnet", short.eval(), PICTURE, {}
    block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    yield "encoder", block, torch.randn(2, 5, 16), {}
    yield "encoder in dims", block, torch.randn(2, 5, 16), {"attention": "dims"}
    for name in ("shuffle", "cat", "chunk"):
        found = next((g for g in sorted(GRAPHS) if name in g), None)
        assert found is not None, name
        yield found, *GRAPHS[found].make(), {}


@pytest.mark.parametrize(("name", "model", "x", "asked"), [pytest.param(*m, id=m[0]) for m in models()])
def test_what_is_printed_can_be_typed(name, model, x, asked):
    found = fxprune.couple(model, x, **asked)
    names = [f.name for f in found.families]
    assert len(set(names)) == len(names)
    for family in found.prunable:
        for text in dict.fromkeys([family.name, f"{family.members[0][0]}:{family.members[0][1]}"]):
            frozen = {f.name: f.frozen for f in fxprune.couple(model, x, freeze=text, **asked).families}
            assert frozen[family.name].startswith(f"is frozen by freeze={text!r}")
        if "#" in family.name or ":" in family.name:  # a layer's name freezes all of the layer
            now = {f.name: f.frozen for f in fxprune.couple(model, x, freeze=family.name, **asked).families}
            assert [n for n in names if now[n] and not next(f for f in found.families if f.name == n).frozen] == [family.name]
        for request in ({"ratio": {family.name: 0.5}}, {"ratio": {"it": 0.5}, "scopes": {"it": family.name}}):
            try:
                small = fxprune.prune(model, example_inputs=x, verify=False, **request, **asked)
            except PruneError as error:  # rows of one length that it shares with others
                reasons = ("so little", "changes nothing: what it names", "keeps as many units as")
                assert any(reason in error.what for reason in reasons)
                continue
            shrunk = {f.family.name for f in fxprune.report(model, small, x).shrunk}
            assert family.name in shrunk


class Halves(nn.Module):
    """The results of one layer go two ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(8, 2), nn.Linear(4, 2)

    def forward(self, x):
        y = self.a(x).relu()
        return self.b(y[:, :8]) + self.c(y[:, 8:])


def test_families_of_one_layer_are_told_apart():
    model, x = Halves().eval(), torch.randn(2, 4)
    assert [f.name for f in fxprune.couple(model, x).prunable] == ["a#1", "a#2"]
    small = fxprune.prune(model, {"a#2": 0.5}, x)
    assert (small.get_submodule("b").in_features, small.get_submodule("c").in_features) == (8, 2)
    with pytest.warns(PruneWarning, match="'a#3' in ratio changes nothing: no channels are made there"):
        fxprune.prune(model, {"a#2": 0.5, "a#3": 0.5}, x)
    small = fxprune.prune(model, 0.5, x, freeze="a#2")
    assert (small.get_submodule("b").in_features, small.get_submodule("c").in_features) == (4, 4)
    named = [fxprune.prune(model, {text: 0.5}, x) for text in ("a", "a.weight", "a.bias", "a.weight:0", "a:0", "?:0")]
    assert len({small.plan.to_json() for small in named}) == 1
    small = named[0]
    assert (small.get_submodule("b").in_features, small.get_submodule("c").in_features) == (4, 2)


class Packed(nn.Module):
    """One layer makes two results of one shape each, and each is used by itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        y, z = self.a(x).relu().unflatten(1, (2, 6)).unbind(1)
        return self.b(y) + self.c(z.sigmoid())


def test_a_family_that_another_one_holds_is_said_to_be():
    """Rows of one tensor keep equally many, so that half of one family asks for half of the other."""
    model, x = Packed().eval(), torch.randn(2, 4)
    assert [f.name for f in fxprune.couple(model, x).prunable] == ["a#1", "a#2"]
    what = "'a#2' in ratio changes nothing: a#2 keeps as many units as a#1, which the ratio leaves whole"
    with pytest.raises(PruneError, match=what) as caught:
        fxprune.prune(model, {"a#2": 0.5}, x)
    assert caught.value.fix == "ratio={'a#2': 0.5, 'a#1': 0.5}"
    small = fxprune.prune(model, {"a#2": 0.5, "a#1": 0.5}, x)
    assert small.get_submodule("a").out_features == 6
    wide = nn.Sequential(model, nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with pytest.warns(PruneWarning, match="'0.a#2' in ratio changes nothing: 0.a#2 keeps as many units as 0.a#1"):
        fxprune.prune(wide, {"0.a#2": 0.5, "1": 0.5}, x)


def test_globs_over_dimensions():
    model = resnet()
    frozen = {f.name: f.frozen for f in fxprune.couple(model, PICTURE, freeze="layer1.*.conv2:1").families}
    held = [name for name, why in frozen.items() if why and "freeze" in why]
    assert held == ["layer1.0.conv1", "layer1.1.conv1"]


# -- what stays -----------------------------------------------------------------------------------------------------------


def test_freeze_says_what_else_it_holds():
    model = resnet()
    [why] = [f.frozen for f in fxprune.couple(model, PICTURE, freeze=[model.fc]).families if f.frozen and "freeze" in f.frozen]
    held = "layer4.0.conv2:0, layer4.0.bn2:0, layer4.0.downsample.0:0 and 4 more"
    assert why == f"is frozen by freeze=Linear (fc), which holds {held} too"
    small = fxprune.prune(model, 0.5, PICTURE, freeze=[model.fc], verify=False)
    [again] = [c.reason for c in fxprune.report(model, small).whole if "frozen" in c.reason]
    assert again == f"is frozen by request, which holds {held} too"


def test_outputs_alone_stay():
    """As `ignored_layers` of Torch-Pruning: the layer keeps its outputs, and may lose inputs."""
    model = resnet()
    parameters = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    plain = fxprune.prune(model, 0.5, PICTURE, verify=False)
    last = fxprune.prune(model, 0.5, PICTURE, freeze_outputs=[model.fc], verify=False)
    assert (
        parameters(last) == parameters(plain) < parameters(fxprune.prune(model, 0.5, PICTURE, freeze=[model.fc], verify=False))
    )
    for freeze in (model.layer2[0].conv1, "layer2.0.conv1", ["layer2.0.conv1"]):
        small = fxprune.prune(model, 0.5, PICTURE, freeze_outputs=freeze)
        assert small.get_submodule("layer2.0.conv1").weight.shape[:2] == (128, 32)
        assert small.get_submodule("layer2.1.conv1").weight.shape[:2] == (64, 64)
    inside = widths(fxprune.prune(model, 0.5, PICTURE, freeze_outputs="layer3", verify=False))
    whole = widths(model)
    assert all(inside[n] == whole[n] for n in whole if n.startswith("layer3"))
    assert inside["layer2.0.conv1"] == 64 and inside["layer4.0.conv1"] == 256


def test_outputs_of_layers_that_have_them_second():
    up = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2), nn.ReLU(), nn.Conv2d(12, 4, 1)).eval()
    small = fxprune.prune(up, 0.5, IMAGES, freeze_outputs="2")
    assert small.get_submodule("2").weight.shape[:2] == (4, 12)
    words = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    ids = torch.randint(0, 20, (2, 5))
    small = fxprune.prune(words, 0.5, ids, freeze_outputs="0")
    assert small.get_submodule("0").weight.shape == (20, 8) and small.get_submodule("1").weight.shape == (4, 8)


def test_plans_remember_it():
    model = resnet()
    for asked in ({"freeze_outputs": "layer2.0.conv1"}, {"freeze": ["layer1.0.conv1:0", "layer2.*.conv1:0"]}):
        small = fxprune.prune(model, 0.5, PICTURE, verify=False, **asked)
        plan = Plan.from_json(small.plan.to_json())
        assert plan.freeze == small.plan.freeze and plan.freeze
        again = plan.apply(model, PICTURE)
        assert widths(again) == widths(small)
        [whole] = [c for c in fxprune.report(model, again).whole if c.family.name == "layer2.0.conv1"]
        assert whole.reason.startswith("is frozen by request")


@pytest.mark.parametrize("function", [fxprune.report, fxprune.verify, fxprune.repair])
def test_models_in_the_wrong_order(function):
    model = Net().eval()
    small = fxprune.prune(model, 0.5, IMAGES, verify=False)
    with pytest.raises(PruneError, match="the second model is none that was pruned, and the first one is") as caught:
        function(small, model, [IMAGES] if function is fxprune.repair else IMAGES)
    assert caught.value.fix == "the original comes first: (model, pruned, ...)"


# -- what has no effect ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        ({"a": 0.5, "b": 0.5}, "'b' in ratio changes nothing: b is an output of the model"),
        ({"a": 0.5, "act": 0.25}, "'act' in ratio changes nothing: no channels are made there"),
        ({"a": 0.5, "?": 0.25}, "'?' in ratio changes nothing: what it names is named by an earlier glob, which counts"),
        ({"?": 0.5, "a": 0.25}, "'a' in ratio changes nothing: what it names is named by an earlier glob, which counts"),
    ],
)
def test_a_glob_without_effect_is_warned_of(ratio, said):
    model, x = Seq().eval(), torch.randn(2, 4)
    with pytest.warns(PruneWarning) as seen:
        small = fxprune.prune(model, ratio, x)
    assert [str(w.message) for w in seen] == [said]
    assert small.get_submodule("a").out_features == 4


def test_a_share_too_small_is_warned_of():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.randn(2, 4)
    with pytest.warns(PruneWarning, match="'2' in ratio changes nothing: what it names has no whole unit to lose"):
        fxprune.prune(model, {"0": 0.5, "2": 0.1}, x)


def test_a_scope_without_effect_is_warned_of():
    with pytest.warns(PruneWarning, match="'late' in scopes names nothing that may lose units"):
        fxprune.prune(Seq().eval(), 0.5, torch.randn(2, 4), scopes={"early": "a", "late": "b"})
    with (
        pytest.raises(PruneError, match="'late' in ratio changes nothing: b is an output of the model"),
        pytest.warns(PruneWarning),
    ):
        fxprune.prune(Seq().eval(), {"late": 0.5}, torch.randn(2, 4), scopes={"early": "a", "late": "b"})


def test_the_reason_is_that_of_the_criterion():
    with pytest.raises(PruneError, match="'body' in ratio changes nothing: body has no score by this criterion"):
        fxprune.prune(Net().eval(), {"body": 0.5}, IMAGES, criterion="bn_scale")


@pytest.mark.parametrize("ratio", [{"a": 0.5, "b": 0}, {"a": 0.5}, {"*": 0.5}, 0.5], ids=str)
def test_what_has_an_effect_is_not(ratio):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxprune.prune(Seq().eval(), ratio, torch.randn(2, 4))


# -- what an editor sees --------------------------------------------------------------------------------------------------


def test_dir_is_what_is_public():
    assert dir(fxprune) == sorted(fxprune.__all__)
    assert all(hasattr(fxprune, name) for name in fxprune.__all__)


def test_public_names_are_of_the_modules_that_type_checkers_see():
    """`fxprune/__init__.py` says twice where a name is from: for type checkers, and for its first use."""
    tree = ast.parse(Path(fxprune.__file__).read_text())
    seen = next(node.body for node in tree.body if isinstance(node, ast.If))
    homes = {alias.name: node.module for node in seen for alias in node.names}
    said = {name: home.removesuffix(f".{name}") if home == f"fxprune.{name}" else home for name, home in fxprune.HOMES.items()}
    assert homes == said
    assert sorted(homes) == fxprune.__all__


def test_importing_the_package_imports_nothing_of_it():
    """Its modules are imported when they are first used, submodules too; what is not there is no attribute."""
    program = """
import sys, torch
before = set(sys.modules)
import fxprune
assert set(sys.modules) - before == {"fxprune"}, sorted(set(sys.modules) - before)
assert fxprune.criteria.Magnitude is fxprune.Magnitude and fxprune.pipeline.Plan is fxprune.Plan
assert not hasattr(fxprune, "prnue") and not hasattr(fxprune, "__wrapped__")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("function", [fxprune.Pruner, fxprune.feasible, fxprune.prune_checkpoint])
def test_shared_arguments_are_listed(function):
    """By the names, kinds and defaults that they have in `prune`."""
    listed, own = inspect.signature(function).parameters, inspect.signature(fxprune.prune).parameters
    for name in Asked.__annotations__:
        assert (listed[name].kind, listed[name].default) == (own[name].kind, own[name].default)
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in listed.values())


def test_names_are_those_of_the_tables():
    assert set(typing.get_args(CriterionName)) == CRITERIA.keys()
    assert set(typing.get_args(BudgetName)) == KINDS.keys()
    assert set(typing.get_args(Ranking)) == {"local", "global", "isomorphic"}
    assert Asked.__annotations__.keys() == inspect.signature(fxprune.prune).parameters.keys() - {
        "model",
        "ratio",
        "example_inputs",
        "remove",
        "repair",
        "depth",
        "depth_criterion",
        "basis",
        "verify",
        "same_class",
        "inplace",
    }


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads came with Python 3.11")
def test_what_prune_returns_is_known():
    graph, same, either = typing.get_overloads(inspect.unwrap(fxprune.prune))
    assert graph.__annotations__["return"] == "Pruned"
    assert same.__annotations__["return"] == same.__annotations__["model"] == "AnyModule"
    assert either.__annotations__["return"] == "AnyModule | Pruned"


def test_overloads_list_the_arguments_of_prune():
    """Of each the same: what they take by `**asked`, and what they name."""
    for overload in typing.get_overloads(inspect.unwrap(fxprune.prune)):
        named = inspect.signature(overload).parameters.keys() - {"asked"}
        assert named | AskedOfPrune.__annotations__.keys() | Asked.__annotations__.keys() == (
            inspect.signature(fxprune.prune).parameters.keys()
        )
