"""The conformance graphs, through fxprune and through Torch-Pruning 1.6.1, side by side.

    python examples/benchmarks/conformance.py            # every graph; goes on where it stopped
    python examples/benchmarks/conformance.py --fresh    # from the start
    python examples/benchmarks/conformance.py --table    # only the table of what is recorded

Both are judged alike: which elements of each parameter and buffer are left is read off the pruned model by
their values (all are random, so each occurs once), the others are zeroed in the original, and the outputs
must agree to 1e-8 in float64. Torch-Pruning runs as its README says: MagnitudeImportance(p=2), BasePruner
with half of the channels, the layers that make the output ignored; then again with the number of heads told,
which fxprune is not. Of its two ways to prune attention, dimensions in a head and whole heads, the better
one counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from graphs import GRAPHS, Graph  # noqa: E402
from oracle import duplicate, masked, parameter_count, relative_error, run  # noqa: E402

RESULTS = HERE / "conformance.jsonl"
TOLERANCE = 1e-8
# Nearly all take a tenth of a second.
SECONDS = 20
# From best to worst, so that the better of two ways is the smaller.
STATUSES = ("exact", "ran", "untouched", "wrong", "no reference", "broken", "raised")
MEANING = {
    "exact": "something was removed and the masked original agrees",
    "ran": "something was removed and it runs; the graph has a channel statistic, so zeroing is no reference",
    "untouched": "nothing was removed",
    "wrong": "it runs and computes something else",
    "no reference": "what is left is not a part of the original",
    "broken": "the pruned model does not run",
    "raised": f"the pruner raised, crashed, or did not end in {SECONDS} seconds",
}
Prune = Callable[[Graph, nn.Module, Any], nn.Module]


def isolated(graph: Graph, prune: Prune) -> dict[str, Any]:
    """``judge`` in a process of its own, because a pruner may loop for ever or crash Python."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            theirs.send(judge(graph, prune))

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        if ours.poll(SECONDS):
            return ours.recv()
        problem = f"did not end in {SECONDS} seconds"
    except EOFError:
        process.join()
        problem = f"Python itself died, exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return {"status": "raised", "message": problem}


def with_fxprune(graph: Graph, model: nn.Module, inputs: Any) -> nn.Module:
    import fxprune

    return fxprune.prune(model, 0.5, example_inputs=inputs, verify=False)


def with_torch_pruning(hint: str) -> Prune:
    """Torch-Pruning with no hint, or with the number of heads and whether to prune ``dims`` or ``heads``."""

    def prune(graph: Graph, model: nn.Module, inputs: Any) -> nn.Module:
        import torch_pruning as tp

        model = duplicate(model)
        layers = dict(model.named_modules())
        # Fresh dicts, because the defaults are shared by all calls and keep the hints of the call before.
        options: dict[str, Any] = {"num_heads": {}, "in_channel_groups": {}, "out_channel_groups": {}}
        if hint:
            options["num_heads"] = {layers[name]: count for name, count in graph.heads.items()}
            options["prune_head_dims"] = hint == "dims"
            options["prune_num_heads"] = hint == "heads"
            options["head_pruning_ratio"] = 0.5 if hint == "heads" else 0.0
        pruner = tp.pruner.BasePruner(
            model,
            inputs,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[layer for name, layer in layers.items() if name.startswith("head")],
            forward_fn=run,
            **options,
        )
        pruner.step()
        return model

    return prune


def tensors(model: nn.Module) -> dict[str, Tensor]:
    found = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: value.detach() for name, value in found}


def masks_by_value(model: nn.Module, pruned: nn.Module) -> dict[str, Tensor]:
    """Which elements of each parameter and buffer the pruned model still has, told by their values."""
    left, masks = tensors(pruned), {}
    for name, value in tensors(model).items():
        kept = left.get(name)
        # As in the oracle, indices stay as they are, and so do masks, whose few values would not tell.
        means_something = not value.is_floating_point() or name.endswith("mask")
        if kept is None or kept.shape == value.shape or means_something:
            masks[name] = torch.ones(value.shape, dtype=torch.bool)
        elif value.unique().numel() == value.numel():
            masks[name] = torch.isin(value, kept)
            if masks[name].sum() != kept.numel():
                raise LookupError(f"{name} holds values that the original does not have")
        else:
            raise LookupError(f"{name} holds the same value twice")
    return masks


def judge(graph: Graph, prune: Prune) -> dict[str, Any]:
    """One graph through one pruner: ``status``; where they are known ``error``, ``removed``, ``targets``."""
    model, inputs = graph.make()
    try:
        pruned = prune(graph, model, inputs).eval()
    except Exception as problem:
        return {"status": "raised", "message": message(problem)}
    result: dict[str, Any] = {"removed": round(1 - parameter_count(pruned) / parameter_count(model), 4)}
    with torch.no_grad():
        try:
            output = run(pruned, inputs)
        except Exception as problem:
            return {"status": "broken", **result, "message": message(problem)}
        if result["removed"] == 0:
            return {"status": "untouched", **result}
        try:
            masks = masks_by_value(model, pruned)
        except LookupError as problem:
            return {"status": "no reference", **result, "message": message(problem)}
        result["targets"] = all(not masks[name].all() for name in graph.targets)
        if graph.stats:
            return {"status": "ran", **result, **verified(model, pruned, inputs)}
        error = relative_error(run(masked(model, masks), inputs), output)
    return {"status": "exact" if error < TOLERANCE else "wrong", "error": error, **result}


def verified(model: nn.Module, pruned: nn.Module, inputs: Any) -> dict[str, float]:
    """fxprune's own verification, of its own results alone, where zeroing is no reference."""
    import fxprune

    if not isinstance(pruned, fx.GraphModule):
        return {}
    return {"verified": fxprune.verify(model, pruned, inputs).error}


def message(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".split("\n")[0][:200]


def measure(graph: Graph) -> dict[str, Any]:
    """The line for one graph."""
    ours, plain = isolated(graph, with_fxprune), isolated(graph, with_torch_pruning(""))
    hints = ("dims", "heads") if graph.heads else ()
    told = [isolated(graph, with_torch_pruning(hint)) for hint in hints]
    best = min([plain, *told], key=lambda result: STATUSES.index(result["status"]))
    line = {"name": graph.name, "family": graph.family, "stats": graph.stats, "fxprune": ours}
    return {**line, "torch_pruning": plain, "torch_pruning_told_heads": best}


def record(path: Path, fresh: bool) -> None:
    if fresh:
        path.unlink(missing_ok=True)
    done = {line["name"] for line in read(path)}
    for name in ("fxprune", "torch_pruning"):
        import_module(name)  # once, rather than in every child
    with path.open("a") as file:
        for graph in tqdm([graph for graph in GRAPHS.values() if graph.name not in done], unit="graph"):
            file.write(json.dumps(measure(graph)) + "\n")
            file.flush()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


COLUMNS = {
    "fxprune": "fxprune",
    "torch_pruning": "Torch-Pruning",
    "torch_pruning_told_heads": "Torch-Pruning,\ntold the heads",
}


def share(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})" if total else "-"


def by_family(lines: list[dict[str, Any]]) -> Table:
    table = Table(title="Exact, of the graphs where zeroing is a reference", title_justify="left")
    table.add_column("family")
    table.add_column("graphs", justify="right")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    plain = [line for line in lines if not line["stats"]]
    families = list(dict.fromkeys(line["family"] for line in plain))
    for family in [*families, None]:
        rows = [line for line in plain if family in (None, line["family"])]
        exact = [sum(line[column]["status"] == "exact" for line in rows) for column in COLUMNS]
        cells = [str(n) if family else share(n, len(rows)) for n in exact]
        table.add_row(family or "all", str(len(rows)), *cells, style="" if family else "bold")
        if family == families[-1]:
            table.add_section()
    reached = [
        sum(line[column]["status"] == "exact" and line[column].get("targets", False) for line in plain) for column in COLUMNS
    ]
    table.add_row("and what the graph is about was removed", "", *(share(n, len(plain)) for n in reached))
    return table


def by_status(lines: list[dict[str, Any]]) -> Table:
    statistics = [line for line in lines if line["stats"]]
    proven = sum(line["fxprune"].get("verified", 1.0) < TOLERANCE for line in statistics)
    table = Table(title="All graphs, by what happened", title_justify="left", caption_justify="left")
    table.caption = (
        f"'ran' are the {len(statistics)} graphs with a statistic over channels, where zeroing is no "
        f"reference. fxprune's own verification finds {proven} of its results for them exact; for "
        "Torch-Pruning they are counted apart, neither exact nor wrong."
    )
    table.add_column("status")
    table.add_column("meaning")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    counts = {column: Counter(line[column]["status"] for line in lines) for column in COLUMNS}
    for status in STATUSES:
        table.add_row(status, MEANING[status], *(str(counts[column][status]) for column in COLUMNS))
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Conformance of fxprune and Torch-Pruning, side by side.")
    parser.add_argument("--fresh", action="store_true", help="forget what is recorded")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not options.table:
        record(options.results, options.fresh)
    lines = read(options.results)
    console = Console()
    console.print(by_family(lines))
    console.print(by_status(lines))


if __name__ == "__main__":
    main()
