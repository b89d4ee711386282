"""What fxprune costs before it prunes: CPU seconds of its imports beyond torch's, each time in a fresh process.

    startup.py
    startup.py --against PATH --rounds 9       in turns with another checkout of this repository

`import fxprune`, then what the first use of `fxprune.prune` and of some other functions imports: medians over the rounds,
after a first one in which Python compiles the files. The table goes to `STARTUP.md`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from compare import HERE, make_importable
from sweep import machine, markdown_table

TABLE = HERE / "STARTUP.md"
STEPS = {
    "import fxprune": "import fxprune",
    "the first `fxprune.prune`": "fxprune.prune",
    "then `report`, `repair`, `Pruner`": "fxprune.report, fxprune.repair, fxprune.Pruner",
}
TIMED = """
import json, time, torch
spent = []
for step in {steps}:
    start = time.process_time()
    exec(step)
    spent.append(time.process_time() - start)
print(json.dumps(spent))
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--against", type=Path, help="another checkout, to be timed in turns with this one")
    arguments = parser.parse_args(argv)
    sides = {"after": HERE.parents[1]} if arguments.against is None else {"before": arguments.against, "after": HERE.parents[1]}
    TABLE.write_text(table(measure(sides, arguments.rounds)))
    print(TABLE.read_text(), end="")


def measure(sides: dict[str, Path], rounds: int) -> dict[str, list[list[float]]]:
    """For each checkout the seconds of each step, round by round."""
    found: dict[str, list[list[float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        paths = {side: make_importable(checkout, Path(folder) / side) for side, checkout in sides.items()}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        for number in range(rounds + 1):
            for side, path in paths.items():
                environment |= {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
                program = [sys.executable, "-c", TIMED.format(steps=list(STEPS.values()))]
                done = subprocess.run(program, env=environment, cwd=path, stdout=subprocess.PIPE, text=True, check=True)
                if number:
                    found[side].append(json.loads(done.stdout))
    return found


def table(found: dict[str, list[list[float]]]) -> str:
    columns = [("", "l", lambda row: row[0])]
    columns += [(f"{side}, s", "r", lambda row, side=side: f"{row[1][side]:.3f}") for side in found]
    rows = [
        (name, {side: statistics.median(spent[i] for spent in rounds) for side, rounds in found.items()})
        for i, name in enumerate(STEPS)
    ]
    title = "# What fxprune costs before it prunes"
    how = "Written by `startup.py`: CPU seconds beyond `import torch`, in a fresh process."
    return f"{title}\n\n{how}\n\n- {machine()}\n\n{markdown_table(columns, rows)}"


if __name__ == "__main__":
    sys.exit(main())
