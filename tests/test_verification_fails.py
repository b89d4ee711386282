"""Verification can fail: correct results are broken on purpose, one thing at a time, and each is caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import GRAPHS
from graphs.registry import conv, image, linear, net, randomise
from oracle import run
from torch import Tensor, fx, nn

import fxprune
from fxprune.comparisons.compare import compare
from fxprune.passes.verification.kept_statistics import KeptStatistics, OtherCalls
from fxprune.passes.verification.masked_model import MaskedOriginal
from fxprune.passes.verification.outlook import outlook
from fxprune.passes.verification.zeroed_model import ZeroedOriginal
from fxprune.pipeline import Choice, Compilation
from fxprune.plan import plan_between

CAUGHT = 1e-3


def conv_norm_conv_flatten() -> tuple[nn.Module, Tensor]:
    def forward(self, x):
        x = self.b(self.norm(self.a(x)).relu()).relu()
        return self.head(x.flatten(1))

    layers = {"a": conv(3, 12), "norm": nn.BatchNorm2d(12), "b": conv(12, 7)}
    model = net(forward, **layers, head=linear(420, 5)).double().eval()
    randomise(model)
    return model, image()


def pruned_correctly(model: nn.Module, inputs: Any) -> fx.GraphModule:
    """The pruned model, which is right to begin with: otherwise nothing here would be worth anything."""
    pruned = fxprune.prune(model, 0.5, example_inputs=inputs, verify=False)
    assert fxprune.verify(model, pruned, inputs).ok and as_prune_verifies(model, pruned, inputs).ok
    return pruned


def as_prune_verifies(model: nn.Module, pruned: fx.GraphModule, inputs: Any) -> fxprune.Verification:
    """What `prune` finds by default, which runs less than `verify` does."""
    compilation, choice = chosen(model, pruned, inputs)
    removal = choice.removal(compilation.options.heads)
    expected = outlook(choice.solution, choice.kept.numpy(), compilation.tensors)
    return compare(model, pruned, removal, compilation.inputs, sizes=True, outlook=expected)


def chosen(model: nn.Module, pruned: fx.GraphModule, inputs: Any) -> tuple[Compilation, Choice]:
    plan = plan_between(model, pruned)
    compilation = Compilation.of_plan(model, plan, inputs)
    return compilation, compilation.choice_of(plan)


def statistics_over_kept(model: nn.Module, x: Tensor) -> tuple[ZeroedOriginal, KeptStatistics]:
    pruned = fxprune.prune(model, 0.5, example_inputs=x, verify=False)
    compilation, choice = chosen(model, pruned, x)
    expected = outlook(choice.solution, choice.kept.numpy(), compilation.tensors)
    return ZeroedOriginal(model, choice.slices), KeptStatistics(expected.statistics, expected.kept)


def check_caught(model: nn.Module, pruned: fx.GraphModule, inputs: Any) -> None:
    for verify in (fxprune.verify, as_prune_verifies):
        verification = verify(model, pruned, inputs)
        assert verification.error > CAUGHT
        assert not verification.ok


def cut(model: nn.Module, pruned: fx.GraphModule, name: str, dim: int = 0) -> tuple[list[int], list[int]]:
    """The kept and the removed indices of one dimension, as the plan has them."""
    kept = fxprune.plan_of(pruned).masks(model)[name].movedim(dim, 0).unsqueeze(-1).flatten(1).any(1)
    return kept.nonzero().flatten().tolist(), (~kept).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("name", "dim", "block"),
    [
        ("a.weight", 0, 1),
        ("b.weight", 0, 1),
        ("b.weight", 1, 1),
        ("head.weight", 1, 60),
    ],
)
def test_one_wrong_index(name: str, dim: int, block: int) -> None:
    """The second kept channel holds the values of one that was removed; behind a flatten, all its sixty."""
    model, inputs = conv_norm_conv_flatten()
    pruned = pruned_correctly(model, inputs)
    wrong = model.get_parameter(name)
    for d in range(wrong.ndim):
        kept, removed = cut(model, pruned, name, d)
        if d == dim:
            kept[block : 2 * block] = removed[:block]
        wrong = wrong.index_select(d, torch.tensor(kept))
    with torch.no_grad():
        pruned.get_parameter(name).copy_(wrong)
    check_caught(model, pruned, inputs)


@pytest.mark.parametrize("name", ["a.bias", "norm.weight", "norm.bias", "b.bias"])
def test_one_wrong_index_of_a_vector(name: str) -> None:
    model, inputs = conv_norm_conv_flatten()
    pruned = pruned_correctly(model, inputs)
    _, removed = cut(model, pruned, name)
    with torch.no_grad():
        pruned.get_parameter(name)[1] = model.get_parameter(name)[removed[0]]
    check_caught(model, pruned, inputs)


@pytest.mark.parametrize("name", ["norm.running_mean", "norm.running_var"])
@pytest.mark.parametrize("wrong", ["the first ones", "the removed ones", "reversed"])
def test_one_forgotten_buffer(name: str, wrong: str) -> None:
    """A buffer has the right size, but was cut somewhere else."""
    model, inputs = conv_norm_conv_flatten()
    pruned = pruned_correctly(model, inputs)
    kept, removed = cut(model, pruned, name)
    first = list(range(len(kept)))
    assert kept != first, "the first channels are the kept ones, so this would break nothing"
    indices = {"the first ones": first, "the removed ones": removed[: len(kept)], "reversed": kept[::-1]}
    with torch.no_grad():
        pruned.get_buffer(name).copy_(model.get_buffer(name)[indices[wrong]])
    check_caught(model, pruned, inputs)


def shift_slices(node: fx.Node) -> bool:
    """Move both ends of a channel slice by one."""

    def shifted(value: Any) -> Any:
        if isinstance(value, slice) and isinstance(value.start, int) and isinstance(value.stop, int):
            by = -1 if value.stop == -1 else 1  # an end of 0 would be none
            return slice(value.start + by, value.stop + by, value.step)
        return value

    before = node.args
    if "getitem" in node.name:
        node.args = (node.args[0], tuple(shifted(part) for part in node.args[1]))
    return node.args != before


def swap_head_count_and_size(node: fx.Node) -> bool:
    """Heads of two instead of two heads."""
    found = node.op == "call_method" and node.target in ("view", "reshape") and len(node.args) == 6
    if found:
        *others, heads, size = node.args
        node.args = (*others, size, heads)
    return found


def forget_scale(node: fx.Node) -> bool:
    """Let the fused kernel take the scale from the pruned size."""
    found = "scale" in node.kwargs
    if found:
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "scale"}
    return found


def take_chunks_in_other_order(node: fx.Node) -> bool:
    """The first piece for the second and the other way round; both have one size."""
    if "getitem" in node.name and node.args[1] in (0, 1):
        node.args = (node.args[0], 1 - node.args[1])
        return True
    return False


def divide_by_the_new_size(node: fx.Node) -> bool:
    """Half as many channels are left, but the fourteen by which their sum is divided is no size to follow."""
    found = node.name.startswith(("truediv", "div"))
    if found:
        node.args = (node.args[0], 7)
    return found


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("slice_negative", shift_slices),
        ("attention_packed", swap_head_count_and_size),
        ("attention_single_head_fused", forget_scale),
        ("cat_then_slice_across", shift_slices),
        ("geglu_module", take_chunks_in_other_order),
        ("mean_by_size_over_channels", divide_by_the_new_size),
    ],
)
def test_one_stale_constant(name: str, edit: Callable[[fx.Node], bool]) -> None:
    """A literal in the program is wrong in a way that still runs."""
    model, inputs = GRAPHS[name].make()
    pruned = pruned_correctly(model, inputs)
    edited = [node.name for node in pruned.graph.nodes if edit(node)]
    assert edited, f"nothing to edit in\n{pruned.code}"
    pruned.recompile()
    run(pruned, inputs)
    check_caught(model, pruned, inputs)


@pytest.mark.parametrize("name", ["index_by_buffer", "index_by_list", "channel_shuffle_view"])
def test_one_stale_index(name: str) -> None:
    """An index that the pruned program holds as a constant points elsewhere."""
    model, inputs = GRAPHS[name].make()
    pruned = pruned_correctly(model, inputs)
    indices = [value for value in pruned.buffers() if value.dtype == torch.long and value.ndim]
    assert indices, f"no index in\n{pruned.code}"
    for index in indices:
        index.copy_(index.flip(0))
    check_caught(model, pruned, inputs)


def strided() -> tuple[nn.Module, Tensor]:
    layers = {"a": conv(3, 12), "b": conv(12, 6), "head": linear(6, 5)}
    forward = lambda self, x: self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))  # noqa: E731
    model = net(forward, **layers).double().eval()
    randomise(model)
    return model, torch.randn(1, 3, 24, 24, dtype=torch.double)


@pytest.mark.parametrize("size", ["batch", "image size"])
def test_what_is_wrong_at_another_size_alone(size: str) -> None:
    """Batch and image size are tried in one run; what fails in it is then looked for in each."""
    model, x = strided()
    pruned = pruned_correctly(model, x)
    dim = 0 if size == "batch" else -1

    def off(module: nn.Module, given: tuple[Tensor], out: Tensor) -> Tensor:
        return out if given[0].shape[dim] == x.shape[dim] else out * 1.5

    pruned.register_forward_hook(off)
    for verify in (fxprune.verify, as_prune_verifies):
        found = verify(model, pruned, x)
        assert not found.ok
        assert found.compared == ("the example inputs", "another batch", "another image size")


def test_sizes_are_tried_in_one_run_by_the_original_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original is run under a dispatcher mode once, for the example inputs."""
    model, x = strided()
    pruned = pruned_correctly(model, x)
    runs: list[tuple[str, torch.Size]] = []
    for reference in (MaskedOriginal, ZeroedOriginal):
        monkeypatch.setattr(reference, "__call__", noted(reference, runs))
    found = fxprune.verify(model, pruned, x)
    assert found.ok and found.compared == ("the example inputs", "another batch", "another image size")
    example, other = torch.Size([1, 3, 24, 24]), torch.Size([2, 3, 16, 16])
    assert runs == [("MaskedOriginal", example), ("ZeroedOriginal", example), ("ZeroedOriginal", other)]


def noted(reference: type, runs: list[tuple[str, torch.Size]]) -> Callable[..., Any]:
    run = reference.__call__

    def call(self: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        runs.append((reference.__name__, args[0].shape))
        return run(self, args, kwargs, *rest, **options)

    return call


def runs_of_a_prune(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor) -> list[tuple[str, torch.Size]]:
    runs: list[tuple[str, torch.Size]] = []
    for reference in (MaskedOriginal, ZeroedOriginal):
        monkeypatch.setattr(reference, "__call__", noted(reference, runs))
    assert fxprune.prune(model, 0.5, example_inputs=x).verification.ok
    return runs


def test_a_prune_runs_one_reference_once_on_small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = strided()
    runs = runs_of_a_prune(monkeypatch, model, torch.randn(1, 3, 224, 224, dtype=torch.double))
    assert runs == [("ZeroedOriginal", torch.Size([1, 3, 64, 64]))]


def layer_norm_between(eps: float = 1e-5) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, eps=eps), nn.Linear(8, 4)).double().eval()
    randomise(model)
    return model


def test_a_prune_takes_statistics_of_the_zeroed_original_over_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(9, 6, dtype=torch.double)
    runs = runs_of_a_prune(monkeypatch, layer_norm_between(), x)
    assert runs == [("ZeroedOriginal", torch.Size([1, 6]))]


def test_a_norm_that_counts_zeros_is_caught() -> None:
    """Statistics as the zeroed original would have them alone: over as many entries as before, half of them zero."""
    model, x = layer_norm_between(), torch.randn(9, 6, dtype=torch.double)
    pruned = pruned_correctly(model, x)

    def counting_zeros(values: Tensor) -> Tensor:
        norm = pruned.get_submodule("1")
        padded = F.pad(values, (0, 8 - values.shape[-1]))
        return F.layer_norm(padded, (8,))[..., : values.shape[-1]] * norm.weight + norm.bias

    pruned.get_submodule("1").forward = counting_zeros
    check_caught(model, pruned, x)


class NormPerSample(nn.Module):
    """The norm is called once a sample, so that the calls of one batch are not those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.stack([self.norm(sample) for sample in self.a(x)]))


def test_a_run_with_other_calls_than_the_capture_is_told() -> None:
    model, x = NormPerSample().double().eval(), torch.randn(3, 6, dtype=torch.double)
    for samples, said in ((4, "more often"), (2, "less often")):
        zeroed, over_kept = statistics_over_kept(model, x)
        with pytest.raises(OtherCalls, match=said), over_kept:
            zeroed((torch.randn(samples, 6, dtype=torch.double),), {})
            over_kept.check()


def test_a_run_with_other_calls_than_the_capture_is_compared_with_the_masked_original() -> None:
    model, x = layer_norm_between(), torch.randn(9, 6, dtype=torch.double)
    pruned = pruned_correctly(model, x)
    compilation, choice = chosen(model, pruned, x)
    expected = outlook(choice.solution, choice.kept.numpy(), compilation.tensors)
    more = dataclasses.replace(expected, statistics={func: [*calls, None] for func, calls in expected.statistics.items()})
    removal = choice.removal(compilation.options.heads)
    found = compare(model, pruned, removal, compilation.inputs, sizes=True, outlook=more)
    assert found.ok and found.masked is not None and found.masked < 1e-12 and "native_layer_norm" in found.no_zeroed


def test_statistics_leave_out_zeros_alone() -> None:
    """What labels call removed is left out where it is zero in the run; here nothing was zeroed."""
    model, x = layer_norm_between(), torch.randn(9, 6, dtype=torch.double)
    _, over_kept = statistics_over_kept(model, x)
    with pytest.raises(OtherCalls, match="not zero"), over_kept, torch.no_grad():
        model(x)


def test_a_prune_leaves_what_forwards_write_to_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masked original did not run before it, which found out by itself that a forward writes to parameters."""

    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.count.add_(1)
        return self.b(self.a(x).relu()) * self.count

    model = net(forward, a=linear(6, 8), b=linear(8, 4), count=nn.Parameter(torch.ones(()))).double().eval()
    x = torch.randn(2, 6, dtype=torch.double)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert pruned.verification.ok and model.count == 1
    assert next(p for n, p in pruned.named_parameters() if n.endswith("count")) == 1


def hides_what_comes_before(name: str) -> nn.Module:
    """Two layers and a residual branch, one of whose parameters has not learned anything yet."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.scale * self.c(self.b(x).relu()))

    torch.manual_seed(0)
    layers = {"a": linear(6, 8), "b": linear(8, 8), "c": linear(8, 8), "head": linear(8, 4)}
    model = net(forward, **layers, scale=nn.Parameter(torch.ones(8))).double().eval()
    value = {"head.weight": 0.0, "scale": 1e-12, "c.weight": 0.0}[name]
    nn.init.constant_(model.get_parameter(name), value)
    return model


@pytest.mark.parametrize("name", ["head.weight", "scale", "c.weight"])
def test_what_a_parameter_that_has_learned_nothing_hides(name: str) -> None:
    """Rows of `b` are in the wrong order, which no output shows: what follows multiplies it by next to nothing."""
    model, x = hides_what_comes_before(name), torch.randn(5, 6, dtype=torch.double)
    pruned = pruned_correctly(model, x)
    weight, bias = pruned.get_parameter("b.weight"), pruned.get_parameter("b.bias")
    before = {key: (p.data_ptr(), p.detach().clone()) for key, p in pruned.named_parameters()}
    weight.data, bias.data = weight.data.flip(0), bias.data.flip(0)
    assert torch.allclose(run(pruned, x), pruned_output(model, x), atol=1e-10)
    check_caught(model, pruned, x)
    weight.data, bias.data = weight.data.flip(0), bias.data.flip(0)
    assert fxprune.verify(model, pruned, x).ok
    for key, p in pruned.named_parameters():
        address, value = before[key]
        assert torch.equal(p, value) and (key.startswith("b.") or p.data_ptr() == address)


def pruned_output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return fxprune.prune(model, 0.5, example_inputs=x, verify=False)(x)


def test_tied_parameters_are_shifted_once() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)).relu())

    model = net(forward, a=linear(6, 8), b=linear(8, 8), head=linear(8, 4)).double().eval()
    nn.init.zeros_(model.a.bias)
    model.b.bias = model.a.bias
    x = torch.randn(5, 6, dtype=torch.double)
    pruned = pruned_correctly(model, x)
    assert pruned.a.bias is pruned.b.bias and not pruned.a.bias.any()
