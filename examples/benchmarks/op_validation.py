"""Hold the specification of every op against the op itself, on torch's own samples (OpInfo).

    op_validation.py                      every op of torch's database, up to 8 samples each
    op_validation.py --only 'nn.*'        those whose name matches
    op_validation.py --show cumsum        what happens to each sample of one op

A sample is a program of one call whose tensors are parameters; half of them is removed at random, and the masked form of the
op on the whole tensors, then sliced, is compared with its rewritten call on the sliced tensors (`tests/op_samples.py`). Rows go
to `op_validation.jsonl`, one an op, and ops that are in it are not run again; the summary goes to `OP_VALIDATION.md`.
"""

import argparse
import fnmatch
import sys
from collections import Counter
from pathlib import Path

import torch
from sweep import Row, markdown_table, options, read_rows, sweep

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from op_samples import OPS, TOLERANCE, check, samples  # noqa: E402

ROWS, TABLE = HERE / "op_validation.jsonl", HERE / "OP_VALIDATION.md"
STATUSES = ("exact", "whole", "wrong", "crashed", "skipped")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=8, help="of each op, at most")
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of ops")
    parser.add_argument("--limit", type=float, default=300, help="seconds for the samples of an op")
    parser.add_argument("--show", metavar="OP", help="one op, sample by sample")
    arguments = options(parser, measure, argv)
    if arguments is None:
        return
    if arguments.show is not None:
        for sample in samples(arguments.show, arguments.samples):
            print(check(arguments.show, sample))
        return
    jobs = [{"op": name, "samples": arguments.samples} for name in OPS if fnmatch.fnmatchcase(name, arguments.only)]
    try:
        sweep(__file__, jobs, ROWS, limit=arguments.limit, redo=arguments.redo, workers=arguments.workers)
    finally:
        TABLE.write_text(table(read_rows(ROWS)))
    print(summary(read_rows(ROWS)))


def measure(op: str, samples: int) -> Row:
    """The row of an op: how many samples ended how, and the dispatcher functions that have no specification."""
    torch.set_num_threads(1)
    outcomes = [check(op, sample) for sample in given(op, samples)]
    counts = Counter(outcome.status for outcome in outcomes)
    failed = next((o for o in outcomes if o.failed), None)
    exact = [o.error for o in outcomes if o.status == "exact"]
    return {
        **{status: counts[status] for status in STATUSES if counts[status]},
        **({"error": float(f"{max(exact):.1e}")} if exact else {}),
        **({"unknown": unknown} if (unknown := sorted({name for o in outcomes for name in o.unknown})) else {}),
        **({"message": " ".join(failed.message.split())[:200]} if failed else {}),
        "status": "failed" if failed else "exact" if exact else "whole" if counts["whole"] else "skipped",
    }


def given(op: str, count: int) -> list[object]:
    return list(samples(op, count))


def totals(rows: list[Row]) -> dict[str, int]:
    return {status: sum(row.get(status, 0) for row in rows) for status in STATUSES}


def summary(rows: list[Row]) -> str:
    found = totals(rows)
    validated = sum(1 for row in rows if row["status"] == "exact")
    counts = ", ".join(f"{found[status]} {status}" for status in STATUSES)
    return f"{validated} of {len(rows)} ops validated with something removed; samples: {counts}"


def table(rows: list[Row]) -> str:
    found, kinds = totals(rows), Counter(row["status"] for row in rows)
    meaning = {
        "exact": "something was removed, and the two agree",
        "whole": "every dimension of the sample is kept, with a reason",
        "wrong": "the two differ",
        "crashed": "an exception",
        "skipped": "no tensor of fractions, random numbers, sparse results, or NaN",
    }
    columns = [
        ("samples that are", "l", lambda row: row["what"]),
        ("count", "r", lambda row: row["count"]),
        ("that is", "l", lambda row: row["meaning"]),
    ]
    lines = [{"what": s, "count": found[s], "meaning": meaning[s]} for s in STATUSES]
    names = {status: sorted(row["op"] for row in rows if row["status"] == status) for status in kinds}
    unknown = sorted({name.removesuffix(".default") for row in rows for name in row.get("unknown", ())})
    without = sorted(row["op"] for row in rows if row.get("unknown"))
    broken = [f"- `{row['op']}`: {row.get('message', row.get('reason', ''))}\n" for row in rows if row["status"] == "failed"]
    return (
        "# Single ops\n\n"
        "Written by `op_validation.py` from `op_validation.jsonl`. Every op of torch's database (OpInfo) runs on torch's own"
        " samples in double precision, as a program of one call whose tensors are parameters. Half of what may go is removed"
        " at random; the masked form of the op on the whole tensors, then sliced, is compared with its rewritten call on the"
        f" sliced tensors, to {TOLERANCE:.0e}.\n\n"
        f"{summary(rows)}.\n\n{markdown_table(columns, lines)}\n"
        f"- Ops that fail: {(''.join(broken) and len(broken)) or 'none'}.\n{''.join(broken)}"
        f"- Ops none of whose samples lose anything ({kinds['whole']}): {', '.join(names.get('whole', []))}.\n"
        f"- Ops that reach a dispatcher function without a specification ({len(without)}), which the autograd probe reads:"
        f" {', '.join(without)}.\n"
        f"- Those dispatcher functions ({len(unknown)}): {', '.join(unknown)}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
