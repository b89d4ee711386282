"""Prune every real model of a suite and compare it with its masked original.

    exactness.py                          every suite, ratios 0.5 and 0.25
    exactness.py --suite timm-test        one of them
    exactness.py --models resnet50 timm:test_vit --ratios 0.5 --redo

Rows go to `exactness.jsonl`, the table to `EXACTNESS.md`. Weights, norms and running statistics are random
(see `models.py`). Double precision up to 60 million parameters; above, single, to spare memory and time.
"""

import argparse
import contextlib
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from models import SUITES, build, double_throughout, full_name, randomise
from sweep import Row, machine, markdown_table, one_line, options, read_rows, sweep
from torch import Tensor, nn
from torchvision.models import get_model_weights

import fxprune

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "exactness.jsonl", HERE / "EXACTNESS.md"
DOUBLE_UP_TO = 60_000_000  # parameters
# At two images torch copies the weight of a batch-first attention's input projection once for each token: 5 GB in ViT-H/14.
ONE_IMAGE_FROM = 400_000_000  # parameters
TOLERANCES = {"float64": 1e-9, "float32": 1e-4}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--models", nargs="+", help="these instead of a suite: names, with torchvision: or timm:")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--quick", action="store_true", help="the first ratio only for models in single precision")
    parser.add_argument("--limit", type=float, default=1200, help="seconds for one model at one ratio")
    arguments = options(parser, measure, argv)
    if arguments is None:
        return
    suites = SUITES if arguments.suite == "all" else [arguments.suite]
    names = arguments.models or [name for suite in suites for name in SUITES[suite]()]
    jobs = [
        {"model": full_name(name), "ratio": ratio}
        for name in names
        for ratio in arguments.ratios
        if not (arguments.quick and ratio != arguments.ratios[0] and is_large(full_name(name)))
    ]
    try:
        sweep(__file__, jobs, ROWS, limit=arguments.limit, redo=arguments.redo, workers=arguments.workers)
    finally:
        TABLE.write_text(table(read_rows(ROWS)))
    print(TABLE.relative_to(Path.cwd()) if TABLE.is_relative_to(Path.cwd()) else TABLE)


def is_large(name: str) -> bool:
    """What torchvision says of its model; timm's test models are all small."""
    library, _, short = name.partition(":")
    if library != "torchvision":
        return False
    return get_model_weights(short).DEFAULT.meta["num_params"] > DOUBLE_UP_TO


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def measure(model: str, ratio: float) -> Row:
    """The row of one model at one ratio; an error of fxprune is a row too."""
    network, images = build(model)
    row: Row = {"params": count_parameters(network), "machine": machine()}
    dtype = torch.float64 if row["params"] <= DOUBLE_UP_TO else torch.float32
    network, images = network.to(dtype), images.to(dtype)
    row["dtype"] = str(dtype).removeprefix("torch.")
    if row["params"] > ONE_IMAGE_FROM:
        images = images[:1]
    randomise(network, images)
    row["forward_s"] = time_forward(network, images)
    try:
        with double_throughout() if dtype == torch.float64 else contextlib.nullcontext():
            return row | examine(network, images, ratio, TOLERANCES[row["dtype"]])
    except Exception as error:
        return row | {"status": "failed", "reason": one_line(error)}


def examine(network: nn.Module, images: Tensor, ratio: float, tolerance: float) -> Row:
    coupling = fxprune.couple(network, images)
    prunable = {name for f in coupling.families if f.frozen is None for name, _ in f.members}
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    frozen = sorted(
        (f for f in coupling.families if f.frozen is not None),
        key=lambda f: sum(sizes.get(name, 0) for name, _ in f.members),
        reverse=True,
    )

    start = time.perf_counter()
    pruned = fxprune.prune(network, ratio, example_inputs=images, verify=False)
    seconds = time.perf_counter() - start
    found = fxprune.verify(network, pruned, images)

    exact = found.ok and found.error <= tolerance
    return {
        "params_after": count_parameters(pruned),
        "in_prunable": sum(sizes.get(name, 0) for name in prunable) / sum(sizes.values()),
        "error": float(found.error),
        "compared": list(found.compared),
        "prune_s": seconds,
        "capture": str(pruned.meta.get("capture", "")),
        "frozen": [f"{f.name}: {f.frozen}" for f in frozen[:3]],
        "frozen_families": len(frozen),
        "families": len(coupling.families),
        "status": "exact" if exact else "inexact",
        "reason": "" if exact else f"error {found.error:.1e}, tolerance {tolerance:.0e}",
    }


@torch.no_grad()
def time_forward(network: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    network(images)
    return time.perf_counter() - start


def table(rows: list[Row]) -> str:
    rows = sorted(rows, key=lambda row: (row["model"], -row["ratio"]))
    columns = [
        ("model", "l", lambda row: row["model"]),
        ("ratio", "r", lambda row: row["ratio"]),
        ("status", "l", lambda row: row["status"]),
        ("error", "r", lambda row: f"{row['error']:.1e}" if "error" in row else ""),
        ("dtype", "l", lambda row: row.get("dtype", "")),
        ("parameters, M", "r", lambda row: f"{row['params'] / 1e6:.2f}" if "params" in row else ""),
        ("after, M", "r", lambda row: f"{row['params_after'] / 1e6:.2f}" if "params_after" in row else ""),
        (
            "left",
            "r",
            lambda row: f"{row['params_after'] / row['params']:.0%}" if "params_after" in row else "",
        ),
        (
            "in prunable families",
            "r",
            lambda row: f"{row['in_prunable']:.1%}" if "in_prunable" in row else "",
        ),
        ("prune, s", "r", lambda row: f"{row['prune_s']:.2f}" if "prune_s" in row else ""),
        ("forward, s", "r", lambda row: f"{row['forward_s']:.2f}" if "forward_s" in row else ""),
        ("captured", "l", lambda row: row.get("capture", "")),
        ("frozen, largest first", "l", lambda row: row.get("reason") or "; ".join(row.get("frozen", []))),
    ]
    return (
        "# Exactness on real models\n\n"
        "Written by `exactness.py` from `exactness.jsonl`. *Error* is the largest relative difference between"
        " the pruned model and the original whose removed channels are masked, over random weights, norms and"
        f" running statistics; a model is exact up to {TOLERANCES['float64']:.0e} in double precision, and"
        f" {TOLERANCES['float32']:.0e} in single (above {DOUBLE_UP_TO // 10**6} million parameters).\n\n"
        f"{summary(rows)}\n{markdown_table(columns, rows)}"
    )


def summary(rows: list[Row]) -> str:
    lines = []
    for suite in sorted({row["model"].partition(":")[0] for row in rows}):
        for ratio in sorted({row["ratio"] for row in rows}, reverse=True):
            chosen = [r for r in rows if r["model"].startswith(suite + ":") and r["ratio"] == ratio]
            if not chosen:
                continue
            counts = Counter(row["status"] for row in chosen)
            left = sorted(row["params_after"] / row["params"] for row in chosen if "params_after" in row)
            line = f"- {suite} at {ratio}: {counts['exact']} of {len(chosen)} exact"
            if left:
                line += f"; parameters left {left[0]:.0%} to {left[-1]:.0%}, median {left[len(left) // 2]:.0%}"
            lines.append(line)
    machines = Counter(row["machine"] for row in rows if "machine" in row)
    lines += [f"- {count} rows on {name}" for name, count in machines.most_common()]
    return "".join(line + "\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
