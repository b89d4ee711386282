"""Prune every model of a suite without a hint and say whether the result is exact, and what stayed.

    prunability.py                                    torchvision (121), timm (a model of each family), transformers
    prunability.py --suite timm --tools fxprune       one suite, one tool
    prunability.py --models timm:coat_tiny --redo     some models again
    prunability.py --level plan --all                 couple and plan on shapes alone: all of timm

A model runs in a process of its own with a time limit, so a sweep can be stopped and started again. Rows go to
`prunability.jsonl` (those of `--level plan` to `plans.jsonl`), the tables to `PRUNABILITY.md`. Both tools prune half of
everything. *exact*: the result equals the original with the removed channels masked, at the sizes the model takes, up to
1e-9 in double precision (1e-4 in single, above 60 million parameters and for Torch-Pruning).
*with states released*: for models that return hidden states besides their answer, which then may shrink.
Torch-Pruning is told the heads, as its documentation asks for, and the layers whose outputs have to stay, as fxprune finds
them. NVIDIA's modelopt (`pip install
nvidia-modelopt requests`; FastNAS) is told that every layer may keep half, and its smallest subnet is exported. The result of
either is exact where it equals the original with the same elements zeroed, and only *runs* where that is no reference (a norm
takes statistics over channels).
"""

import argparse
import contextlib
import copy
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from models import call, double_throughout, randomise
from suites import RELEASED, SUITES, make
from sweep import Row, machine, markdown_table, one_line, options, read_rows, sweep
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fxprune
from fxprune.passes.ir.pytree import collect, map_tensors

HERE = Path(__file__).parent
ROWS, PLANS, TABLE = HERE / "prunability.jsonl", HERE / "plans.jsonl", HERE / "PRUNABILITY.md"
TOOLS = ("fxprune", "torch-pruning", "modelopt")
DOUBLE_UP_TO = 60_000_000  # parameters
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
RATIO = 0.5
LARGE = 2**20  # elements
PROBED = 512  # elements of a slice that tell whether it was kept
REACHED = 0.9  # of the parameters: what a plan has to reach not to be listed by itself


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--models", nargs="+", help="these instead of a suite, as suite:name")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--level", choices=["exact", "plan"], default="exact")
    parser.add_argument("--all", action="store_true", help="every timm model (with --level plan)")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one model")
    arguments = options(parser, measure, argv, memory=0.8, prepare=imports)
    if arguments is None:
        return
    suites = list(SUITES) if arguments.suite == "all" else [arguments.suite]
    names = arguments.models or [name for suite in suites for name in SUITES[suite]()]
    if arguments.all:
        import timm

        names = [f"timm:{name}" for name in timm.list_models()]
    tools = ["fxprune"] if arguments.level == "plan" else arguments.tools
    jobs = [{"model": name, "tool": tool, "level": arguments.level} for tool in tools for name in names]
    try:
        path = PLANS if arguments.level == "plan" else ROWS
        sweep(__file__, jobs, path, limit=arguments.limit, redo=arguments.redo, workers=arguments.workers)
    finally:
        TABLE.write_text(tables(read_rows(ROWS) + read_rows(PLANS)))
    print(TABLE)


def imports(model: str, tool: str, level: str) -> None:
    """What the job needs and others like it will need again."""
    library = model.partition(":")[0]
    importlib.import_module({"ultralytics": "ultralytics.nn.tasks"}.get(library, library))
    if tool == "modelopt":
        importlib.import_module("modelopt.torch.nas")


def measure(model: str, tool: str, level: str) -> Row:
    """The row of one model with one tool; an error is a row too."""
    if level == "plan":
        return planned(model)
    network, inputs = make(model)
    count = count_parameters(network)
    # Torch-Pruning's own tensors are in single precision, and would meet the model's
    dtype = torch.float64 if count <= DOUBLE_UP_TO and tool == "fxprune" else torch.float32
    row: Row = {"params": count, "dtype": str(dtype).removeprefix("torch."), "machine": machine()}
    network = network.to(dtype)
    inputs = map_tensors(inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)
    try:
        with double_throughout() if dtype == torch.float64 else contextlib.nullcontext():
            attributes = [(vars(m), remembered(m)) for m in network.modules()]
            with torch.no_grad():
                randomise(network, inputs)
            for now, before in attributes:
                now.clear()  # a forward may leave something for the next one of the same size
                now.update(before)
            if tool != "fxprune":
                return row | with_another(OTHERS[tool], network, inputs, TOLERANCES[dtype])
            row |= with_fxprune(network, inputs, TOLERANCES[dtype])
            if model in RELEASED:  # and once more, with the outputs released that are there besides the answer
                row["released"] = with_fxprune(network, inputs, TOLERANCES[dtype], RELEASED[model])
            return row
    except Exception as error:
        return row | {"status": "failed", "reason": one_line(error)}


def remembered(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module and the hooks on it."""
    return {name: value.copy() if name.endswith("_hooks") else value for name, value in vars(module).items()}


def with_fxprune(network: nn.Module, inputs: Any, tolerance: float, release: Sequence[str] = ()) -> Row:
    coupling = fxprune.couple(network, inputs, release=release)
    start = time.perf_counter()
    pruned = fxprune.prune(network, RATIO, example_inputs=inputs, release=release, verify=False)
    seconds = time.perf_counter() - start
    found = fxprune.verify(network, pruned, inputs)
    with torch.no_grad():
        compared = sum(t.numel() for t in collect(call(pruned, inputs), Tensor))
    exact = found.error <= tolerance and compared > 0
    return {
        **reach(network, coupling),
        "seconds": seconds,
        "error": float(found.error),
        "compared": list(found.compared),
        "values": compared,
        "params_after": count_parameters(pruned),
        "capture": str(pruned.meta.get("capture", "")),
        "status": "exact" if exact else "inexact",
        "reason": "" if exact else f"error {found.error:.1e} over {compared} values",
    }


def reach(network: nn.Module, coupling: fxprune.Coupling) -> Row:
    """What share of the parameters lies in prunable families, and what stays, largest first."""
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    prunable = {name for f in coupling.families if f.frozen is None for name, _ in f.members}
    frozen = [f for f in coupling.families if f.frozen is not None]
    frozen.sort(key=lambda f: sum(sizes.get(name, 0) for name, _ in f.members), reverse=True)
    return {
        "in_prunable": sum(sizes.get(name, 0) for name in prunable) / max(1, sum(sizes.values())),
        "frozen": [f"{f.name}: {f.frozen}" for f in frozen[:3]],
        "families": len(coupling.families),
    }


class Untouched(TorchFunctionMode):
    """Leaves parameters without contents, and large ones on `meta`, so that a model of any size is built at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            made = func(*args, **kwargs | {"device": "meta"})
            return made if made.numel() >= LARGE and made.is_floating_point() else func(*args, **kwargs)
        first = args[0] if args else kwargs.get("tensor")
        name = getattr(func, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        return first if writes and isinstance(first, nn.Parameter) else func(*args, **kwargs)


def planned(model: str) -> Row:
    """Couple and choose on shapes alone."""
    with Untouched():
        network, inputs = make(model, own_size=True)
    row: Row = {"params": count_parameters(network), "machine": machine()}
    start = time.perf_counter()
    try:
        coupling = fxprune.couple(network, inputs)
    except Exception as error:
        return row | {"status": "failed", "reason": one_line(error)}
    seconds = time.perf_counter() - start
    row |= reach(network, coupling)
    if row["in_prunable"] >= REACHED:
        del row["frozen"]
    row["in_prunable"] = round(row["in_prunable"], 4)
    return row | {"status": "planned", "seconds": round(seconds, 3)}


def torch_pruning(network: nn.Module, inputs: Any) -> nn.Module:
    from speed import layers_that_stay, prune_with_torch_pruning

    return prune_with_torch_pruning(network, inputs, layers_that_stay(network, inputs))


def modelopt(network: nn.Module, inputs: Any) -> nn.Module:
    """The smallest subnet of a search space in which every layer has all of its channels or half."""
    import modelopt.torch.nas as nas
    from modelopt.torch.prune.fastnas import FastNASConfig

    space = FastNASConfig().model_dump()
    for rules in space.values():
        for rule in rules.values():
            half = {"channels_ratio": (RATIO, 1.0), "features_ratio": (RATIO, 1.0), "n_heads_ratio": (RATIO, 1.0)}
            half |= {"channel_divisor": 1, "feature_divisor": 1}
            rule.update({name: value for name, value in half.items() if name in rule})
    converted = nas.convert(network, [("fastnas", space)])
    nas.utils.sample(converted, min)
    return nas.export(converted)


OTHERS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {"torch-pruning": torch_pruning, "modelopt": modelopt}


def with_another(prune: Callable[[nn.Module, Any], nn.Module], network: nn.Module, inputs: Any, tolerance: float) -> Row:
    copied = copy.deepcopy(network)
    start = time.perf_counter()
    copied = prune(copied, inputs)
    row: Row = {"seconds": time.perf_counter() - start, "params_after": count_parameters(copied)}
    if row["params_after"] >= count_parameters(network):
        return row | {"status": "untouched", "reason": "nothing was removed"}
    with torch.no_grad():
        got = collect(call(copied, inputs), Tensor)
        if any(takes_statistics(m) for m in network.modules()):
            return row | {"status": "runs", "reason": "a norm takes statistics over channels"}
        zero_removed(network, copied)
        wanted = collect(call(network, inputs), Tensor)
    error = max((difference(a, b) for a, b in zip(wanted, got, strict=True)), default=float("inf"))
    return row | {"status": "exact" if error <= tolerance else "inexact", "error": error}


def takes_statistics(module: nn.Module) -> bool:
    """Whether it is a norm over channels; containers of norms have neither parameters of their own nor no children."""
    is_norm = "norm" in type(module).__name__.lower() and not hasattr(module, "running_var")
    return is_norm and (not list(module.children()) or bool(list(module.parameters(recurse=False))))


def zero_removed(network: nn.Module, pruned: nn.Module) -> None:
    """Zero every element of a floating tensor that the pruned model no longer has."""
    left = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        kept = left.get(name)
        if value.is_floating_point() and kept is not None and kept.shape != value.shape:
            value.mul_(places(value, kept))


def places(value: Tensor, kept: Tensor) -> Tensor:
    """Where in `value` the elements of `kept` are; bool, of the shape of `value`.

    Millions of random numbers in single precision hold some twice, so an element that was removed may equal one that was
    kept. Where what is left is a box, its sides are the slices that hold the most of it.
    """
    if value.dim() != kept.dim():
        return torch.isin(value, kept)
    sides = []
    for dim, size in enumerate(kept.shape):
        slices = value.movedim(dim, 0).reshape(value.shape[dim], -1)
        some = kept.movedim(dim, 0).reshape(size, -1)[:, : PROBED // 64].contiguous()
        held = torch.isin(slices[:, :PROBED].contiguous(), some).sum(1)
        sides.append(held.topk(size).indices.sort().values)
    at = torch.meshgrid(*sides, indexing="ij")
    same = torch.equal(value[at], kept) or torch.equal(value[at].flatten().sort().values, kept.flatten().sort().values)
    if not same:
        return torch.isin(value, kept)
    found = torch.zeros(value.shape, dtype=torch.bool)
    found[at] = True
    return found


def difference(wanted: Tensor, got: Tensor) -> float:
    if wanted.shape != got.shape:
        return float("inf")
    return float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1e-30)) if wanted.numel() else 0.0


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tables(rows: list[Row]) -> str:
    parts = [
        "# Prunability\n\nWritten by `prunability.py` from `prunability.jsonl`; what the words mean is said at its top.\n\n"
        + "".join(f"- {count} rows on {name}\n" for name, count in machines(rows))
    ]
    for level, suite in sorted({(row["level"], row["model"].partition(":")[0]) for row in rows}):
        chosen = [row for row in rows if row["level"] == level and row["model"].startswith(suite + ":")]
        parts.append(f"\n## {suite}" + (", planned on shapes alone" if level == "plan" else "") + "\n\n")
        if level == "plan":
            parts.append(of_plans(chosen) + "\n")
            chosen = [row for row in chosen if row.get("in_prunable", 0) < REACHED]
        else:
            parts.append(summary(chosen) + "\n")
        parts.append(markdown_table(COLUMNS, side_by_side(chosen)) if chosen else "")
    return "".join(parts)


def of_plans(rows: list[Row]) -> str:
    done = [row for row in rows if row["status"] == "planned"]
    if not done:
        return ""
    reached = sorted(row["in_prunable"] for row in done)
    seconds = sorted(row["seconds"] for row in done)
    low = sum(share < REACHED for share in reached)
    return (
        f"- {len(done)} of {len(rows)} models planned, in {statistics.median(seconds):.1f} s in the median and"
        f" {seconds[-1]:.0f} s at the longest\n"
        f"- share of the parameters in prunable families: {statistics.median(reached):.2%} in the median; under {REACHED:.0%}"
        f" in {low} models, listed here with those that fail\n"
    )


def machines(rows: list[Row]) -> list[tuple[str, int]]:
    names = [row["machine"] for row in rows if "machine" in row]
    return [(name, names.count(name)) for name in dict.fromkeys(names)]


def summary(rows: list[Row]) -> str:
    lines = []
    for tool in TOOLS:
        mine = [row for row in rows if row["tool"] == tool]
        if mine:
            counts = {
                status: sum(row["status"] == status for row in mine) for status in dict.fromkeys(r["status"] for r in mine)
            }
            lines.append(f"- {tool}: {len(mine)} models; " + ", ".join(f"{n} {status}" for status, n in counts.items()) + "\n")
    return "".join(lines)


def side_by_side(rows: list[Row]) -> list[Row]:
    """One row for each model: fxprune's, with the others' under `others`."""
    ours = sorted((row for row in rows if row["tool"] == "fxprune"), key=lambda row: row["model"])
    return [row | {"others": {r["tool"]: r for r in rows if r["model"] == row["model"]}} for row in ours]


def other(line: Row, tool: str) -> str:
    row = line["others"].get(tool)
    if row is None:
        return ""
    share = f", {left(row)} left" if "params_after" in row and row["status"] != "untouched" else ""
    return f"{row['status']}{share}" + (f": {row['reason'][:90]}" if row["status"] == "failed" else "")


def left(row: Row) -> str:
    return f"{row['params_after'] / row['params']:.0%}"


COLUMNS = [
    ("model", "l", lambda row: row["model"].partition(":")[2]),
    ("parameters, M", "r", lambda row: f"{row['params'] / 1e6:.1f}" if "params" in row else ""),
    ("status", "l", lambda row: row["status"]),
    ("error", "r", lambda row: f"{row['error']:.0e}" if "error" in row else ""),
    ("in prunable families", "r", lambda row: f"{row['in_prunable']:.1%}" if "in_prunable" in row else ""),
    ("left", "r", lambda row: left(row) if "params_after" in row else ""),
    (
        "with states released",
        "l",
        lambda row: "{status}, {in_prunable:.1%} in prunable families".format(**row["released"]) if "released" in row else "",
    ),
    ("seconds", "r", lambda row: f"{row['seconds']:.1f}" if "seconds" in row else ""),
    ("captured", "l", lambda row: row.get("capture", "")),
    ("why not, or what stays", "l", lambda row: row.get("reason") or "; ".join(row.get("frozen", [])[:2])),
    ("Torch-Pruning", "l", lambda row: other(row, "torch-pruning")),
    ("modelopt", "l", lambda row: other(row, "modelopt")),
]


if __name__ == "__main__":
    sys.exit(main())
