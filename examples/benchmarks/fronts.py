"""A front of methods by `fxprune.sweep`, and what `fxprune.search` adds to its best point, on the networks of `accuracy.py`.

Methods and steps are compared on images of the training set that nothing was trained on; what is reported is the accuracy on
the test set, which neither has seen. Without labels but those of the comparison: criteria and repair see images alone.

    .venv/bin/python examples/benchmarks/fronts.py --networks vit resnet20 --times 2 4 8 --searched 4 8 --steps 20
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from data import fashion
from sweep import Row, machine, read_rows, write_rows
from training import SCRATCH, TEST, TRAIN, accuracy, base

import fxprune

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "fronts.jsonl", HERE / "FRONTS.md"
CALIBRATION, COMPARED, BATCH = 256, 2_000, 64
CRITERIA, RANKINGS = ("flap", "osscar", "magnitude"), ("local", "global")
VARIED: dict[str, dict[str, Any]] = {  # what of `prune` else means something for a network
    "vit": {"criteria": CRITERIA, "attention": "dims", "basis": (None, "principal"), "depth": (False, True)},
    "resnet20": {"criteria": (*CRITERIA, "bn_scale"), "depth": (False, True)},
    "mobilenet": {"criteria": (*CRITERIA, "bn_scale"), "basis": (None, "principal")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(VARIED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--times", nargs="+", type=int, default=[2, 3, 4, 8], help="how many times fewer multiply-accumulates")
    parser.add_argument("--searched", nargs="+", type=int, default=[4, 8], help="of these, those at which a search follows")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    rows = read_rows(ROWS)
    for name in arguments.networks:
        for seed in arguments.seeds:
            made = measure(name, seed, arguments.times, arguments.searched, arguments.steps)
            mine = {(row["network"], row["seed"], row["times"]) for row in made}
            rows = [row for row in rows if (row["network"], row["seed"], row["times"]) not in mine] + made
            write_rows(ROWS, sorted(rows, key=lambda row: (row["network"], row["times"], row["seed"])))
            PAGE.write_text(page(read_rows(ROWS)))


def measure(name: str, seed: int, times: list[int], searched: list[int], steps: int) -> list[Row]:
    """A row for each budget."""
    network = base(name, seed)
    images, labels = fashion("train", TRAIN + COMPARED)
    unseen, test = (images[TRAIN:], labels[TRAIN:]), fashion("t10k", TEST)
    how: dict[str, Any] = {"data": list(images[:CALIBRATION].split(BATCH)), "measure": False}

    def evaluate(module: Any) -> float:
        return accuracy(module, *unseen)

    budgets = {"macs": [1 / n for n in times]}
    folder = SCRATCH / f"front-{name}-{seed}-{'-'.join(map(str, times))}"
    swept = fxprune.sweep(
        network, images[:1], evaluate, budgets=budgets, rankings=RANKINGS, folder=folder, **VARIED[name], **how
    )
    rows = []
    for n in times:
        points = [p for p in swept.done if p.asked["macs"] == 1 / n]
        best = max(points, key=lambda p: p.value or 0.0)
        default = fxprune.prune(network, example_inputs=images[:1], macs=1 / n, data=how["data"], repair=True)
        started = time.process_time()
        after = [best]
        if n in searched:
            after = list(fxprune.search(network, images[:1], evaluate, start=best, steps=steps, seed=seed, **how).points)
        seconds, found = time.process_time() - started, max(after, key=lambda p: p.value or 0.0)
        rows.append(
            {
                "network": name,
                "seed": seed,
                "times": n,
                "method": method_of(best),
                "way": way_of(default),
                "steps": len(after) - 1,
                "seconds": seconds,
                "methods": {method_of(p): p.value for p in points},
                "macs": [p.macs / swept.original.macs for p in (best, found)],
                "compared": [swept.original.value, evaluate(default), best.value, found.value],
                "test": [accuracy(m, *test) for m in (network, default, best.model(), found.model())],
                "machine": machine(),
            }
        )
        print(rows[-1], flush=True)
    return rows


def method_of(point: Any) -> str:
    """What tells it from others of its budget."""
    return point.label.partition(" ")[2]


def way_of(model: Any) -> str:
    """What `prune` itself chose."""
    said = next((text for text in model.meta["chosen"] if text.startswith("way=")), "")
    return said.removeprefix("way=").partition(" (")[0].partition(",")[0]


def page(rows: list[Row]) -> str:
    lines = [
        "# Fronts on Fashion-MNIST: methods swept, and the best one searched",
        "",
        "Written by `fronts.py` from `fronts.jsonl`. At each budget all combinations of criteria, rankings and, where they",
        "mean something, bases and depth (the ViT loses dimensions within heads), repaired on",
        f"{CALIBRATION} images without labels. Methods, and steps of the",
        f"search, are compared on {COMPARED:,} images that nothing was trained on. Per cent of {TEST:,} test images that",
        "are classified rightly, and in brackets of those that were compared on. *prune* is",
        "`prune(macs=..., data=..., repair=True)`, which sees no labels, and the way that it chose.",
        "Rows without such a way were made by an earlier version, with fewer methods.",
        f"{'; '.join(sorted({row['machine'] for row in rows}))}.",
        "",
        "| network | seed | MACs, times fewer | unpruned | prune | | methods | best of the sweep | "
        "| after the search | steps | CPU s |",
        "|---|---:|---:|---:|---:|---|---:|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        whole, default, best, found = (f"{100 * t:.1f} ({100 * c:.1f})" for t, c in zip(row["test"], row["compared"]))
        start = f"| {row['network']} | {row['seed']} | {row['times']} | {whole} | {default} | {row.get('way', '')} "
        start += f"| {len(row['methods'])} | {best} | {row['method']} "
        lines.append(f"{start}| {found} | {row['steps']} | {row['seconds']:.0f} |" if row["steps"] else f"{start}| | | |")
    lines += [
        "",
        "The front against the best single method: means over the budgets of the images that methods were compared on.",
        "",
        "| network | seed | best single method | | front of the sweep | after the search |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for name, seed in dict.fromkeys((row["network"], row["seed"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["seed"]) == (name, seed)]
        means = {method: statistics.mean(row["methods"].get(method, 0.0) for row in mine) for method in mine[0]["methods"]}
        single = max(means, key=means.__getitem__)
        front, after = (statistics.mean(row["compared"][i] for row in mine) for i in (2, 3))
        lines.append(f"| {name} | {seed} | {single} | {100 * means[single]:.1f} | {100 * front:.1f} | {100 * after:.1f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
