"""The command line: each command from a model to an answer, and fifty requests that it refuses in one line."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import Page
from transformers import LlamaConfig, LlamaForCausalLM

import fxprune
from fxprune.cli import models
from fxprune.cli.main import COMMANDS, main

FILE = """
import torch
from torch import nn

print("a file may print")


class Net(nn.Module):
    def __init__(self, num_classes=5):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.head(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


torch.manual_seed(3)
model = Net().eval()
example_inputs = torch.randn(2, 3, 12, 12)
data = [(torch.randn(4, 3, 12, 12), torch.arange(4))]
number = 3


def batches():
    return iter(data)


def loss(out, target):
    return nn.functional.cross_entropy(out, target)


def score(net):
    return (net(data[0][0]).argmax(1) == data[0][1]).float().mean()


def built(num_classes=3):
    return Net(num_classes), torch.randn(1, 3, 8, 8)


def fails():
    raise ValueError("no\\nluck")


def quits():
    raise SystemExit("enough")


class Quitting(Net):
    def forward(self, x):
        raise SystemExit(4)


def interrupted(net):
    raise KeyboardInterrupt
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("x = 1 / 0\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "net.py").write_text("from .parts import model\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "latin.py").write_bytes(b"model = '\xe9'\n")
    (tmp_path / "null.py").write_bytes(b"model = 1\0\n")
    (tmp_path / "made.safetensors").mkdir()
    (tmp_path / "odd.json").write_text("{no JSON")
    (tmp_path / "weights.pt").write_text("no weights")
    torch.save({"head.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (tmp_path / "taken").mkdir()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("net", None)


def answer(capsys, *argv):
    """What a command prints to standard output."""
    assert main(list(argv)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_inspect_has_the_totals(folder, capsys):
    out = answer(capsys, "inspect", "net.py")
    assert out.startswith("Net: 2 prunable families of 24 units, ")
    macs = 2 * 12 * 12 * (8 * 3 * 9 + 16 * 8 * 9) + 2 * 16 * 5
    assert out.endswith(f"\n1,477 parameters, {macs / 1000:.0f} k multiply-accumulates a forward\n".replace("1,477", "1.48 k"))
    data = json.loads(answer(capsys, "inspect", "net.py", "--json"))
    assert (data["parameters"], data["macs"]) == (1477, macs)


def test_inspect_writes_a_page(folder, capsys):
    """Of the model as it is: what may lose units, what stays and why, and what each ratio would leave."""
    answer(capsys, "inspect", "net.py", "--html", "page.html", "--freeze-outputs", "conv2")
    reasons = {f["name"]: f["reason"] for f in Page((folder / "page.html").read_text()).data["families"]}
    assert reasons["conv1"] == "" and reasons["conv2"].startswith("is frozen by request")
    answer(capsys, "inspect", "net.py", "--html", "page.html")
    page = Page((folder / "page.html").read_text())
    model, x = models.load("net.py")
    assert {f["name"] for f in page.data["families"] if not f["reason"]} == {f.name for f in fxprune.couple(model, x).prunable}
    assert all(f["kept"] == f["units"] for f in page.data["families"])
    [half] = [r for r in page.data["ratios"] if r["ratio"] == "0.5"]
    found = fxprune.count(fxprune.prune(model, 0.5, x), x)
    assert [figure["exact"] for figure in half["figures"]] == [found.parameters, found.macs, found.bytes]
    assert "shrank" not in " ".join(page.texts.values()).lower()


def test_inspect_writes_the_graph_whatever_is_printed(folder, capsys):
    for asked in ([], ["--why", "conv1"], ["--family", "conv1"], ["--json"]):
        answer(capsys, "inspect", "net.py", "--dot", "graph.dot", *asked)
        assert (folder / "graph.dot").read_text().startswith('graph "Net" {')
        (folder / "graph.dot").unlink()


def test_inspect_one_family_and_why(folder, capsys):
    out = answer(capsys, "inspect", "net.py", "--family", "conv1")
    assert out.splitlines()[0].startswith("conv1 (hidden layer): 8 units of 1 channel, ") and "  conv2.weight:1\n" in out
    assert json.loads(answer(capsys, "inspect", "net.py", "--family", "conv1", "--json"))["units"] == 8
    out = answer(capsys, "inspect", "net.py", "--why", "conv1")
    assert re.search(r"conv2:1 +0-7 +conv1:0 +Conv2d conv2", out)
    out = answer(capsys, "inspect", "net.py", "--why", "head")
    assert "None of it can go: it is an output of the model" in out
    links = json.loads(answer(capsys, "inspect", "net.py", "--why", "conv1", "--json"))["links"]
    assert links == json.loads(json.dumps(fxprune_group("conv1").to_dict()))["links"]


def fxprune_group(layer):
    model, example_inputs = models.load("net.py")
    return fxprune.couple(model, example_inputs).group(layer)


@pytest.mark.parametrize("command", ["inspect", "profile", "prune", "benchmark", "sweep"])
def test_no_line_is_wider_than_80(folder, capsys, command):
    more = {"prune": ["--dry-run"], "benchmark": ["--methods", "magnitude,random"]}.get(command, [])
    more += ["--macs", "0.6", "0.01", "--evaluate", "net.py:score", "--attention", "dims"] if command == "sweep" else []
    model = ["timm:test_resnet", "--input-size", "3x64x64"] if command == "inspect" else ["net.py"]
    out = answer(capsys, command, *model, *more)
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out


def test_a_whole_job(folder, capsys):
    out = answer(capsys, "prune", "net.py", "--ratio", "0.5", "-o", "small.safetensors")
    assert "written to small.safetensors" in out and "exact: largest relative error" in out
    model, example_inputs = models.load("net.py")
    small = fxprune.load("small.safetensors", model)
    wanted = fxprune.prune(model, 0.5, example_inputs)
    assert torch.equal(small(example_inputs), wanted(example_inputs))
    capsys.readouterr()
    report = answer(capsys, "report", "net.py", "small.safetensors")
    assert report.splitlines()[0] == out.splitlines()[0]
    out = answer(capsys, "profile", "net.py", "small.safetensors")
    assert re.search(r"conv2 +\d+\.\d+ → \d+\.\d+ +332 k → 82\.9 k +1\.17 k → 296", out)
    profiled = json.loads(answer(capsys, "profile", "net.py", "small.safetensors", "--json"))
    assert profiled["after"]["parameters"] == sum(p.numel() for p in small.parameters())
    assert profiled["memory"][1] < profiled["memory"][0]


def test_dry_run_writes_nothing(folder, capsys):
    before = set(folder.iterdir())
    for more in ([], ["-o", "small.safetensors"]):
        assert answer(capsys, "prune", "net.py", "--macs", "0.5", "--dry-run", *more).endswith("nothing was written\n")
    assert set(folder.iterdir()) - before <= {folder / "__pycache__"}


def test_what_is_asked_for_is_done(folder, capsys):
    def pruned(*argv):
        answer(capsys, "prune", "net.py", "-o", "small.safetensors", *argv)
        model, _ = models.load("net.py")
        return model, fxprune.load("small.safetensors", model)

    model, small = pruned("--remove", "conv1=0-2,7")
    assert torch.equal(small.conv1.weight, model.conv1.weight[3:7])
    _, small = pruned("--ratio", "conv1=0.25", "--ratio", "conv2=0.5")
    assert (small.conv1.out_channels, small.conv2.out_channels) == (6, 8)
    _, small = pruned("--criterion", "taylor", "--data", "net.py:batches", "--loss", "net.py", "--params", "0.5")
    assert sum(p.numel() for p in small.parameters()) <= 1477 / 2
    _, small = pruned("--freeze-outputs", "conv1", "--round-to", "4", "--ranking", "global")
    assert small.conv1.out_channels == 8 and small.conv2.out_channels % 4 == 0
    model, small = pruned("--same-class", "--no-verify")
    assert type(small) is not type(model)  # until it is loaded as such
    assert type(fxprune.load("small.safetensors", model, same_class=True)) is type(model)


def test_sweep_keeps_its_points_and_goes_on(folder, capsys):
    argv = [
        "sweep",
        "net.py",
        "--macs",
        "0.6",
        "0.3",
        "--criterion",
        "flap",
        "magnitude",
        "--ranking",
        "global",
        "--data",
        "net.py",
    ]
    argv += ["--evaluate", "net.py:score", "-o", "points", "--html", "page.html", "--no-measure"]
    out = answer(capsys, *argv)
    assert out.startswith("Net: 4 points") and "macs=0.3 flap/global" in out
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "points").iterdir()}
    assert len(kept) == 10
    found = json.loads(answer(capsys, *argv, "--json"))
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "points").iterdir()} == kept
    assert [p["asked"]["criterion"] for p in found["points"]] == ["flap", "flap", "magnitude", "magnitude"]
    assert all(p["error"] is not None and p["seconds"] is None for p in found["points"])  # repaired, not timed
    assert "<svg" in (folder / "page.html").read_text()
    assert main([*argv, "--no-repair"]) == 2
    assert "points holds another sweep: repair is {} there and null here" in capsys.readouterr().err


RESIDUAL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 8)) for n in (8, 16))

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(4)), nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


torch.manual_seed(0)
model, example_inputs = Blocks(), torch.randn(4, 8)


def score(model):
    return 1.0
"""


def test_sweep_removes_branches_and_blocks(folder, capsys):
    """Beside widths, alone and whole blocks: what is left of each module says which."""
    (folder / "residual.py").write_text(RESIDUAL)
    argv = "sweep residual.py --params 0.6 --evaluate residual.py:score --depth no yes only blocks -o points --no-measure"
    found = json.loads(answer(capsys, *argv.split(), "--no-repair", "--json"))["points"]
    assert [point["asked"].get("depth") for point in found] == [False, True, "only", "blocks"]
    texts = [(folder / "points" / f"{n:04}.plan.json").read_text() for n in range(1, 5)]
    widths, both, branches, blocks = map(fxprune.Plan.from_json, texts)
    assert not widths.removed and both != widths and branches.removed
    tensors = {name for name, _ in models.load("residual.py")[0].named_parameters()}
    whole = {name.split(".")[1] for name in blocks.removed}
    assert len(whole) == 2 and set(blocks.removed) == {
        n for n in tensors if n.startswith("blocks") and n.split(".")[1] in whole
    }


def test_benchmark_sets_methods_side_by_side(folder, capsys):
    argv = ["benchmark", "net.py", "--methods", "magnitude,taylor/global", "--data", "net.py", "--score", "net.py", "--json"]
    argv += ["--loss", "net.py"]
    rows = json.loads(answer(capsys, *argv))["rows"]
    assert [row["method"] for row in rows] == ["original", "magnitude", "taylor/global"]
    assert rows[0]["parameters"] == 1477 and rows[1]["parameters"] < 800
    assert all(0 <= row["score"] <= 1 and row["seconds"] > 0 for row in rows)
    assert rows[0]["memory"] > rows[1]["memory"] > 4 * rows[1]["parameters"]
    both = json.loads(answer(capsys, "benchmark", "net.py", "net.py:built", "--methods", "magnitude", "--json"))
    assert [one["rows"][0]["parameters"] for one in both] == [1477, 1443]
    out = answer(capsys, "benchmark", "net.py", "net.py:built", "--methods", "magnitude")
    assert out.count("Net: methods of pruning side by side") == 2 and max(map(len, out.splitlines())) <= 80
    out = answer(capsys, "benchmark", "net.py", "--methods", "magnitude,taylor")
    assert "taylor failed: " in out  # without data


@pytest.mark.parametrize(
    "argv, classes, shape",
    [
        (["net.py:built", "--num-classes", "7"], 7, (1, 3, 8, 8)),
        (["net:Net", "--num-classes", "4", "--input-size", "3,10,10", "--batch-size", "3"], 4, (3, 3, 10, 10)),
        (["net.py:model"], 5, (2, 3, 12, 12)),
    ],
)
def test_models_of_ones_own(folder, capsys, argv, classes, shape):
    data = json.loads(answer(capsys, "inspect", *argv, "--json"))
    assert next(f for f in data["families"] if f["name"] == "head")["units"] == classes
    wanted = models.Wanted(num_classes=None)
    if len(argv) == 1:
        assert tuple(models.load(argv[0], wanted)[1].shape) == shape


def test_models_of_libraries(capsys):
    data = json.loads(answer(capsys, "inspect", "torchvision:resnet18", "--num-classes", "6", "--input-size", "32", "--json"))
    assert next(f for f in data["families"] if f["name"] == "fc")["units"] == 6
    model, x = models.load("timm:test_vit", models.Wanted(input_size=(3, 96, 96), num_classes=4))
    assert x.shape == (1, 3, 96, 96) and model(x).shape == (1, 4)


def test_models_of_transformers(folder, capsys):
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained("llama")
    loaded, inputs = models.load("hf:llama")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight) and inputs["input_ids"].shape == (1, 16)
    (folder / "llama" / "config.json").rename(folder / "other.json")
    drawn, _ = models.load("hf:other.json")
    (folder / "other.json").rename(folder / "llama" / "config.json")
    assert type(drawn) is LlamaForCausalLM and not torch.equal(drawn.lm_head.weight, model.lm_head.weight)
    answer(capsys, "prune", "hf:llama", "--ratio", "0.5", "-o", "small")
    assert fxprune.load("small").model.layers[0].mlp.gate_proj.out_features == 12


def test_weights_are_loaded(folder):
    model, _ = models.load("net.py")
    torch.save({k: v + 1 for k, v in model.state_dict().items()}, "plus.pt")
    other, _ = models.load("net.py", models.Wanted(weights="plus.pt"))
    assert torch.equal(other.head.bias, model.head.bias + 1)


def test_a_file_may_define_functions(folder, capsys):
    named = FILE.replace("model = Net", "model = lambda: Net").replace("example_inputs =", "example_inputs = lambda:")
    (folder / "net.py").write_text(named)
    assert json.loads(answer(capsys, "inspect", "net.py", "--json"))["families"]
    (folder / "net.py").write_text(FILE.replace("example_inputs =", "example_inputs = lambda: 1 / 0 or"))
    assert main(["inspect", "net.py"]) == 2
    assert "example_inputs raises ZeroDivisionError: division by zero" in capsys.readouterr().err


REFUSED = [
    ("", "the following arguments are required: COMMAND"),
    ("frobnicate net.py", "invalid choice: 'frobnicate'"),
    ("inspect", "the following arguments are required: MODEL"),
    ("inspect nowhere.py", "there is no file nowhere.py"),
    ("inspect nowhere", "there is no file nowhere"),
    ("inspect taken", "there is no file taken"),
    ("inspect weights.pt", "the file is no Python source"),
    ("inspect broken.py", "the file raises ZeroDivisionError: division by zero"),
    ("inspect empty.py", "the file defines no `model`"),
    ("inspect exits.py", "the file raises SystemExit: 3"),
    ("inspect latin.py", "the file raises SyntaxError: "),
    ("inspect null.py", "the file raises SyntaxError: "),
    ("inspect net.py:quits", "net.py:quits raises SystemExit: enough"),
    ("inspect net.py:Quitting", "the model's code ends the process with SystemExit(4)"),
    ("inspect net.py:model.head.nothing", "the file defines no `model.head.nothing`"),
    ("inspect net.py:model:head", "'net.py:model:head' names no model"),
    ("inspect hf:odd.json", "odd.json raises "),
    ("inspect net.py --weights taken", "there is no file taken"),
    ("inspect net.py --html /dev/null", "the page cannot be written: /dev/null is a device or a pipe"),
    ("inspect net.py --dot made.safetensors", "the graph cannot be written: made.safetensors is a folder"),
    ("prune net.py -o made.safetensors", "the result cannot be written: made.safetensors is a folder"),
    ("prune net.py -o net.py/small.safetensors", "the result cannot be written: there is no folder"),
    ("prune net.py -o /dev/full.safetensors/x.safetensors", "the result cannot be written: there is no folder"),
    ("sweep net.py --macs 0.5 --evaluate exits.py", "the file raises SystemExit: 3"),
    ("prune net.py --data exits.py --dry-run", "the file raises SystemExit: 3"),
    ("report net.py taken", "taken/pruned.safetensors cannot be read"),
    ("inspect net.py:nothing", "the file defines no `nothing`"),
    ("inspect net.py:number", "`number` is of type int, not a torch.nn.Module"),
    ("inspect net.py:fails", "net.py:fails raises ValueError: no luck"),
    ("inspect nomodule.at.all:net", "nomodule.at.all cannot be imported: No module named 'nomodule'"),
    ("inspect net:Nett", "the module defines no `Nett`"),
    ("inspect package/net.py", "fix: the module: package.net:model, where that can be imported"),
    ("profile net.py --input-size 4x8x8", "the model's own forward raises RuntimeError: "),
    ("inspect a-b:c", "'a-b:c' names no model"),
    ("inspect torchvision:resnet51", "torchvision has no model called 'resnet51'"),
    ("inspect timm:test_vitt", "timm has no model called 'test_vitt'"),
    ("inspect hf:taken", "there is no taken/config.json"),
    ("inspect net.py --num-classes 3", "--num-classes is for models that are built here"),
    ("inspect net.py --num-classes many", "'many' is no positive integer"),
    ("inspect net.py --batch-size 2", "--batch-size is for example inputs that are made up"),
    ("inspect net.py --input-size 3x", "'3x' is no shape"),
    ("inspect net.py --input-size 0x3", "'0x3' is no shape"),
    ("inspect net.py --input-size 4x12x12", "Given groups=1, weight of size"),
    ("inspect net.py --weights nowhere.pt", "there is no file nowhere.pt"),
    ("inspect net.py --weights weights.pt", "the weights cannot be read"),
    ("inspect net.py --weights other.pt", "the weights do not fit the model"),
    ("inspect net.py --device tpu9", "the model cannot be put on tpu9"),
    ("inspect net.py --why conv3", "'conv3' in group names no layer and no tensor of the model"),
    ("inspect net.py --family conv3", "'conv3' names no family of the model"),
    ("inspect net.py --why conv1 --family conv1", "not allowed with argument"),
    ("inspect net.py --freeze frist", "the glob 'frist' in freeze matches no module"),
    ("inspect net.py --dot nowhere/net.dot", "the graph cannot be written: there is no folder"),
    ("inspect net.py --attention tails", "invalid choice: 'tails'"),
    ("inspect net.py --experts some", "invalid choice: 'some'"),
    ("prune net.py --experts only --dry-run", "experts are asked for, and the model has none"),
    ("inspect net.py extra", "unrecognized arguments: extra"),
    ("prune net.py --ratio 0.5", "nothing says where to write the result"),
    ("prune net.py --ratio 1.5 --dry-run", "ratio must be a number in [0, 1), not 1.5"),
    ("prune net.py --ratio half --dry-run", "--ratio half: 'half' is no number"),
    ("prune net.py --ratio 0.5 --ratio conv1=0.1 --dry-run", "--ratio 0.5 is given beside another one"),
    ("prune net.py --ratio 0.5 --macs 0.5 --dry-run", "ratio and macs are both given"),
    ("prune net.py --macs 2Q --dry-run", "macs must be a positive number, or one with a unit, not '2Q'"),
    ("prune net.py --latency 20 --dry-run", "latency"),
    ("prune net.py --criterion magnitud --dry-run", "did you mean 'magnitude'?"),
    ("prune net.py --criterion taylor --dry-run", "data"),
    ("prune net.py --criterion taylor --data net.py:number --dry-run", "net.py:number is of type int, not batches of data"),
    ("prune net.py --loss net.py:number --dry-run", "net.py:number is of type int, not a function"),
    ("prune net.py --ranking worldwide --dry-run", "ranking must be one of local, global, isomorphic"),
    ("prune net.py --round-to 0 --dry-run", "'0' is no positive integer"),
    ("prune net.py --remove conv1 --dry-run", "--remove conv1 is not LAYER=INDICES"),
    ("prune net.py --remove conv1=99 --dry-run", "channel 99 of conv1 is none: it has 8"),
    ("prune net.py --remove head=1 --dry-run", "channel 1 of head cannot go: it is an output of the model"),
    ("prune net.py -o small.pt", "-o small.pt ends in .pt"),
    ("prune net.py -o nowhere/small.safetensors", "the result cannot be written: there is no folder"),
    ("prune net.py -o folder", "a Net has no configuration to be saved to a folder with"),
    (
        "prune net.py --rato 0.5 -o here",
        "unrecognized arguments: --rato 0.5; did you mean '--ratio'?; see",
    ),
    ("prune net.py --ratio 0.5 5 -o here", "unrecognized arguments: 5; see fxprune prune --help"),
    ("inspect net.py --html nowhere/page.html", "the page cannot be written: there is no folder"),
    ("inspect hf:nowhere.json", "there is no nowhere.json"),
    ("report net.py", "the following arguments are required: PRUNED"),
    ("report net.py nowhere.safetensors", "nowhere.safetensors"),
    ("report net.py bad.safetensors", "bad.safetensors"),
    ("profile net.py weights.pt", "weights.pt"),
    ("benchmark net.py --methods magnitude,magnitude", "--methods names one method twice"),
    ("benchmark net.py net.py", "a model is named twice"),
    ("inspect net.py --html ''", "the page cannot be written: . is a folder"),
    ("inspect net.py --dot ''", "the graph cannot be written: . is a folder"),
    ("prune net.py -o ''", "-o small.safetensors"),
    ("sweep net.py --macs 0.5 --evaluate net.py:score -o net.py", "net.py is a file; fix: the name of a folder"),
    ("benchmark net.py nowhere.py", "there is no file nowhere.py"),
    ("benchmark net.py --methods magnitude/most", "ranking must be one of"),
    ("benchmark net.py --methods luck", "luck"),
    ("benchmark net.py --score net.py:nothing", "the file defines no `nothing`"),
    ("benchmark net.py --score net.py:fails", "net.py:fails raises TypeError"),
    ("sweep net.py --macs 0.5", "nothing says what a result is worth"),
    ("sweep net.py --evaluate net.py:score", "nothing says how much goes"),
    ("sweep net.py --macs --evaluate net.py:score", "argument --macs: expected at least one argument"),
    ("sweep net.py --macs 0.5 2Q --evaluate net.py:score", "macs must be a positive number, or one with a unit, not '2Q'"),
    ("sweep net.py --latency 20 --evaluate net.py:score", "latency"),
    ("sweep net.py --macs 0.5 --evaluate net.py:number", "net.py:number is of type int, not a function"),
    ("sweep net.py --macs 0.5 --evaluate net.py:fails -o here", "net.py:fails raises TypeError"),
    ("sweep net.py --macs 0.5 --evaluate net.py", "the file defines no `evaluate`"),
    ("sweep net.py --macs 0.5 --evaluate net.py:score --criterion flap", "data"),
    ("sweep net.py --macs 0.5 --evaluate net.py:score --ranking best", "ranking must be one of"),
    ("sweep net.py --macs 0.5 --evaluate net.py:score --depth maybe", "invalid choice: 'maybe'"),
    ("sweep net.py --macs 0.5 --evaluate net.py:score -o nowhere/sweep", "the sweep cannot be written: there is no folder"),
    ("sweep net.py --macs 0.5 --evaluate net.py:score -o .", "holds no sweep, but bad.safetensors"),
    ("sweep net.py --macs 0.5 --evaluate net.py:score --html taken", "the page cannot be written"),
]


@pytest.mark.parametrize("line, what", REFUSED, ids=[line or "nothing" for line, _ in REFUSED])
def test_refused_in_one_line(folder, capsys, line, what):
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    lines = [text for text in err.splitlines() if text != "a file may print"]
    assert not out and len(lines) == 1 and "Traceback" not in err and not (folder / "here").exists()
    assert re.match(r"fxprune( \w+)?: error: ", lines[0]) and what in lines[0]
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_as_a_module(tmp_path):
    (tmp_path / "net.py").write_text(FILE)
    command = [sys.executable, "-m", "fxprune", "prune", str(tmp_path / "net.py"), "--ratio", "2", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "a file may print\nfxprune prune: error: ratio must be a number in [0, 1), not 2.0; fix: ratio=0.5 removes half of"
        " every family\n"
    )


def test_the_reader_may_go(tmp_path):
    """`fxprune inspect model | head -1` is no error that anybody sees."""
    (tmp_path / "net.py").write_text(FILE)
    command = f"{sys.executable} -m fxprune inspect {tmp_path / 'net.py'} --json | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "{\n" and "Traceback" not in done.stderr


def test_what_an_encoding_lacks_is_replaced(folder, monkeypatch):
    """A terminal or a file in ASCII takes tables too, as wide as others."""
    found = {}
    for encoding in ("ascii", "cp1252", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["inspect", "net.py"]) == 0
        assert stream.errors == "strict"
        found[encoding] = stream.buffer.getvalue().decode(encoding)
    assert found["utf-8"].replace("\u2500", "-") == found["ascii"] == found["cp1252"]
    assert "?" not in found["ascii"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is full is one of Linux")
def test_an_answer_that_cannot_be_written_is_one_line(folder, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["inspect", "net.py"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["fxprune inspect: error: the answer cannot be written: No space left on device"]


def test_a_closed_output_is_no_error(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["inspect", "net.py"]) == 0
    sys.stdout.close()


def test_an_interrupt_is_one_line_and_leaves_no_half(folder, capsys):
    before = set(folder.iterdir())
    assert main("sweep net.py --macs 0.5 --evaluate net.py:interrupted --html page.html".split()) == 130
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "a file may print"]
    assert lines == ["fxprune sweep: stopped"]
    assert set(folder.iterdir()) - before <= {folder / "__pycache__"}


def test_links_are_followed(folder, capsys):
    """What a link leads to is written, and the link stays."""
    (folder / "link.html").symlink_to(folder / "page.html")
    answer(capsys, "inspect", "net.py", "--html", "link.html")
    assert (folder / "link.html").is_symlink() and (folder / "page.html").read_text().startswith("<!")


def test_version(capsys):
    assert answer(capsys, "--version") == f"fxprune {fxprune.__version__}\n"


def test_help(capsys):
    out = answer(capsys, "--help")
    assert all(f"\n    {command} " in out or f"\n    {command}\n" in out for command in COMMANDS)
    for command in COMMANDS:
        assert max(map(len, answer(capsys, command, "--help").splitlines())) <= 80


def test_warnings_are_a_line(folder, capsys):
    assert main(["prune", "net.py", "--ratio", "conv1=0.5", "--ratio", "head=0.5", "--dry-run"]) == 0
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("fxprune prune: warning: 'head' in ratio changes nothing: ") and len(err) == 2
