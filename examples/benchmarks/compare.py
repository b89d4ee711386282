"""Time `fxprune.prune` of this checkout against that of another one; `phases.py --against` runs it.

    compare.py MODEL REPEATS       times the fxprune that is first on the path, and prints a line of JSON

Each round times one checkout and then the other, in a process of its own each, on one thread. Seconds are those of the
process's CPU, which other processes of the machine disturb less than the time of day.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sweep import Row, machine, markdown_table, read_rows, write_rows
from tqdm import tqdm

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "phases.jsonl", HERE / "PHASES.md"
MODES = {"without verification": False, "by default": "auto"}
SIDES = ("before", "after")


def time_prune(model: str, repeats: int) -> dict[str, float]:
    """CPU seconds of `prune` in each mode: the median of some runs after a warm-up."""
    import torch
    from models import build

    import fxprune

    torch.set_num_threads(1)
    network, images = build(model)
    found: dict[str, float] = {}
    for mode, verify in MODES.items():
        seconds = []
        for _ in range(repeats + 1):
            start = time.process_time()
            fxprune.prune(network, example_inputs=images[:1], verify=verify)
            seconds.append(time.process_time() - start)
        found[mode] = statistics.median(seconds[1:])
    return found


def compare(models: Sequence[str], before: Path, rounds: int, repeats: int = 3) -> list[Row]:
    """Rows of both checkouts' seconds, model by model; they replace those of the same models in `phases.jsonl`."""
    rows = read_rows(ROWS)
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for side, checkout in zip(SIDES, (before, HERE.parents[1]), strict=True):
            paths[side] = make_importable(checkout, Path(folder) / side)
        progress = tqdm(total=len(models) * rounds * len(SIDES), unit="process", disable=None)
        for model in models:
            row: Row = {"model": model, "machine": machine(), "seconds": {mode: {side: [] for side in SIDES} for mode in MODES}}
            for _ in range(rounds):
                for side in SIDES:
                    command = [sys.executable, __file__, model, str(repeats)]
                    environment = os.environ | {"PYTHONPATH": str(paths[side]), "OMP_NUM_THREADS": "1"}
                    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                    for mode, seconds in json.loads(done.stdout.splitlines()[-1]).items():
                        row["seconds"][mode][side].append(round(seconds, 4))
                    progress.update()
            rows = [*(other for other in rows if other["model"] != model), row]
            write_rows(ROWS, rows)
    TABLE.write_text(table(rows))
    return rows


def make_importable(checkout: Path, folder: Path) -> Path:
    """A folder from which a checkout imports as it does once it is installed: `passes/` is `fxprune.passes`."""
    package = folder / "fxprune"
    package.mkdir(parents=True)
    for part in (checkout.resolve() / "fxprune").iterdir():
        if part.name != "passes":
            (package / part.name).symlink_to(part)
    (package / "passes").symlink_to(checkout.resolve() / "passes")
    return folder


def ratio(row: Row, mode: str) -> float:
    """The median over rounds of the seconds after, as a share of those before."""
    sides = row["seconds"][mode]
    return statistics.median(b / a for a, b in zip(sides["before"], sides["after"], strict=True))


def table(rows: Sequence[Row]) -> str:
    columns = [("model", "l", lambda row: row["model"])]
    for mode in MODES:
        for side in SIDES:
            columns.append(
                (f"{mode}, {side}, s", "r", lambda row, m=mode, s=side: f"{statistics.median(row['seconds'][m][s]):.3f}")
            )
        columns.append(("ratio", "r", lambda row, m=mode: f"{ratio(row, m):.2f}"))
    medians = ", ".join(f"{statistics.median(ratio(row, mode) for row in rows):.2f} {mode}" for mode in MODES)
    names = sorted({row["machine"] for row in rows})
    return (
        "# Time of `prune` before and after\n\nWritten by `phases.py --against` from `phases.jsonl`: medians of CPU seconds"
        " on one thread; the ratio is the median over rounds. *before* is the other checkout.\n\n"
        f"- the median ratio is {medians}\n- {'; '.join(names)}\n\n" + markdown_table(columns, rows)
    )


if __name__ == "__main__":
    print(json.dumps(time_prune(sys.argv[1], int(sys.argv[2]))))
