"""The command line: tables, JSON, a graph, and errors as messages."""

import json
import re
import subprocess
import sys

import networkx as nx
import pytest

import fxprune
from fxprune import inspect
from fxprune.cli import models
from fxprune.reports.coupling_graph import to_dot

FILE = """
import torch
from torch import nn
from beside import WIDTH

print("a file may print")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.second = nn.Linear(WIDTH, 12)
        self.last = nn.Linear(12, 2)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())

model = Net()
example_inputs = torch.randn(1, 4)
"""

TABLE = """\
Net: 2 prunable families of 18 units, 2 families kept whole

prunable family   role   units   width   parameters   spans
──────────────────────────────────────────────────────────────
second  hidden layer   12       1          108   second:0, last:1
first   hidden layer    6       1          102   first:0, second:1

kept whole    role    units   width   parameters   because it
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "beside.py").write_text("WIDTH = 6\n")
    path = tmp_path / "model.py"
    path.write_text(FILE)
    yield path
    sys.modules.pop("beside", None)


def refused(capsys, *argv):
    """The message on standard error of a call that fails, and nothing else."""
    assert inspect.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err
    return err.removeprefix("a file may print\n").removeprefix("fxprune inspect: ")


def test_table(file, capsys):
    assert inspect.main([str(file)]) == 0
    out, err = capsys.readouterr()
    assert plain(out).startswith(plain(TABLE))
    assert re.search(r"last +2 +1 +26 +is an output of the model", out)
    assert err == "a file may print\n"


def plain(text):
    """Without rules and spaces, whose number depends on the longest reason."""
    return re.sub(r"[─\s]+", " ", text)


def test_json_and_nothing_else(file, capsys):
    assert inspect.main([str(file), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["model"] == "Net"
    by_name = {f["name"]: f for f in data["families"]}
    assert by_name["first"] == {
        "name": "first",
        "role": "hidden layer",
        "units": 6,
        "width": 1,
        "parameters": 102,
        "frozen": None,
        "members": [["first.weight", 0], ["first.bias", 0], ["second.weight", 1]],
    }
    assert by_name["last"]["frozen"] == "is an output of the model"


def test_freeze_may_be_repeated(file, capsys):
    assert inspect.main([str(file), "--json", "--freeze", "first", "--freeze", "l*t"]) == 0
    families = json.loads(capsys.readouterr().out)["families"]
    frozen = {f["name"]: f["frozen"] for f in families}
    assert frozen["first"] == "is frozen by freeze='first', which holds second:1 too"
    assert frozen["second"] == "is frozen by freeze='l*t', which holds second:0 too"


def test_attention(capsys):
    units = {}
    for attention in ("heads", "dims"):
        assert inspect.main(["timm:test_vit", "--json", "--attention", attention]) == 0
        families = json.loads(capsys.readouterr().out)["families"]
        units[attention] = sum(f["units"] for f in families if f["name"].partition("#")[0] == "blocks.0.attn.qkv")
    assert units == {"heads": 2, "dims": 128}


def test_dot(file, tmp_path, capsys):
    target = tmp_path / "net.dot"
    target.write_text("what was there before")
    assert inspect.main([str(file), "--dot", str(target)]) == 0
    text = target.read_text()
    assert text.startswith('graph "Net" {\n') and text.endswith("}\n")
    assert 'label="second.weight:1\\n6 indices"' in text
    assert 'label="last.bias:0\\n2 indices", style=dashed' in text
    nodes, edges = len(re.findall(r"n\d+ \[", text)), len(re.findall(r"n\d+ -- n\d+;", text))
    assert (nodes, edges) == (9, 5)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["beside.py", "model.py", "net.dot"]


def test_dot_that_cannot_be_written_leaves_nothing_behind(file, tmp_path, capsys):
    before = set(tmp_path.iterdir())
    err = refused(capsys, file, "--dot", tmp_path / "nowhere" / "net.dot")
    nowhere = tmp_path / "nowhere"
    assert err == f"error: the graph cannot be written: there is no folder {nowhere}; fix: mkdir -p {nowhere}\n"
    taken = tmp_path / "taken"
    taken.mkdir()
    assert f"cannot be written: {taken} is a folder" in refused(capsys, file, "--dot", taken)
    assert set(tmp_path.iterdir()) - before <= {taken, tmp_path / "__pycache__"}


def test_dot_quotes_names():
    graph = nx.Graph([('say "x"', "back\\slash")])
    assert 'label="say \\"x\\""' in to_dot(graph, "n") and 'label="back\\\\slash"' in to_dot(graph, "n")


def test_there_is_no_file(capsys):
    assert refused(capsys, "nowhere.py") == (
        "error: there is no file nowhere.py; fix: file.py:model, package.module:function, torchvision:resnet50,"
        " timm:resnet50 or hf:folder\n"
    )


@pytest.mark.parametrize("missing", ["model", "example_inputs"])
def test_the_file_lacks_a_name(file, capsys, missing):
    file.write_text(re.sub(rf"^{missing} = ", "other = ", FILE, flags=re.MULTILINE))
    err = refused(capsys, file)
    assert err.startswith(f"error: the file defines no `{missing}`; at {file}; fix: ")
    assert f"define `{missing}` at its top level" in err


def test_the_model_is_no_module(file, capsys):
    file.write_text("model = 3\nexample_inputs = 4\n")
    assert refused(capsys, file) == (f"error: `model` is of type int, not a torch.nn.Module; at {file}; fix: model = Net()\n")


@pytest.mark.parametrize(
    "source, what, line",
    [
        ("import torch\nx = 1 / 0\n", "ZeroDivisionError: division by zero", 2),
        ("x = 1\ny = = 2\n", "SyntaxError: invalid syntax", 2),
        ("def f():\n    raise SystemExit(1)\n\nf()\n", "SystemExit: 1", 2),
    ],
)
def test_the_file_raises(file, capsys, source, what, line):
    file.write_text(source)
    assert re.fullmatch(
        rf"error: the file raises {re.escape(what)}.*; at {file}:{line}; fix: make `python {file}` run\n",
        refused(capsys, file),
    )
    assert "model" not in sys.modules and str(file.parent) not in sys.path


@pytest.mark.parametrize(
    "name, what, fix",
    [
        ("torchvision:resnet51", "torchvision has no model called 'resnet51'", "torchvision:resnet50 or "),
        ("timm:test_vitt", "timm has no model called 'test_vitt'", "timm:test_vit"),
        ("timm:????", "timm has no model called '????'", "one of the names of timm's list_models()\n"),
    ],
)
def test_unknown_model(capsys, name, what, fix):
    assert refused(capsys, name).startswith(f"error: {what}; fix: {fix}")


def test_what_prune_refuses_is_refused(file, capsys):
    err = refused(capsys, file, "--freeze", "frist")
    fix = "one of the names of model.named_modules(), such as first, last"
    assert err == f"error: the glob 'frist' in freeze matches no module; fix: {fix}\n"


@pytest.mark.parametrize("argv", [[], ["timm:test_vit", "--attention", "x"], ["a", "b"]])
def test_usage(argv, capsys):
    assert re.fullmatch(r"(fxprune: )?error: .*; see fxprune( inspect)? --help\n", refused(capsys, *argv))


def test_as_a_module():
    command = [sys.executable, "-m", "fxprune.inspect", "nowhere.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"fxprune inspect: error: there is no file nowhere.py; fix: .*\n", done.stderr)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("torchvision:squeezenet1_1", (1, 3, 224, 224)),
        ("torchvision:r3d_18", (1, 3, 16, 224, 224)),
        ("timm:test_vit", (1, 3, 160, 160)),
    ],
)
def test_default_sizes(name, shape):
    model, example_inputs = models.load(name)
    assert example_inputs.shape == shape and not model.training


def test_inception_at_its_own_size():
    model, example_inputs = models.load("torchvision:inception_v3")
    assert example_inputs.shape == (1, 3, 299, 299)
    assert fxprune.couple(model, example_inputs).prunable
