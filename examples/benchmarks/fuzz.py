"""Prune thousands of random programs and hold each against its masked original.

    fuzz.py                               10,000 graphs from seed 0
    fuzz.py --count 500 --seed 123456     others
    fuzz.py --show 1234                   what happens to one seed, shrunk if it fails

A block of 100 graphs is a process. Rows go to `fuzz.jsonl`, one a block, and blocks that are in it are not
run again; the summary goes to `FUZZ.md`. The programs are those of `tests/fuzzing.py`.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from sweep import Row, machine, markdown_table, options, read_rows, sweep

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from fuzz_steps import OPS  # noqa: E402
from fuzzing import TOLERANCE, check, draw  # noqa: E402
from shrinking import fails_like, shrink  # noqa: E402

ROWS, TABLE = HERE / "fuzz.jsonl", HERE / "FUZZ.md"
BLOCK = 100
STATUSES = ("exact", "refused", "wrong", "crashed")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="the first; a graph has the seed after the one before it")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a block of 100 graphs")
    parser.add_argument("--show", type=int, metavar="SEED", help="one program, and what happens to it")
    arguments = options(parser, measure, argv)
    if arguments is None:
        return
    if arguments.show is not None:
        show(arguments.show)
        return
    seeds = range(arguments.seed, arguments.seed + arguments.count, BLOCK)
    jobs = [{"seed": seed, "graphs": min(BLOCK, arguments.seed + arguments.count - seed)} for seed in seeds]
    try:
        sweep(__file__, jobs, ROWS, limit=arguments.limit, redo=arguments.redo, workers=arguments.workers)
    finally:
        TABLE.write_text(table(read_rows(ROWS)))
    print(summary(read_rows(ROWS)))


def measure(seed: int, graphs: int) -> Row:
    """The row of a block: how many ended how, and the seeds of those that failed."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    outcomes = {number: check(draw(number)) for number in range(seed, seed + graphs)}
    counts = Counter(outcome.status for outcome in outcomes.values())
    removed = [outcome.removed for outcome in outcomes.values()]
    return {
        **{status: counts[status] for status in STATUSES},
        "removed": round(sum(removed) / graphs, 4),
        "at_least_15": sum(share >= 0.15 for share in removed),
        "error": max((o.error for o in outcomes.values() if o.status == "exact"), default=0.0),
        "failures": {s: [n for n, o in outcomes.items() if o.status == s] for s in ("wrong", "crashed") if counts[s]},
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine(),
    }


def show(seed: int) -> None:
    program = draw(seed)
    outcome = check(program)
    if outcome.failed:
        program = shrink(program, fails_like(outcome))
        outcome = check(program)
    print(program.source())
    print(f"{outcome.status}: {outcome.removed:.0%} removed, error {outcome.error:.1e} {outcome.message}")


def totals(rows: list[Row]) -> dict[str, float]:
    done = [row for row in rows if "exact" in row]
    graphs = sum(row["graphs"] for row in done)
    found = {status: sum(row[status] for row in done) for status in STATUSES}
    removed = sum(row["removed"] * row["graphs"] for row in done) / max(graphs, 1)
    reached = sum(row["at_least_15"] for row in done) / max(graphs, 1)
    failed = sum(row["graphs"] for row in rows) - graphs
    return {"graphs": graphs, **found, "removed": removed, "reached": reached, "not finished": failed}


def summary(rows: list[Row]) -> str:
    found = totals(rows)
    counts = ", ".join(f"{found[status]} {status}" for status in STATUSES)
    return (
        f"{found['graphs']} graphs: {counts}; {found['removed']:.1%} of the parameters removed on average,"
        f" at least 15 % from {found['reached']:.0%} of the graphs"
    )


def table(rows: list[Row]) -> str:
    found = totals(rows)
    lines = [
        {"what": f"{status}", "count": found[status], "share": found[status] / max(found["graphs"], 1)} for status in STATUSES
    ]
    columns = [
        ("outcome", "l", lambda row: row["what"]),
        ("graphs", "r", lambda row: row["count"]),
        ("share", "r", lambda row: f"{row['share']:.1%}"),
    ]
    failures = [seed for row in rows for seeds in row.get("failures", {}).values() for seed in seeds]
    broken = [f"- block {row['seed']}: {row['reason']}\n" for row in rows if "reason" in row]
    worst = max((row.get("error", 0.0) for row in rows), default=0.0)
    return (
        "# Random programs\n\n"
        f"Written by `fuzz.py` from `fuzz.jsonl`. A graph is drawn from a seed out of {len(OPS) - 1} kinds of steps, with"
        " random weights, norms and running statistics in double precision, and pruned at a random ratio from 0.1 to 0.8, by"
        " heads or dimensions, some with `round_to` and `freeze`. It is exact if the result agrees with the masked original to"
        f" {TOLERANCE:.0e}: with `fxprune.verify`, and, where no statistic sees removed channels, with the original whose"
        " removed parameters are zero. It is refused where `prune` says that nothing can be pruned.\n\n"
        f"{markdown_table(columns, lines)}\n"
        f"- Parameters removed: {found['removed']:.1%} on average, those refused counted as none; at least 15 % from"
        f" {found['reached']:.0%} of the graphs.\n"
        f"- The largest error of an exact one: {worst:.0e}.\n"
        f"- Seeds that fail: {', '.join(map(str, failures)) or 'none'}.\n"
        + "".join(broken)
        + "".join(
            f"- {n} blocks on {name}\n" for name, n in Counter(r["machine"] for r in rows if "machine" in r).most_common()
        )
    )


if __name__ == "__main__":
    sys.exit(main())
