"""`examples/benchmarks/sweep.py`: a worker answers whatever becomes of its jobs."""

import json
import re
from pathlib import Path

import pytest

SUFFIXES = (".py", ".md", ".json", ".jsonl", ".svg")
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


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("'/opt/venv/lib/python3.11/site-packages/timm/layers.py' is broken", "'timm/layers.py' is broken"),
        ("no file /tmp/some where/weights.pt", "no file some where/weights.pt"),
        ("[/home/user/net.py:12]", "[net.py:12]"),
        ("see https://pytorch.org/docs/stable, 3/4 of a/b/c", "see https://pytorch.org/docs/stable, 3/4 of a/b/c"),
    ],
)
def test_errors_name_no_folder_of_the_machine(text, short):
    import sweep

    assert sweep.one_line(ValueError(text)) == f"ValueError: {short}"


def test_no_file_names_a_folder_of_a_machine():
    root = Path(__file__).parents[1]
    folders = ("docs", "examples", "fxprune", "passes", "tests")
    files = [*root.glob("*.md"), *(p for folder in folders for p in (root / folder).rglob("*") if p.suffix in SUFFIXES)]
    folder = re.compile(r"(?<![\w.])/(work|tmp|root|home)/\w+|/site-packages/\w+")
    found = [
        f"{path.name}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if folder.search(line) and "/opt/venv" not in line and path != Path(__file__)
    ]
    assert len(files) > 100 and not found
