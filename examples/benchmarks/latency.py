"""Latency budgets met on this machine by channels, by channels and heads, and by channels, heads and blocks together.

    latency.py                                   the networks of `accuracy.py` that have blocks, trained on Fashion-MNIST
    latency.py --networks vit --shares 0.5 --redo

Each result is repaired on images without labels, and not trained. It is `prune(latency=..., repair=True)` that measures and
chooses; then the original and all results of one budget are timed in turns once more. Rows go to `latency.jsonl`, the table
to `LATENCY.md`.
"""

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from data import fashion
from sweep import Row, machine, markdown_table, options, read_rows, sweep
from torch import nn
from training import TEST, accuracy, base

import fxprune

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "latency.jsonl", HERE / "LATENCY.md"
NETWORKS, SHARES, SEEDS, BATCHES = ("vit", "resnet20"), (0.7, 0.5, 0.35), (0, 1, 2), (32, 1)
CALIBRATION, ROUNDS = 256, 200


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the time of the original")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="images in a forward that is timed")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one budget of one network")
    arguments = options(parser, measure, argv, alone=True)
    if arguments is None:
        return
    jobs = [
        {"network": network, "batch": batch, "share": share, "seed": seed}
        for network in arguments.networks
        for batch in arguments.batches
        for share in arguments.shares
        for seed in arguments.seeds
    ]
    try:
        sweep(__file__, jobs, ROWS, limit=arguments.limit, redo=arguments.redo)
    finally:
        TABLE.write_text(table(read_rows(ROWS)))


def ways(network: nn.Module) -> dict[str, dict[str, Any]]:
    """What may go, and the arguments of `prune` that say so."""
    attention = [f"{name}/" for name, module in network.named_modules() if hasattr(module, "num_heads")]
    if not attention:
        return {"channels": {}, "channels, blocks": {"depth": True}}
    return {"channels": {"freeze": attention}, "channels, heads": {}, "channels, heads, blocks": {"depth": True}}


def measure(network: str, batch: int, share: float, seed: int) -> Row:
    torch.set_num_threads(1)
    model = base(network, seed)
    images, test = fashion("train", CALIBRATION)[0], fashion("t10k", TEST)
    models, found = {"": model}, dict[str, Row]()
    for way, how in ways(model).items():
        started = time.process_time()
        try:
            made = fxprune.prune(model, example_inputs=images[:batch], latency=share, data=images.split(64), repair=True, **how)
        except fxprune.PruneError as error:
            found[way] = {"failed": error.what}
            continue
        models[way] = made
        found[way] = {
            "measured": made.meta["latency"].share,
            "error": made.meta["repair"].error[1],
            "accuracy": accuracy(made, *test),
            "branches": list(made.meta["branches"]),
            "chosen": next((text for text in made.meta["chosen"] if text.startswith("way=")), ""),
            "seconds": time.process_time() - started,
        }
    times = in_turns(models, images[:batch])
    for way in models.keys() - {""}:
        found[way]["share"] = statistics.median(b / a for a, b in zip(times[""], times[way], strict=True))
    original = {"accuracy": accuracy(model, *test), "milliseconds": 1e3 * statistics.median(times[""])}
    return {"status": "measured", "original": original, "ways": found, "machine": machine()}


@torch.no_grad()
def in_turns(models: dict[str, nn.Module], images: torch.Tensor) -> dict[str, list[float]]:
    """Seconds of a forward of each, round by round, each round in an order of its own."""
    times: dict[str, list[float]] = {way: [] for way in models}
    order = random.Random(0)
    for turn in range(ROUNDS + 3):
        for way in order.sample(list(models), len(models)):
            started = time.perf_counter()
            models[way](images)
            if turn >= 3:  # the first ones allocate
                times[way].append(time.perf_counter() - started)
    return times


def table(rows: list[Row]) -> str:
    done = [row for row in rows if row["status"] == "measured"]
    lines = [
        {**{name: row[name] for name in ("network", "batch", "share", "seed")}, "way": way, "found": found}
        for row in sorted(done, key=lambda row: (row["network"], -row["batch"], -row["share"], row["seed"]))
        for way, found in {"": row["original"], **row["ways"]}.items()
    ]
    columns = [
        ("network", "l", lambda line: line["network"]),
        ("images", "r", lambda line: line["batch"]),
        ("budget", "r", lambda line: f"{line['share']:.0%}"),
        ("seed", "r", lambda line: line["seed"]),
        ("what may go", "l", lambda line: line["way"] or f"nothing: {line['found']['milliseconds']:.2f} ms"),
        ("latency", "r", lambda line: cell(line, "share", "{:.1%}")),
        ("output error", "r", lambda line: cell(line, "error", "{:.1%}")),
        ("accuracy", "r", lambda line: cell(line, "accuracy", "{:.1%}")),
        ("way of `prune`", "l", lambda line: line["found"].get("chosen", "")[4:].partition(" (")[0].partition(",")[0]),
        ("blocks that went", "l", lambda line: ", ".join(line["found"].get("branches", ())) or line["found"].get("failed", "")),
    ]
    return (
        "# Latency budgets: channels, heads and blocks\n\n"
        "Written by `latency.py` from `latency.jsonl`. *latency*: the median over"
        f" {ROUNDS} rounds of what the result took of the original's time, all results of a budget in turns, after `prune` had"
        " measured for itself. One thread; *images* in a forward. *accuracy*: of"
        f" {TEST:,} test images of Fashion-MNIST; results are repaired on {CALIBRATION} images without labels, and not trained."
        " *output error*: relative, on the calibration images that repair holds out."
        f" {done[0]['machine'] if done else ''}.\n\n" + markdown_table(columns, lines) + "\n" + means(done)
    )


def means(rows: list[Row]) -> str:
    """The accuracy of each way, over the seeds."""
    lines = []
    for network, batch, share in dict.fromkeys((row["network"], row["batch"], row["share"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["batch"], row["share"]) == (network, batch, share)]
        said = []
        for way in mine[0]["ways"]:
            met = [row["ways"][way]["accuracy"] for row in mine if "accuracy" in row["ways"][way]]
            said.append(
                f"{way} " + (f"{statistics.mean(met):.1%}" if len(met) == len(mine) else f"met {len(met)} of {len(mine)}")
            )
        whole = statistics.mean(row["original"]["accuracy"] for row in mine)
        lines.append(f"- {network}, {batch} images, {share:.0%} of the time: {'; '.join(said)} (unpruned {whole:.1%})\n")
    return f"Mean accuracy over the seeds:\n\n{''.join(lines)}"


def cell(line: Row, name: str, form: str) -> str:
    return form.format(line["found"][name]) if name in line["found"] else ""


if __name__ == "__main__":
    main()
