"""Run a measurement once per job, each in its own process with a time limit, and keep the rows.

A sweep can be stopped and started again: jobs whose row is in the `.jsonl` already are skipped. The worker
is the same script with `--job JSON`; it prints its row as the last line of its output.
"""

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """All at once, so that a sweep that is stopped leaves a whole file."""
    scratch = path.with_suffix(".partial")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scratch.replace(path)


def sweep(
    script: str,
    jobs: Sequence[Row],
    path: Path,
    *,
    limit: float,
    settings: Row | None = None,
    redo: bool = False,
    workers: int = 1,
) -> list[Row]:
    """Every row of the file, after running the jobs whose row it lacks (with `redo`, all of them).

    A row belongs to the job all of whose items it holds; `settings` go to the worker but do not tell rows
    apart. `limit` is in seconds. `workers` jobs run at a time, on as many cores each as there are for them.
    """
    rows = read_rows(path)
    todo = [job for job in jobs if redo or find(rows, job) is None]
    progress = tqdm(total=len(todo), unit="job", disable=None)
    pool = ThreadPoolExecutor(workers)
    running = {pool.submit(run_job, script, {**job, **(settings or {})}, limit, workers): job for job in todo}
    try:
        for done in as_completed(running):
            job = running[done]
            row = {**job, **done.result()}
            tqdm.write(f"{row.get('status', '?'):<10} {' '.join(str(value) for value in job.values())}")
            at = find(rows, job)
            if at is None:
                rows.append(row)
            else:
                rows[at] = row
            write_rows(path, rows)
            progress.update()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in tuple(STARTED):
            end(worker)
    return rows


def options(
    parser: argparse.ArgumentParser,
    measure: Callable[..., Row],
    argv: Sequence[str] | None,
    *,
    memory: float = 0.6,
    alone: bool = False,
) -> argparse.Namespace | None:
    """The arguments of a script; None where it is a worker, which has then printed its row.

    Arguments: `memory`, see `limit_memory`; `alone`, whether jobs are timed and so run one at a time.
    """
    parser.set_defaults(workers=1)
    parser.add_argument("--redo", action="store_true", help="run again what the file has already")
    if not alone:
        parser.add_argument("--workers", type=int, default=1, help="jobs that run at a time")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.job:
        return arguments
    limit_memory(min(memory, 0.9 / arguments.workers))
    print(json.dumps(measure(**arguments.job)))
    return None


def find(rows: Sequence[Row], job: Row) -> int | None:
    return next((at for at, row in enumerate(rows) if job.items() <= row.items()), None)


STARTED: set["subprocess.Popen[str]"] = set()


def run_job(script: str, job: Row, limit: float, workers: int = 1) -> Row:
    """The row that the worker prints, or one with status `failed` and the reason in a line."""
    command = [sys.executable, script, "--job", json.dumps(job), *(["--workers", str(workers)] if workers > 1 else [])]
    threads = {} if workers == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    worker = subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that what it starts ends with it
        env=os.environ | threads,
    )
    STARTED.add(worker)
    try:
        output, errors = worker.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        end(worker)
        worker.communicate()
        return {"status": "failed", "reason": f"no result within {limit:.0f} s"}
    finally:
        STARTED.discard(worker)
    if worker.returncode == 0:
        return json.loads(output.splitlines()[-1])
    if worker.returncode < 0:
        return {"status": "failed", "reason": f"killed by {signal.Signals(-worker.returncode).name}"}
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no message")
    return {"status": "failed", "reason": last.strip()[:300]}


def end(worker: "subprocess.Popen[str]") -> None:
    """Kill a worker and what it started."""
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)


def limit_memory(share: float = 0.6) -> None:
    """Let an allocation of this process fail before the machine has to kill one of its own choosing.

    A worker calls it first: Torch-Pruning takes more than 20 GB to fail on a Swin.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_DATA, (int(share * total), resource.RLIM_INFINITY))


def one_line(error: BaseException) -> str:
    """The error's type and the first line of what it says."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


def markdown_table(columns: Sequence[tuple[str, str, Callable[[Row], object]]], rows: Iterable[Row]) -> str:
    """`columns` are (heading, "l" or "r", cell of a row)."""
    lines = [
        "| " + " | ".join(heading for heading, _, _ in columns) + " |",
        "|" + "|".join("---:" if side == "r" else "---" for _, side, _ in columns) + "|",
    ]
    for row in rows:
        cells = (str(cell(row)).replace("|", "\\|").replace("\n", " ") for _, _, cell in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """The processor, its cores and the versions a measurement depends on, in a line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
