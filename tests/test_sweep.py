"""`examples/benchmarks/sweep.py`: a worker answers whatever becomes of its jobs."""

import json

import pytest

SCRIPT = """
import argparse, os, signal, sys, time
sys.path.insert(0, {folder!r})
from sweep import options

def prepare(what):
    global prepared
    prepared = os.getpid()

def measure(what):
    print("noise")
    if what == "sleep":
        time.sleep(60)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise ValueError("no\\nsecond line")
    if what == "exit":
        raise SystemExit("enough")
    return {{"status": "done", "forked": os.getppid() == prepared, "server": prepared}}

options(argparse.ArgumentParser(), measure, None, prepare=prepare)
"""


@pytest.fixture
def script(tmp_path, benchmarks):
    import sweep

    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(folder=str(sweep.__file__).rpartition("/")[0]))
    return str(path)


def test_a_worker_answers_every_job(script):
    import sweep

    worker = sweep.Worker(script, 1)
    try:
        first = worker.row({"what": "run"}, 120)
        assert first["status"] == "done" and first["forked"]
        assert worker.row({"what": "raise"}, 120) == {"status": "failed", "reason": "ValueError: no"}
        assert worker.row({"what": "exit"}, 120) == {"status": "failed", "reason": "SystemExit: enough"}
        assert worker.row({"what": "die"}, 120) == {"status": "failed", "reason": "killed by SIGKILL"}
        assert worker.row({"what": "run"}, 120)["server"] == first["server"]
        assert worker.row({"what": "sleep"}, 1) == {"status": "failed", "reason": "no result within 1 s"}
        assert worker.row({"what": "run"}, 120)["server"] != first["server"]
    finally:
        worker.end()


def test_a_sweep_runs_what_its_file_lacks(script, tmp_path):
    import sweep

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"what": "run", "status": "from before"}) + "\n")
    rows = sweep.sweep(script, [{"what": "run"}, {"what": "raise"}], path, limit=120, workers=2)
    assert [(row["what"], row["status"]) for row in rows] == [("run", "from before"), ("raise", "failed")]
    assert sweep.read_rows(path) == rows
