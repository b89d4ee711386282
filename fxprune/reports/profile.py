"""What a forward costs: latency, multiply-accumulates and peak memory, of a whole model and module by module."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fxprune.entry_points import entry_point, without_wrappers
from fxprune.inputs import ExampleInputs, device_of
from fxprune.passes.capture.patches import visible
from fxprune.passes.errors import PruneError, told
from fxprune.passes.ir.module_tree import children_of, named_modules, named_parameters, named_tensors
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.quiet import unobserved
from fxprune.reports.formatting import Printable, in_bytes, plain_data, short, table
from fxprune.selection.budgets import KINDS
from fxprune.selection.latency import measure_seconds
from fxprune.verification import evaluating

if TYPE_CHECKING:
    from rich.console import RenderableType

RUNS = 5  # forwards under the profiler
SHOWN = 15  # modules


@dataclass(frozen=True, slots=True)
class Usage:
    """What one forward takes in a model or a module.

    Attributes:
        parameters: elements.
        macs: multiply-accumulates.
        seconds: of a model the median of forwards, of a module its part under the profiler, which slows it down.
    """

    parameters: int
    macs: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ModuleProfile:
    """One module without children of its own that are modules: its path, class, and what it takes before and after."""

    path: str
    kind: str
    before: Usage
    after: Usage | None


@dataclass(frozen=True)
class Profile(Printable):
    """What one forward of the example inputs takes; printable.

    Attributes:
        model: the name of its class.
        device: where it ran.
        before, after: the whole model, and the pruned one if there is one.
        memory: the most bytes at once, before and after: tensors of the model, inputs, and results that operators return. On
            an accelerator it is what its allocator says.
        modules: those without children, the slowest first.
    """

    model: str
    device: str
    before: Usage
    after: Usage | None
    memory: tuple[int, int | None]
    modules: tuple[ModuleProfile, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return plain_data(self)

    def tables(self) -> Iterator[RenderableType]:
        """The totals, and the modules that take most of the time, as rich renders them."""
        whole, small = self.before, self.after
        yield Text(f"{self.model} on {self.device}, one forward of the example inputs")
        yield ""
        both = [whole] if small is None else [whole, small]
        memory = [number for number in self.memory if number is not None]
        rows = [
            ("parameters", *(short(u.parameters) for u in both)),
            ("multiply-accumulates", *(short(u.macs) for u in both)),
            ("latency", *(KINDS["latency"].format(u.seconds) for u in both)),
            ("peak memory", *map(in_bytes, memory)),
        ]
        yield table(("", "original", *(["pruned"] if small else []), ""), [(*row, "") for row in rows])
        yield ""
        kinds = () if small else ("class",)
        yield table(("module", *kinds, "ms", "MACs", "parameters"), [cells(m) for m in self.modules[:SHOWN]])
        if len(self.modules) > SHOWN:
            yield Text(f"and {len(self.modules) - SHOWN} more modules, which take less time")


def cells(module: ModuleProfile) -> tuple[str, ...]:
    """What is shown of a module, before and after."""
    both = [module.before] if module.after is None else [module.before, module.after]
    spent = " → ".join(f"{usage.seconds * 1e3:.2f}" for usage in both)
    sizes = (" → ".join(short(n) for n in numbers) for numbers in ([u.macs for u in both], [u.parameters for u in both]))
    return (module.path, *([module.kind] if module.after is None else []), spent, *sizes)


def profile(model: nn.Module, example_inputs: Any, pruned: nn.Module | None = None) -> Profile:
    """Measure one forward of the example inputs, in evaluation mode, of a model and of what was pruned of it.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> found = profile(net, torch.randn(10, 4))
    >>> found.before.parameters, found.before.macs, [m.kind for m in found.modules if m.before.macs]
    (44, 360, ['Linear', 'Linear'])

    Both are timed in turns. Raises: PruneError for inputs that the model does not take.
    """
    with entry_point(model) as model:
        inputs = ExampleInputs.parse(example_inputs, model).check(model)
        models = [model] if pruned is None else [model, without_wrappers(pruned)]
        with unobserved(model), contextlib.ExitStack() as stack:
            for one in models:
                stack.enter_context(evaluating(one))
                check_runs(one, inputs, "the model" if one is model else "the pruned model")
            times = measure_seconds([functools.partial(inputs.call, one) for one in models], device_of(model))
            macs = [macs_by_module(one, inputs) for one in models]
            seconds = [seconds_by_module(one, inputs) for one in models]
            memory = [peak_memory(one, inputs) for one in models]
        totals = [Usage(held(m), n.get("", 0), statistics.median(t)) for m, n, t in zip(models, macs, times, strict=True)]
        leaves = [{path: m for path, m in named_modules(one) if path and not children_of(m)} for one in models]
        usages = [
            {path: Usage(held(m), n.get(path, 0), s.get(path, 0.0)) for path, m in some.items()}
            for some, n, s in zip(leaves, macs, seconds, strict=True)
        ]
        after = usages[1] if pruned is not None else {}
        found = [ModuleProfile(path, type(m).__name__, usages[0][path], after.get(path)) for path, m in leaves[0].items()]
        return Profile(
            type(model).__name__,
            str(device_of(model)),
            totals[0],
            totals[1] if pruned is not None else None,
            (memory[0], memory[1] if pruned is not None else None),
            tuple(sorted(found, key=lambda m: -m.before.seconds)),
        )


def check_runs(model: nn.Module, inputs: ExampleInputs, which: str) -> None:
    """Raise PruneError where a model does not take the example inputs."""
    try:
        with torch.no_grad():
            inputs.call(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise PruneError(
            f"{which}'s own forward raises {told(error)}",
            where=type(model).__name__,
            fix="example_inputs on which model(*example_inputs) runs",
        ) from error


def held(module: nn.Module) -> int:
    return sum(p.numel() for p in named_parameters(module).values())


def macs_by_module(model: nn.Module, inputs: ExampleInputs) -> dict[str, int]:
    """Multiply-accumulates of one forward by the path of the module; "" is the whole model."""
    from torch.utils.flop_counter import FlopCounterMode  # here, as it imports triton

    more = {torch.ops.aten._grouped_mm: runs_of_rows} if hasattr(torch, "_grouped_mm") else {}  # which it does not know
    with visible(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=more) as counter:
        inputs.call(model)
    found = {"": int(counter.get_total_flops()) // 2}
    for name, counts in counter.get_flop_counts().items():
        _, dot, path = name.partition(".")
        if dot:
            found[path] = sum(counts.values()) // 2
    return found


def runs_of_rows(rows: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    """Operations of a product of runs of rows, shape (rows, summed), with a matrix each."""
    return 2 * math.prod(out_shape) * rows[-1]


def seconds_by_module(model: nn.Module, inputs: ExampleInputs) -> dict[str, float]:
    """Seconds of one forward by the path of the module, as `torch.profiler` sees it; those of a module's children included."""
    marks: dict[str, list[Any]] = {}

    def enter(path: str) -> Any:
        def begin(module: nn.Module, args: Any) -> None:
            mark = torch.profiler.record_function(f"module {path}")
            mark.__enter__()
            marks.setdefault(path, []).append(mark)

        return begin

    def leave(path: str) -> Any:
        return lambda module, args, out: marks[path].pop().__exit__(None, None, None)

    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device_of(model).type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with contextlib.ExitStack() as stack:
        for path, module in named_modules(model):
            if path:
                stack.callback(module.register_forward_pre_hook(enter(path)).remove)
                stack.callback(module.register_forward_hook(leave(path)).remove)
        inputs.call(model)
        with torch.profiler.profile(activities=kinds) as profiler:
            for _ in range(RUNS):
                inputs.call(model)
    taken: dict[str, list[float]] = {}
    for event in profiler.events():
        kind, _, path = event.name.partition(" ")
        if kind == "module":
            taken.setdefault(path, []).append(max(event.cpu_time_total, event.device_time_total) / 1e6)
    # of a module that is called several times in one forward, all calls; of the forwards the median
    return {path: statistics.median(map(sum, zip(*[iter(times)] * (len(times) // RUNS)))) for path, times in taken.items()}


class PeakMemory(TorchDispatchMode):
    """Follows the storages that operators return: `most` is the largest number of bytes that were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in collect(out, Tensor):
            self.note(tensor)
        return out

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen[storage] = True
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, number: int) -> None:
        self.now -= number


def peak_memory(model: nn.Module, inputs: ExampleInputs) -> int:
    """The most bytes at once in one forward; see `Profile`."""
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        inputs.call(model)
        return torch.cuda.max_memory_allocated(device)
    with PeakMemory() as peak:
        for tensor in [*(t for _, t in named_tensors(model)), *inputs.tensors]:
            peak.note(tensor)
        inputs.call(model)
    return peak.most
