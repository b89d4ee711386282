"""Checkpoints from strangers: each is refused by one PruneError, nothing in it runs, and it takes little memory."""

import copy
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import PruneError

HUGE = 10**15
DEEP = "[" * 100_000 + "]" * 100_000
Steps = tuple[str | int, ...]

# what stands where in a record, and what must not
TABLE: list[tuple[Steps, tuple[Any, ...]]] = [
    (("format",), (None, 1, "fxprune.checkpoint/2", "fxprune.plan/1")),
    (("plan",), (None, [], {}, "plan")),
    (("plan", "format"), (None, "fxprune.plan/3")),
    (("plan", "kept"), (None, {}, [], [3], [[HUGE]], [[3, 2, 1, 0]], [[-1, 0, 1, 2]], ["0123"])),
    (("plan", "keep", "0.weight", 0, "keep"), (None, -1, HUGE, "0", [0, 1, 2, 3])),
    (("plan", "shapes", "0.weight"), ([8, 5], [HUGE, 4], [])),
    (("plan", "inputs"), (None, {"tensor": {"shape": [1 << 20, 1 << 20], "dtype": "float32"}}, {"file": "/etc/passwd"})),
    (("plan", "inputs", "tensor", "shape"), ([1 << 25, 4], [2, 5], [])),
    (("fingerprint",), (None, "0" * 64)),
    (("graph",), (None, 1, "true")),
    (("state",), (None, [], {})),
    (("state", "apart"), (None, [3], "0")),
    (("state", "aliases"), ([3], [["0.weight", 3]], [["1.weight", "0.weight"]])),
    (("state", "orders"), ([["0.weight", [0, 0]]], [["0.weight", [0, 1, 2]]], [["0.weight", [HUGE, 0]]], [["0.weight", "01"]])),
    (("frozen_modules",), (None, [], {"0": 3})),
    (("meta",), (None, {"hook": {}}, {"verification": {}}, {"verification": {"error": "os.system('true')"}})),
    (("digests",), (None, {}, {"0.weight": "0"})),
]


def small_model(hidden: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 2)).eval()


def good(folder: Path) -> bytes:
    path = folder / "good.safetensors"
    fxprune.save(fxprune.prune(small_model(), 0.5, example_inputs=torch.randn(2, 4)), path)
    return path.read_bytes()


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The header of a file without its metadata, the record, and the bytes of the tensors."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header.pop("__metadata__")["fxprune"]), data[8 + length :]


def joined(header: Any, record: Any, tensors: bytes) -> bytes:
    text = record if isinstance(record, str) else json.dumps(record)
    digest = hashlib.sha256(text.encode()).hexdigest()  # so that it is the record's content that is refused
    head = json.dumps({"__metadata__": {"fxprune": text, "fxprune.sha256": digest}, **header}).encode()
    return len(head).to_bytes(8, "little") + head + tensors


def changed(data: Any, path: Steps, value: Any) -> Any:
    made = copy.deepcopy(data)
    owner = made
    for step in path[:-1]:
        owner = owner[step]
    owner[path[-1]] = value
    return made


def damaged_files(data: bytes) -> Iterator[tuple[str, bytes]]:
    header, record, tensors = parts(data)
    yield "empty", b""
    yield "seven bytes", data[:7]
    for at in (8, 100, len(data) // 2, len(data) - 1):
        yield f"cut at {at}", data[:at]
    yield "one byte more", data + b"\0"
    yield "a flipped bit at the end", data[:-1] + bytes([data[-1] ^ 1])
    yield "a changed record", data.replace(b'training\\": false', b'training\\": true ')
    yield "a pickle", b"\x80\x04cos\nsystem\n(S'touch executed'\ntR."
    yield "a zip", b"PK\x03\x04" + bytes(200)
    for length in (0, 1, len(data), 1 << 40, (1 << 64) - 1):
        yield f"a header of {length}", length.to_bytes(8, "little") + data[8:]
    for text in (b"", b"{", b"[]", b"\xff\xfe", DEEP.encode(), b'{"a":' * 5000):
        yield f"the header {text[:8]!r}", len(text).to_bytes(8, "little") + text
    wide = b"[" + b"[]," * (2 << 20) + b"[]]"
    yield "a header of six megabytes", len(wide).to_bytes(8, "little") + wide
    wide_record = "[" + "[]," * (1 << 20) + "[]]"
    yield "a record of three megabytes of lists", joined(header, wide_record, tensors)
    yield "a record nested too deeply", joined(header, DEEP, tensors)
    yield "an integer of ten thousand digits", joined(header, "9" * 10_000, tensors)
    for field, values in (
        ("shape", ([8, 4], [HUGE, HUGE], [-1, 4], [2, 8], "4", [])),
        ("dtype", ("F64", "I32", "BF16", "object", 3)),
        ("data_offsets", ([0, HUGE], [0, 1], [-8, 8], [64, 0], [1 << 63, 1 << 63])),
    ):
        for value in values:
            yield f"0.weight with {field} {value}", joined(changed(header, ("0.weight", field), value), record, tensors)
    others = {("9" if name == "0.weight" else name): entry for name, entry in header.items()}
    yield "another name", joined(others, record, tensors)
    yield "no record", joined(header, "", tensors)
    head = json.dumps(header).encode()
    yield "no metadata", len(head).to_bytes(8, "little") + head + tensors


def records(data: bytes) -> Iterator[tuple[str, bytes]]:
    header, record, tensors = parts(data)
    for path, values in TABLE:
        for value in values:
            yield f"{'.'.join(map(str, path))} = {str(value)[:30]}", joined(header, changed(record, path, value), tensors)
    for field in record:
        yield f"no {field}", joined(header, {name: value for name, value in record.items() if name != field}, tensors)
    many = copy.deepcopy(record)
    many["plan"]["kept"] = [list(range(100_000))]
    many["plan"]["shapes"] = {str(i): [200_000] for i in range(10_000)}
    many["plan"]["keep"] = {str(i): [{"dims": [0], "sizes": [100_000], "keep": 0}] for i in range(10_000)}
    yield "one list of indices ten thousand times", joined(header, many, tensors)
    other = copy.deepcopy(record)
    other["plan"]["keep"] = {}
    yield "a plan that cuts nothing", joined(header, other, tensors)


def hostile(folder: Path) -> Iterator[tuple[str, bytes]]:
    data = good(folder)
    yield from damaged_files(data)
    yield from records(data)


def outcomes(folder: Path) -> Iterator[tuple[str, str]]:
    """What came of each file: `refused`, or what else."""
    model, path = small_model(), folder / "bad.safetensors"
    for name, data in hostile(folder):
        path.write_bytes(data)
        try:
            fxprune.load(path, model)
        except PruneError as error:
            yield name, "refused" if error.fix and "\n" not in error.what and len(error.what) < 600 else f"{error}"
        except BaseException as error:
            yield name, f"{type(error).__name__}: {error}"
        else:
            yield name, "loaded"


def test_there_are_enough_of_them(tmp_path):
    assert len(list(hostile(tmp_path))) >= 100


def test_files_of_strangers_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not [(name, said) for name, said in outcomes(tmp_path) if said != "refused"]
    assert sorted(os.listdir(tmp_path)) == ["bad.safetensors", "good.safetensors"], "nothing was executed"


def test_the_good_one_is_loaded(tmp_path):
    data = good(tmp_path)
    (tmp_path / "again.safetensors").write_bytes(joined(*parts(data)))
    assert fxprune.load(tmp_path / "again.safetensors", small_model()).get_submodule("0").out_features == 4


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    cases = {tmp_path: "cannot be read", tmp_path / "none": "cannot be read", tmp_path / "pipe": "is no file"}
    for path, why in cases.items():
        with pytest.raises(PruneError, match=why):
            fxprune.load(path, small_model())
    for path in (None, 3, "a\0b", [tmp_path]):
        with pytest.raises(PruneError, match="is no path"):
            fxprune.load(path, small_model())


def test_they_take_little_memory(tmp_path):
    """In a process of its own: the most memory that it ever held, over what it held before; the files are small."""
    code = f"import test_hostile_checkpoints as t; t.report_memory({str(tmp_path)!r})"
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, env=env)
    assert float(done.stdout.split()[-1]) < 200, done.stdout


def report_memory(folder: str) -> None:
    path = Path(folder)
    largest = max(len(data) for _, data in hostile(path))
    fxprune.load(path / "good.safetensors", small_model())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    list(outcomes(path))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 - largest / (1 << 20))


def test_large_tensors_are_not_read_before_all_else_is_right(tmp_path):
    """A file of 400 MB whose last digest is wrong: it is mapped, and the model's memory is not touched."""
    code = f"import test_hostile_checkpoints as t; t.report_large({str(tmp_path)!r})"
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, env=env)
    assert float(done.stdout.split()[-1]) < 200, done.stdout


def report_large(folder: str) -> None:
    path = Path(folder) / "large.safetensors"
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 100_000), nn.ReLU(), nn.Linear(100_000, 2))
    small = fxprune.prune(model, 0.5, example_inputs=torch.randn(1, 1000), criterion="random").to_empty(device="cpu")
    fxprune.save(small, path)
    del small
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    code = f"import test_hostile_checkpoints as t; t.load_large({str(path)!r})"
    print(subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True).stdout)


def load_large(path: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 100_000), nn.ReLU(), nn.Linear(100_000, 2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PruneError, match="is damaged"):
        fxprune.load(path, model)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 - os.path.getsize(path) / (1 << 20))
