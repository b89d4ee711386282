"""Run a measurement once per job, each in its own process with a time limit, and keep the rows.

A sweep can be stopped and started again: jobs whose row is in the `.jsonl` already are skipped. The worker is the same
script with `--worker`: it has done its imports, which take longer than many a job, reads jobs as lines of JSON, and answers
each with a row that a process forked for it has made.
"""

import argparse
import json
import os
import platform
import queue
import re
import resource
import select
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
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    team = [Worker(script, workers) for _ in range(workers if todo else 0)]
    for worker in team:
        idle.put(worker)

    def run(job: Row) -> Row:
        worker = idle.get()
        try:
            return worker.row({**job, **(settings or {})}, limit)
        finally:
            idle.put(worker)

    running = {pool.submit(run, job): job for job in todo}
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
        for worker in team:
            worker.end()
    return rows


def options(
    parser: argparse.ArgumentParser,
    measure: Callable[..., Row],
    argv: Sequence[str] | None,
    *,
    memory: float = 0.6,
    alone: bool = False,
    prepare: Callable[..., None] = lambda **job: None,
) -> argparse.Namespace | None:
    """The arguments of a script; None where it is a worker, which has then printed its row.

    Arguments: `memory`, see `limit_memory`; `alone`, whether jobs are timed and so run one at a time; `prepare`, what the
    process that forks does before it forks for a job.
    """
    parser.set_defaults(workers=1)
    parser.add_argument("--redo", action="store_true", help="run again what the file has already")
    if not alone:
        parser.add_argument("--workers", type=int, default=1, help="jobs that run at a time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.worker:
        return arguments
    serve(measure, prepare, min(memory, 0.9 / arguments.workers))
    return None


def serve(measure: Callable[..., Row], prepare: Callable[..., None], memory: float) -> None:
    """Answer every job on standard input; what jobs print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        job = json.loads(line)
        prepare(**job)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            limit_memory(memory)
            try:
                row = measure(**job)
            except BaseException as error:  # a SystemExit, too, must not leave this loop to two processes
                row = {"status": "failed", "reason": one_line(error)}
            with os.fdopen(writing, "w") as pipe:
                json.dump(row, pipe)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            answer = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code < 0:
            answer = json.dumps({"status": "failed", "reason": f"killed by {signal.Signals(-code).name}"})
        print(answer, file=answers, flush=True)


def find(rows: Sequence[Row], job: Row) -> int | None:
    return next((at for at, row in enumerate(rows) if job.items() <= row.items()), None)


class Worker:
    """A process of `script` that answers jobs; one of `workers` that share the cores."""

    def __init__(self, script: str, workers: int) -> None:
        self.command = [sys.executable, script, "--worker", *(["--workers", str(workers)] if workers > 1 else [])]
        self.threads = {} if workers == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
        self.process: subprocess.Popen[str] | None = None

    def row(self, job: Row, limit: float) -> Row:
        """The row of a job, or one with status `failed` and the reason in a line; `limit` in seconds, imports included."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that what it starts ends with it
                env=os.environ | self.threads,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(job), file=self.process.stdin, flush=True)
            if not select.select([self.process.stdout], [], [], limit)[0]:
                self.end()
                return {"status": "failed", "reason": f"no result within {limit:.0f} s"}
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            self.end()
            return {"status": "failed", "reason": "the worker ended"}

    def end(self) -> None:
        """Kill the process and what it started; the next job starts another."""
        process, self.process = self.process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def limit_memory(share: float = 0.6) -> None:
    """Let an allocation of this process fail before the machine has to kill one of its own choosing.

    A worker calls it first: Torch-Pruning takes more than 20 GB to fail on a Swin.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_DATA, (int(share * total), resource.RLIM_INFINITY))


def one_line(error: BaseException) -> str:
    """The error's type and the first line of its message, without paths of this machine."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {shorten_paths(first)}"[:300]


def shorten_paths(text: str) -> str:
    """The text with every absolute path cut to what follows `site-packages`, or to the name of the file.

    >>> shorten_paths("no x in '/opt/venv/lib/python3.11/site-packages/timm/layers.py', nor in /opt/venv/a.pt")
    "no x in 'timm/layers.py', nor in a.pt"
    """
    return re.sub(
        r"(?<![\w.:/*-])(?:/[\w.+@~-]+){2,}/?",
        lambda path: re.split(r"/(?:site|dist)-packages/", path[0])[-1] if "-packages/" in path[0] else Path(path[0]).name,
        text,
    )


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
