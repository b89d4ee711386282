"""What holds of the result of each row of the migration tables: by its kind, and by the same request to Torch-Pruning."""

import ast
import copy
import functools
import json
import re
from pathlib import Path

import torch
import torch_pruning
from torch import nn

import fxprune
from fxprune.reports.feasibility import Feasibility
from fxprune.reports.group import Group


def value_of(code, given):
    """What the last expression of some code is."""
    *before, last = ast.parse(code).body
    exec(compile(ast.Module(before, []), code, "exec"), given)
    return eval(compile(ast.Expression(last.value), code, "eval"), given)


def shapes(module):
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def elements(part):
    return part.numel() if isinstance(part, nn.Parameter) else sum(map(torch.numel, part.state_dict().values()))


# -- by kind --------------------------------------------------------------------------------------------------------------


@functools.singledispatch
def holds(value, given):
    raise AssertionError(f"nothing is known of the result, a {type(value).__name__}: say what holds of it")


@holds.register
def _(small: nn.Module, given):
    """A pruned model is smaller than the original, and equal to it with the removed channels masked."""
    assert size(small) < size(given["model"])
    assert small(given["x"]).shape == given["model"](given["x"]).shape
    assert fxprune.verify(given["model"], small, given["x"]).ok


@holds.register
def _(pruner: fxprune.Pruner, given):
    """Its steps are as many as were asked for, and what they end with is a pruned model of half of the units."""
    small = given["model"]
    while not pruner.done:
        small = pruner.step(small)
    assert shapes(pruner.shrink(small)) == shapes(fxprune.prune(given["model"], 0.5, given["x"], verify=False))


@holds.register
def _(found: fxprune.Coupling, given):
    """There is one family that may be pruned for each group of Torch-Pruning's but the output's."""
    model = copy.deepcopy(given["model"])
    graph = torch_pruning.DependencyGraph().build_dependency(model, given["x"])
    groups = list(graph.get_all_groups(ignored_layers=[model.fc]))
    assert len(groups) == len(found.prunable)
    assert sorted(len(g[0].idxs) for g in groups) == sorted(f.units * f.width for f in found.prunable)


@holds.register
def _(group: Group, given):
    """It reaches the layers of Torch-Pruning's group for the same channels, by the same indices."""
    model = copy.deepcopy(given["model"])
    graph = torch_pruning.DependencyGraph().build_dependency(model, given["x"])
    theirs = graph.get_pruning_group(model.layer1[0].conv1, torch_pruning.prune_conv_out_channels, list(group.indices))
    layers = {name: module for name, module in model.named_modules() if any(d.target.module is module for d, _ in theirs)}
    assert {link.tensor.rpartition(".")[0] for link in group.links} == set(layers)
    assert all(tuple(link.indices) == tuple(group.indices) for link in group.links)


@holds.register
def _(found: Feasibility, given):
    """The original's cost is that of `count`, and the least is less."""
    counted = fxprune.count(given["model"], given["x"])
    assert (found.params[-1], found.macs[-1]) == (counted.parameters, counted.macs)
    assert found.params[0] < found.params[-1] and found.macs[0] < found.macs[-1]


@holds.register
def _(found: fxprune.Sensitivity, given):
    """Each family that may be pruned has the value that the evaluation gives where it alone is."""
    assert found.whole == given["accuracy"](given["model"])
    assert {curve.family for curve in found.curves} == {f.name for f in fxprune.couple(given["model"], given["x"]).prunable}
    for curve in found.curves:
        alone = fxprune.prune(given["model"], {curve.family: 0.5}, given["x"], verify=False)
        assert list(curve.values) == [given["accuracy"](alone)]


@holds.register
def _(found: fxprune.Count, given):
    assert found.parameters == torch_pruning.utils.count_ops_and_params(given["model"], given["x"])[1]


# -- by row ---------------------------------------------------------------------------------------------------------------


def theirs(given, **asked):
    """The shapes that Torch-Pruning leaves, where layers are named by their paths."""
    model = copy.deepcopy(given["model"])
    ignored = [model.fc, *(model.get_submodule(path) for path in asked.pop("ignored", ()))]
    ratios = {model.get_submodule(path): ratio for path, ratio in asked.pop("ratios", {}).items()}
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    torch_pruning.BasePruner(
        model, given["x"], importance, **{"pruning_ratio": 0.5, **asked}, ignored_layers=ignored, pruning_ratio_dict=ratios
    ).step()
    return shapes(model)


# what is asked of Torch-Pruning where it leaves the same shapes: with half of every group, whatever ranks its channels
HALF = r"fxprune\.prune\(model, 0\.5, (x|\{\"x\": x\})(, criterion=.*|, attention=\"heads\")?\)"
SAME = {"round_to=8": {"round_to": 8}, "freeze_outputs=[model.": {"ignored": ["layer1.0.conv1"]}}


def same_as_theirs(code, small, given):
    """Whether the shapes are those that Torch-Pruning leaves, where the row asks for what it can be asked for."""
    asked = next((asked for part, asked in SAME.items() if part in code), {} if re.fullmatch(HALF, code) else None)
    return asked is None or "bn_scale" in code or shapes(small) == theirs(given, **asked)


def widths(small, given):
    """The share of output channels that each convolution kept."""
    return {n: m.out_channels / given["model"].get_submodule(n).out_channels for n, m in convolutions(small)}


def convolutions(module):
    return [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Conv2d)]


def share_left(kind):
    def left(small, given):
        counted = [getattr(fxprune.count(m, given["x"]), kind) for m in (small, given["model"])]
        return counted[0] / counted[1]

    return left


def kept_within(prefixes, share):
    """Whether the first layer in each block keeps a share, and those of other blocks all."""

    def check(small, given):
        kept = {n: w for n, w in widths(small, given).items() if re.fullmatch(r"layer\d\.0\.conv1", n)}
        return all(abs(w - share.get(n.partition(".")[0], 1)) < 0.04 for n, w in kept.items()) and prefixes <= {
            n.partition(".")[0] for n, w in kept.items() if w < 1
        }

    return check


def smaller_file(_, given):
    return size(fxprune.load("small.safetensors", given["model"])) < size(given["model"])


# a piece of a row, and what else holds of it
ALSO = {
    '{model.layer1: 0.3, "layer2*": 0.5}': kept_within({"layer1", "layer2"}, {"layer1": 0.7, "layer2": 0.5}),
    '{"layer1*": 0.5}': kept_within({"layer1"}, {"layer1": 0.5}),
    'scopes={"ours": ["layer1*", "layer2*"]}': lambda small, given: (
        min(w for n, w in widths(small, given).items() if n.startswith(("layer3.0.conv1", "layer4.0.conv1"))) == 1
    ),
    'remove={"layer1.0.conv1": [0, 1]}': lambda small, given: torch.equal(
        small.layer1[0].conv1.weight, given["model"].layer1[0].conv1.weight[2:]
    ),
    "[2, 6, 9]).apply()": lambda small, given: torch.equal(
        small.layer1[0].conv1.weight,
        given["model"].layer1[0].conv1.weight[[i for i in range(32) if i not in (2, 6, 9)]],
    ),
    "floor=0.1": lambda small, given: min(widths(small, given).values()) >= 0.1,
    "macs=0.5, ranking": lambda small, given: 0.4 < share_left("macs")(small, given) <= 0.5,
    "macs=0.6)": lambda small, given: 0.5 < share_left("macs")(small, given) <= 0.6,
    "params=0.6)": lambda small, given: 0.5 < share_left("parameters")(small, given) <= 0.6,
    "memory=0.5)": lambda small, given: 0.45 < share_left("bytes")(small, given) <= 0.5,
    'prune(model, {"0": 0.5}, x': lambda small, given: (small[0].out_channels, small[3].out_channels) == (8, 8),
    'freeze_outputs=["0"]': lambda small, given: (small[0].out_channels, small[3].out_channels) == (16, 4),
}

# rows whose result is no object of ours: all that holds
RESULTS = {
    "fxprune.register_op": lambda value, given: value is fxprune.register_op,
    "coupling.families": lambda value, given: value is given["coupling"].families and holds(given["coupling"], given) is None,
    'coupling.group("layer1.0.conv1", [2]).frozen': lambda value, given: (
        value is None and given["coupling"].group("fc", [2]).frozen == "is an output of the model"
    ),
    'list(coupling.group("layer1.0.conv1", [2]))': lambda value, given: (
        {link.tensor for link in value}
        == {
            "layer1.0.conv1.weight",
            *(f"layer1.0.bn1.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
            "layer1.0.conv2.weight",
        }
    ),
    'print(coupling.group("layer1.0.conv1", [2]))': lambda value, given: value is None,
    "coupling.families[0].spans(most=4)": lambda value, given: re.fullmatch(r"[\w.]+:[01](, [\w.]+:[01])*", value),
    "coupling.to_networkx()": lambda value, given: (
        {(n[0], n[1]) for n in value.nodes} >= {("layer1.0.conv1.weight", 0), ("layer1.0.conv2.weight", 1)}
    ),
    "plan.masks(model)": lambda value, given: (
        {name: int(mask.sum()) for name, mask in value.items()}
        == {name: tensor.numel() for name, tensor in given["small"].state_dict().items() if name in value}
    ),
    "plan.to_json()": lambda value, given: json.loads(value) == json.loads(given["small"].plan.to_json()),
    "small.state_dict(); plan.to_json()": lambda value, given: json.loads(value) == json.loads(given["plan"].to_json()),
    "pruner.history; pruner.plan": lambda value, given: value == given["pruner"].plan and not value.slices,
    "small.layer1[0].conv1.out_channels": lambda value, given: value == 16,
    "small.fc.in_features": lambda value, given: value == given["model"].fc.in_features // 2,
    "cross_entropy(model(images), labels).backward(); pruner.regularize(model)": lambda value, given: any(
        p.grad is not None and p.grad.abs().sum() > 0 for p in given["model"].parameters()
    ),
    'fxprune.save(small, "small.safetensors")': smaller_file,
    'fxprune.save(fxprune.prune(model, 0.5, x), "small.safetensors")': smaller_file,
    "fxprune.Plan.from_json(plan.to_json()).apply(model).load_state_dict(small.state_dict())": lambda value, given: (
        not value.missing_keys and not value.unexpected_keys
    ),
    "fxprune.count(model).parameters": lambda value, given: value == torch_pruning.utils.count_params(given["model"]),
    "small.flat().graph": lambda value, given: any(node.op == "call_function" for node in value.nodes),
    'fxprune.report(model, small, x).to_html("report.html")': lambda value, given: (
        "layer1.0.conv1" in Path("report.html").read_text()
    ),
    "print(fxprune.report(model, small))": lambda value, given: value is None,
    'fxprune.Pruner(model, 0.5, x, mask="hold").step()': lambda value, given: (
        shapes(value) == shapes(given["model"]) and int((value[0].weight.flatten(1).norm(dim=1) == 0).sum()) == 8
    ),
}


def check(code, given):
    """Run a row and check what it comes to."""
    value = value_of(code, given)
    if code in RESULTS:
        assert RESULTS[code](value, given)
        return
    if re.match(r"remove_(in|out)puts\(", code):  # each of these against its counterpart in test_layers.py
        layer = given[re.match(r"\w+\((\w+)", code)[1]]
        assert elements(value) < elements(layer)
        return
    holds(value, given)
    for part, claim in ALSO.items():
        assert part not in code or claim(value, given), part
    if hasattr(given["model"], "fc") and isinstance(value, nn.Module):
        assert same_as_theirs(code, value, given)
