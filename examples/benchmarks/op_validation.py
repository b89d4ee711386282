"""Hold the specification of every op against the op itself, on torch's own samples (OpInfo).

    op_validation.py                      every op of torch's database, up to 24 samples each
    op_validation.py --only 'nn.*'        those whose name matches
    op_validation.py --show cumsum        what happens to each sample of one op

A sample is a program of one call whose tensors are parameters, laid out in up to four ways. Channels are removed at random; the
rewritten call on the sliced tensors is compared with the masked form of the op and with brute force (`tests/op_samples.py`).
Rows go to `op_validation.jsonl`, one an op, and ops that are in it are not run again; the summary goes to `OP_VALIDATION.md`.
"""

import argparse
import fnmatch
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from sweep import Row, markdown_table, options, read_rows, shorten_paths, sweep, write_rows

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from brute_force import TOLERANCE  # noqa: E402
from op_samples import OPS, layouts_of, samples  # noqa: E402

ROWS, TABLE = HERE / "op_validation.jsonl", HERE / "OP_VALIDATION.md"
MEANING = {
    "exact": "something is removed, and all agree",
    "several": "a Python function of several calls, which agree with their masked forms; brute force judges single calls",
    "whole": "nothing is removed: all is frozen, with a reason, or has one unit",
    "wrong": "they disagree",
    "crashed": "an exception",
    "skipped": "the sample says nothing, for the reasons below",
}
REFERENCES = {
    "entries": "what stays of a result does not change with what is removed, and is what it was",
    "zeros": "it is what the op computes with zeros for what is removed",
    "alone": "it is what the op computes of the kept entries alone",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=24, help="of each op, at most")
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of ops")
    parser.add_argument("--limit", type=float, default=300, help="seconds for the samples of an op")
    parser.add_argument("--show", metavar="OP", help="one op, sample by sample")
    arguments = options(parser, measure, argv)
    if arguments is None:
        return
    if arguments.show is not None:
        for sample in samples(arguments.show, arguments.samples):
            for layout, outcome in layouts_of(arguments.show, sample):
                print(layout, outcome)
        return
    jobs = [{"op": name, "samples": arguments.samples} for name in OPS if fnmatch.fnmatchcase(name, arguments.only)]
    try:
        sweep(__file__, jobs, ROWS, limit=arguments.limit, redo=arguments.redo, workers=arguments.workers)
    finally:
        rows = sorted(read_rows(ROWS), key=lambda row: list(OPS).index(row["op"]))
        write_rows(ROWS, rows)
        TABLE.write_text(table(rows))
    print(summary(rows))


def measure(op: str, samples: int) -> Row:
    """The row of an op: how its samples and their programs ended, and what has no specification."""
    torch.set_num_threads(1)
    per_sample = [[outcome for _, outcome in layouts_of(op, sample)] for sample in given(op, samples)]
    outcomes = [outcome for found in per_sample for outcome in found]
    ends = Counter(end(o.status for o in found) for found in per_sample)
    failed = next((o for o in outcomes if o.failed), None)
    return {
        "status": end(ends),
        **counted(ends),
        "programs": counted(o.status for o in outcomes),
        **named("references", counted(name for o in outcomes for name in o.references if name)),
        **named("unknown", sorted({name.removesuffix(".default") for o in outcomes for name in o.unknown})),
        **named("why", counted(o.message for o in outcomes if o.status == "skipped")),
        **named("message", shorten_paths(" ".join(failed.message.split()))[:300] if failed else ""),
    }


def given(op: str, count: int) -> list[object]:
    return samples(op, count)


def end(statuses: Iterable[str]) -> str:
    """Of how several programs ended, what comes first: a failure, then what is validated."""
    return min(statuses, key=["wrong", "crashed", "exact", "several", "whole", "skipped"].index, default="skipped")


def counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def named(name: str, value: object) -> Row:
    return {name: value} if value else {}


def failed(row: Row) -> bool:
    return row["status"] in ("wrong", "crashed", "failed")


def summary(rows: list[Row]) -> str:
    counts = Counter(row["status"] for row in rows)
    exact = sum(row.get("exact", 0) for row in rows)
    programs = sum(row.get("programs", {}).get("exact", 0) for row in rows)
    return (
        f"{counts['exact']} of {len(rows)} ops are validated, with {exact} samples in {programs} programs; "
        f"{sum(map(failed, rows)) or 'none'} fail"
    )


def table(rows: list[Row]) -> str:
    def total(status: str) -> Row:
        return {
            "what": status,
            "ops": sum(row["status"] == status for row in rows),
            "samples": sum(row.get(status, 0) for row in rows),
            "programs": sum(row.get("programs", {}).get(status, 0) for row in rows),
            "meaning": MEANING[status],
        }

    columns = [(name, "r", lambda row, name=name: row[name]) for name in ("ops", "samples", "programs")]
    ends = markdown_table(
        [("status", "l", lambda row: row["what"]), *columns, ("that is", "l", lambda row: row["meaning"])], map(total, MEANING)
    )
    return (
        "# Single ops\n\n"
        "Written by `op_validation.py` from `op_validation.jsonl`. Every op of torch's database (OpInfo) runs on torch's own"
        " samples in double precision, as a program of one call whose tensors are parameters: as they are, shuffled along a"
        " dimension, repeated along one, and with two dimensions that were one before. Half of what may go or more is removed"
        " at random. The rewritten call on the sliced tensors must equal the masked form of the op on the whole tensors, and"
        f" what brute force finds by running the op, which knows nothing of labels, to {TOLERANCE:.0e}. And no result may lose"
        " what is computed from kept entries alone.\n\n"
        f"torch {torch.__version__.partition('+')[0]}: {summary(rows)}. An op or a sample counts where it says most: a failure"
        f" before what is exact, that before what is whole.\n\n{ends}\n" + lists(rows)
    )


def lists(rows: list[Row]) -> str:
    references = Counter[str]()
    reasons = Counter[str]()
    for row in rows:
        references.update(row.get("references", {}))
        reasons.update(row.get("why", {}))
    names = {status: [f"`{row['op']}`" for row in rows if row["status"] == status] for status in MEANING}
    unknown = [row for row in rows if row.get("unknown")]
    broken = [f"- `{row['op']}`: {row.get('message', row.get('reason', ''))}\n" for row in rows if failed(row)]
    return (
        "## What brute force found the results to equal\n\n"
        + "".join(f"- `{name}`, {references[name]} results: {meaning}.\n" for name, meaning in REFERENCES.items())
        + f"\n## Ops that fail: {len(broken) or 'none'}\n\n{''.join(broken)}"
        + f"## Ops without a specification: {len(unknown)}\n\n"
        "Their samples reach a dispatcher function that has none. The autograd probe reads what it does; what it cannot read is"
        " kept whole.\n\n"
        + "".join(f"- `{row['op']}` ({', '.join(row['unknown'])}): {row['status']}\n" for row in unknown)
        + f"\n## Ops all of whose samples are kept whole: {len(names['whole'])}\n\n{', '.join(names['whole'])}\n"
        + f"\n## Ops none of whose samples says anything: {len(names['skipped'])}\n\n"
        + "The op "
        + ", ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items()))
        + f"; or it has no samples of 64-bit fractions.\n\n{', '.join(names['skipped'])}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
