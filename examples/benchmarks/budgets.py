"""Prune real models to budgets of parameters, multiply-accumulates and memory, and count what is left.

    budgets.py                                     every model, budget and ranking
    budgets.py --models resnet50 --shares 0.5 --redo
    budgets.py --kinds latency --shares 0.5 --rankings local

Rows go to `budgets.jsonl`, the table to `BUDGETS.md`. What is left is counted on the pruned model, by code that
knows nothing of the plan; weights, norms and running statistics are random (see `models.py`).
"""

import argparse
import itertools
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from models import build, full_name, randomise
from sweep import Row, machine, markdown_table, one_line, options, read_rows, sweep
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxprune

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "budgets.jsonl", HERE / "BUDGETS.md"
MODELS = [
    "resnet50",
    "mobilenet_v2",
    "convnext_tiny",
    "timm:vit_small_patch16_224",
    "swin_t",
    "regnet_x_400mf",
    "regnet_y_3_2gf",
]
KINDS, SHARES, RANKINGS = ("params", "macs", "memory"), (0.5, 0.3), ("local", "global")
WITHIN = 0.02  # of the budget
TIMED, LONGEST = 15, 10.0  # least runs of either model, and seconds of more


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="names, with torchvision: or timm:")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, "latency"], default=KINDS)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the original that may stay")
    parser.add_argument("--rankings", nargs="+", default=RANKINGS)
    parser.add_argument("--limit", type=float, default=900, help="seconds for one model and budget")
    arguments = options(parser, measure, argv, alone=True)
    if arguments is None:
        return
    jobs = [
        {"model": full_name(model), "kind": kind, "share": share, "ranking": ranking}
        for model in arguments.models
        for kind in arguments.kinds
        for share in arguments.shares
        for ranking in arguments.rankings
    ]
    try:
        sweep(__file__, jobs, ROWS, limit=arguments.limit, redo=arguments.redo)
    finally:
        TABLE.write_text(table(read_rows(ROWS)))
    print(TABLE.relative_to(Path.cwd()) if TABLE.is_relative_to(Path.cwd()) else TABLE)


def measure(model: str, kind: str, share: float, ranking: str) -> Row:
    """The row of one model and budget; an error of fxprune is a row too."""
    network, images = build(model)
    images = images[:1]
    randomise(network, images)
    row: Row = {"machine": machine()}
    if kind == "latency":
        return row | measure_latency(network, images, share, ranking)
    try:
        planned = fxprune.feasible(network, images, ranking=ranking, **{kind: share})
        start = time.perf_counter()
        pruned = fxprune.prune(network, example_inputs=images, ranking=ranking, verify=False, **{kind: share})
        row["prune_s"] = time.perf_counter() - start
    except fxprune.PruneError as error:
        return row | {"status": "failed", "reason": one_line(error)}
    counts = {"params": parameters, "macs": lambda m: macs(m, images), "memory": memory}
    row |= {name: [count(network), count(pruned)] for name, count in counts.items()}
    row["planned"] = {name: getattr(planned, name)[:0:-1] for name in KINDS}
    found = fxprune.verify(network, pruned, images, sizes=False)
    row["error"] = float(found.error)
    row["of_budget"] = row[kind][1] / (share * row[kind][0])
    agrees = all(row[name] == list(row["planned"][name]) for name in KINDS)
    met = 1 - WITHIN <= row["of_budget"] <= 1
    row["status"] = "met" if met and agrees and found.ok else "missed"
    reasons = {"not within the budget": met, "the plan counts otherwise": agrees, "not exact": found.ok}
    row["reason"] = "; ".join(reason for reason, ok in reasons.items() if not ok)
    return row


def measure_latency(network: nn.Module, images: Tensor, share: float, ranking: str) -> Row:
    """What `prune` says it measured, and what is measured here of the model it returned."""
    start = time.perf_counter()
    try:
        pruned = fxprune.prune(network, example_inputs=images, ranking=ranking, verify=False, latency=share)
    except fxprune.PruneError as error:
        return {"status": "refused" if "cannot be met" in error.what else "failed", "reason": one_line(error)}
    row: Row = {"prune_s": time.perf_counter() - start}
    found = pruned.meta["latency"]
    row["seconds"], row["spread"], row["threads"] = [found.original, found.pruned], found.spread, torch.get_num_threads()
    row["left"], row["off"], row["runs"] = found.share, found.error, found.runs
    row["again"] = timed([network, pruned], images)
    row["macs"] = [macs(network, images), macs(pruned, images)]
    row["of_budget"] = found.share / share
    row["status"] = "met" if 1 - WITHIN <= row["of_budget"] <= 1 else "missed"
    row["reason"] = "" if row["status"] == "met" else f"{1 - row['of_budget']:.1%} is unused"
    return row


@torch.no_grad()
def timed(models: list[nn.Module], images: Tensor) -> float:
    """The median over all turns of what the second of two models takes of the first one's time."""
    seconds: list[list[float]] = [[] for _ in models]
    end = time.perf_counter() + LONGEST
    turns = itertools.takewhile(lambda turn: turn < TIMED + 2 or time.perf_counter() < end, itertools.count())
    for turn in turns:
        for model, mine in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(images)
            if turn >= 2:
                mine.append(time.perf_counter() - start)
    return statistics.median(second / first for first, second in zip(*seconds, strict=True))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def memory(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of one forward: half of what torch counts, which is two operations for each.

    On a CPU torch's counter does not see into fused attention: as plain products it does.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def table(rows: list[Row]) -> str:
    order = {full_name(model): at for at, model in enumerate(MODELS)}
    rows = sorted(rows, key=lambda r: (order.get(r["model"], len(order)), r["model"], -r["share"], r["kind"], r["ranking"]))

    counted = [row for row in rows if row["kind"] in KINDS]
    clocked = [row for row in rows if row["kind"] == "latency"]

    def left(kind: str) -> object:
        return lambda row: f"{row[kind][1] / row[kind][0]:.2%}" if kind in row else ""

    columns = [
        ("model", "l", lambda row: row["model"]),
        ("budget", "l", lambda row: f"{row['kind']}={row['share']}"),
        ("ranking", "l", lambda row: row["ranking"]),
        ("status", "l", lambda row: row["status"]),
        ("of the budget", "r", lambda row: f"{row['of_budget']:.2%}" if "of_budget" in row else ""),
        *((f"{name} left", "r", left(name)) for name in KINDS),
        ("multiply-accumulates", "r", lambda row: f"{row['macs'][1]:,}" if "macs" in row else ""),
        ("as planned", "r", lambda row: f"{row['planned']['macs'][1]:,}" if "planned" in row else ""),
        ("error", "r", lambda row: f"{row['error']:.1e}" if "error" in row else ""),
        ("prune, s", "r", lambda row: f"{row['prune_s']:.1f}" if "prune_s" in row else ""),
        ("why", "l", lambda row: row.get("reason", "")),
    ]
    return (
        "# Budgets on real models\n\n"
        "Written by `budgets.py` from `budgets.jsonl`. A budget is met by at most the share that may stay, and at least"
        f" {1 - WITHIN:.0%} of it. Everything is counted on the pruned model: parameters, bytes of parameters and buffers,"
        " and multiply-accumulates of one image as half the operations of `torch.utils.flop_counter`. *As planned* is what"
        " the plan said before anything was cut; a row is met only if the two are equal.\n\n"
        "Both counts are of matrix products, convolutions and attention. Neither counts norms, activations, additions,"
        " pooling or softmax. On a CPU torch's counter does not know the fused kernel of attention, so the pruned model"
        " runs with `sdpa_kernel(SDPBackend.MATH)`, where attention is two products; without that its count lacks them.\n\n"
        f"{summary(rows)}\n{markdown_table(columns, counted)}{latency_table(clocked) if clocked else ''}"
    )


def latency_table(rows: list[Row]) -> str:
    def times(key: str, at: int) -> object:
        return lambda row: f"{row[key][at] * 1e3:.1f}" if key in row else ""

    columns = [
        ("model", "l", lambda row: row["model"]),
        ("budget", "l", lambda row: f"{row['kind']}={row['share']}"),
        ("ranking", "l", lambda row: row["ranking"]),
        ("status", "l", lambda row: row["status"]),
        ("before, ms", "r", times("seconds", 0)),
        ("after, ms", "r", times("seconds", 1)),
        ("left", "r", lambda row: f"{row['left']:.1%}" if "left" in row else ""),
        ("of the budget", "r", lambda row: f"{row['of_budget']:.1%}" if "of_budget" in row else ""),
        ("standard error", "r", lambda row: f"{row['off']:.1%}" if "off" in row else ""),
        ("runs", "r", lambda row: row.get("runs", "")),
        ("half of them within", "r", lambda row: f"{row['spread']:.0%}" if "spread" in row else ""),
        ("left, timed again", "r", lambda row: f"{row['again']:.1%}" if "again" in row else ""),
        ("macs left", "r", lambda row: f"{row['macs'][1] / row['macs'][0]:.0%}" if "macs" in row else ""),
        ("prune, s", "r", lambda row: f"{row['prune_s']:.0f}" if "prune_s" in row else ""),
        ("why", "l", lambda row: row.get("reason", "")),
    ]
    return (
        "\n## Latency\n\n"
        "One image, on a processor that others may use at the same time. *Before* and *after* are what `prune`"
        " measured, medians of runs in turns; *left* is the median of the quotients of each turn; *timed again* is another"
        " such measurement, made by this script of the model that was returned. How far the two are apart is how far such"
        " a machine can be trusted. Families narrow in multiples of 8, and one step of that may take more than a fiftieth"
        " of the time.\n\n"
        f"{markdown_table(columns, rows)}"
    )


def summary(rows: list[Row]) -> str:
    lines = []
    for kind in (*KINDS, "latency"):
        chosen = [row for row in rows if row["kind"] == kind]
        counts = Counter(row["status"] for row in chosen)
        shares = sorted(row["of_budget"] for row in chosen if "of_budget" in row)
        if shares:
            refused = f"; {counts['refused']} more are below the least there can be" if counts["refused"] else ""
            lines.append(
                f"- {kind}: {counts['met']} of {len(chosen) - counts['refused']} met, with {shares[0]:.2%} to {shares[-1]:.2%}"
                f" of the budget{refused}"
            )
    machines = Counter(row["machine"] for row in rows if "machine" in row)
    lines += [f"- {count} rows on {name}" for name, count in machines.most_common()]
    return "".join(line + "\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
