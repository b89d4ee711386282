"""Checkpoints: what is saved comes back bit by bit, in a fresh process, without example inputs; else one error says why."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from refusals import refuses
from torch import fx, nn

import fxprune
from fxprune import PruneError
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.passes.ir.pytree import collect
from fxprune.selection.latency import Latency

X, IMAGES, IDS = (
    torch.linspace(-1, 1, 12).view(3, 4),
    torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8),
    torch.arange(12).view(2, 6),
)


class Odd(nn.Module):
    """Tensors of every kind: tied, frozen, buffers that are saved and that are not, a plain attribute, an index of channels."""

    def __init__(self, ordered=True):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Linear(8, 12), nn.Linear(8, 12)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(12, 5)
        self.register_buffer("scale", torch.linspace(1, 2, 8), persistent=False)
        if ordered:
            self.register_buffer("order", torch.arange(7, -1, -1))
        self.shift = torch.linspace(0, 1, 12)
        self.drop = nn.Dropout(0.5)
        self.norm.weight.requires_grad_(False)

    def forward(self, x):
        x = self.norm(self.stem(x)).mul(self.scale.view(1, -1, 1, 1)).relu()
        x = (x[:, self.order] if hasattr(self, "order") else x).mean((2, 3))
        return self.head(self.drop(self.inner(x).relu() + self.outer(x) + self.shift))


class Gate(nn.Module):
    """Reads the contents of a tensor: it stays one node."""

    def __init__(self):
        super().__init__()
        self.gate, self.inner = nn.Parameter(torch.tensor(2.0)), nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x) if float(self.gate) > 1 else x


def bert(**options):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 40}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, max_position_embeddings=20, **options))


def llama():
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 40}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=20))


def gated():
    return nn.Sequential(nn.Linear(4, 8), Gate(), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


# how each model is built, its inputs, and what is done to it before it is pruned
CASES = {
    "odd": (Odd, IMAGES, lambda m: m.train()),
    "even": (lambda: Odd(ordered=False), IMAGES, lambda m: m.eval()),
    "channels_last": (Odd, IMAGES, lambda m: m),
    "half": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), X.bfloat16(), lambda m: m.bfloat16()),
    "float16": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), X.half(), lambda m: m.half()),
    "gated": (gated, X, lambda m: m.eval()),
    "bert": (bert, {"input_ids": IDS}, lambda m: m.eval()),
    "llama": (llama, {"input_ids": IDS}, lambda m: m.eval()),
}
FOLDERS = ("bert", "llama")
SAME_CLASS = ("even", "bert", "llama")
VARIANTS = [(name, False) for name in CASES] + [(name, True) for name in SAME_CLASS]


def outputs(model, inputs):
    """In evaluation, and in training with the same random numbers; the model and its statistics are left as they are."""
    model = copy.deepcopy(model)
    found = []
    for training in (False, True):
        model.train(training)
        torch.manual_seed(0)
        with torch.no_grad():
            result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        found += collect(dict(result) if isinstance(result, dict) else result, torch.Tensor)
    return found


def saved(name, same_class, folder):
    """A pruned model that was changed since, where it was saved, and what it computes."""
    build, inputs, change = CASES[name]
    torch.manual_seed(1)
    model = change(build())
    small = fxprune.prune(model, 0.5, example_inputs=inputs, same_class=same_class)
    with torch.no_grad():
        for tensor in dict(named_tensors(small)).values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.1)
    if name == "channels_last":
        small.to(memory_format=torch.channels_last)
    path = folder / (f"{name}{same_class}" + ("" if name in FOLDERS else ".safetensors"))
    fxprune.save(small, path)
    return small, path, outputs(small, inputs)


def described(model):
    """Everything of a module that a checkpoint must bring back."""
    tensors = {
        n: (t.dtype, tuple(t.shape), t.stride(), t.requires_grad, type(t), t.detach().float().double().sum().item())
        for n, t in named_tensors(model)
    }
    modes = {n: m.training for n, m in model.named_modules()}
    return str((type(model).__name__, tensors, modes, fxprune.plan_of(model).to_json(), str(model.meta.get("verification"))))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {(name, same): saved(name, same, folder) for name, same in VARIANTS}
    for (name, same), (small, _, results) in made.items():
        torch.save((described(small), results), folder / f"{name}{same}.wanted")
    return folder, made


def reload_all(folder):
    """In a process of its own: each is loaded from the architecture, from one on the meta device, and from a folder alone."""
    for name, same in VARIANTS:
        wanted, results = torch.load(Path(folder) / f"{name}{same}.wanted")
        build, inputs, _ = CASES[name]
        path = Path(folder) / (f"{name}{same}" + ("" if name in FOLDERS else ".safetensors"))
        for way in ("values", "meta", "folder"):
            if way == "folder" and name not in FOLDERS:
                continue
            with torch.device("meta" if way == "meta" else "cpu"):
                model = None if way == "folder" else build()
            again = fxprune.load(path, model, same_class=same)
            equal = all(torch.equal(a, b) for a, b in zip(outputs(again, inputs), results, strict=True))
            print(name, same, way, equal and described(again) == wanted)


def test_models_come_back_in_a_fresh_process(everything):
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    code = f"import test_checkpoints; test_checkpoints.reload_all({str(everything[0])!r})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, env=env)
    assert not done.returncode, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(VARIANTS) + sum(name in FOLDERS for name, _ in VARIANTS)
    assert not [line for line in lines if not line.endswith("True")]


def test_what_is_saved_has_what_is_hard_to_keep(everything):
    """The cases above would prove little without."""
    small = everything[1]["odd", False][0]
    tensors = dict(named_tensors(small))
    assert small.get_submodule("outer").weight is small.get_submodule("inner").weight
    assert not tensors["norm.weight"].requires_grad and small.training
    assert tensors["scale"].shape == (4,) and tensors["shift"].shape == (6,)
    assert tensors["order"].tolist() == [7, 6, 5, 4, 3, 2, 1, 0], "whole, as the program has an index of its own"
    assert not everything[1]["channels_last", False][0].get_submodule("stem").weight.is_contiguous()
    assert everything[1]["gated", False][0].meta["capture"].startswith("opaque: 1")


def test_the_other_kind_of_module_can_be_loaded(everything):
    """What was saved as a GraphModule becomes one of the class, and the other way round."""
    for name in SAME_CLASS:
        build, inputs, _ = CASES[name]
        for same in (False, True):
            _, path, wanted = everything[1][name, same]
            again = fxprune.load(path, build(), same_class=not same)
            assert isinstance(again, fx.GraphModule) == same and type(again).__name__ == type(build()).__name__
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs(again, inputs)[:1], wanted[:1]))


class Clock(nn.Module):
    """Sines of an input, in other order: what is left of them is selected by an index of the program's own."""

    def forward(self, t):
        angles = t[:, None] * torch.exp(-torch.arange(8, dtype=torch.float32, device=t.device) / 8)
        return torch.cat([angles.cos(), angles.sin()], -1)


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.clock, self.inner, self.head = Clock(), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, t):
        return self.head(self.inner(self.clock(t)).relu())


@pytest.mark.parametrize("saved", [False, True])
def test_constants_of_programs_are_made_anew_in_the_other_kind_of_module(saved, tmp_path):
    torch.manual_seed(0)
    model, times = Timed().eval(), torch.arange(4.0)
    small = fxprune.prune(model, 0.5, times, same_class=saved)
    own = {name for name, _ in named_tensors(small)} - {name for name, _ in named_tensors(model)}
    assert own == {"clock._kept_index_0" if saved else "_kept_index_0"}
    fxprune.save(small, tmp_path / "small.safetensors")
    for same_class in (False, True):
        loaded = fxprune.load(tmp_path / "small.safetensors", model, same_class=same_class)
        assert torch.equal(loaded(times), small(times))


def test_nothing_is_left_of_a_failed_write(tmp_path, monkeypatch):
    small = fxprune.prune(CASES["half"][0](), 0.5, example_inputs=X)
    path = tmp_path / "small.safetensors"
    fxprune.save(small, path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        Path(args[1]).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxprune.checkpoints.file.save_file", full)
    refuses(
        lambda: fxprune.save(small, path),
        what=f"{path} cannot be written: No space left on device",
        fix="a path in a folder that exists and can be written to",
    )
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_paths_that_cannot_be_written(tmp_path):
    small = fxprune.prune(CASES["half"][0](), 0.5, example_inputs=X)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder.safetensors", tmp_path / "no" / "a.safetensors", tmp_path / "file" / "a.safetensors"):
        with pytest.raises(PruneError, match="cannot be written"):
            fxprune.save(small, path)
    for path in (None, 3, "a\0b.safetensors"):
        with pytest.raises(PruneError, match="is no path"):
            fxprune.save(small, path)
    with pytest.raises(PruneError, match="no configuration builds the original"):
        fxprune.save(small, tmp_path / "new")
    with pytest.raises(PruneError, match="carries no plan"):
        fxprune.save(nn.Linear(2, 2), tmp_path / "new.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.safetensors"]


def test_models_that_a_checkpoint_does_not_fit(everything):
    path = everything[1]["odd", False][1]
    changed = Odd()
    changed.head = nn.Linear(12, 6)
    with pytest.raises(PruneError, match=r"head.weight has shape \(6, 12\), not \(5, 12\)"):
        fxprune.load(path, changed)
    untied = Odd()
    untied.outer.weight = nn.Parameter(untied.outer.weight.detach().clone())
    with pytest.raises(PruneError, match=r"it knows nothing of outer.weight"):
        fxprune.load(path, untied)
    with pytest.raises(PruneError, match="has no configuration to build the model from"):
        fxprune.load(path)


def test_the_record_is_that_of_the_original(everything):
    path = everything[1]["odd", False][1]
    header = path.read_bytes()
    record = json.loads(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]["fxprune"])
    assert record["format"] == "fxprune.checkpoint/1" and record["plan"]["format"] == "fxprune.plan/1"
    assert record["plan"]["shapes"]["stem.weight"] == [8, 3, 3, 3]
    other = everything[1]["channels_last", False][1].read_bytes()
    again = json.loads(json.loads(other[8 : 8 + int.from_bytes(other[:8], "little")])["__metadata__"]["fxprune"])
    assert record["fingerprint"] == again["fingerprint"], "the same architecture"


def test_code_of_others_is_not_run(everything, tmp_path):
    """A configuration names code to import, an attention kernel to download, a class that is no model."""
    folder = tmp_path / "copy"
    shutil.copytree(everything[1]["bert", False][1], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    for change in (
        {"architectures": ["evil"], "auto_map": {"AutoModel": "evil.Model"}},
        {"architectures": ["pipeline"]},
        {"architectures": "BertForMaskedLM"},
        {"fxprune_attention": "kernels-community/flash-attn"},
        {"num_hidden_layers": 4000},
        {"hidden_size": 10**11},
        {"hidden_size": "wide"},
        {"num_hidden_layers": 3},
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(PruneError) as caught:
            fxprune.load(folder)
        assert caught.value.fix and "\n" not in caught.value.what, change
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    assert fxprune.load(folder) is not None


def test_repair_and_latency_come_back(tmp_path):
    build, path = gated, tmp_path / "small.safetensors"
    model = build()
    small = fxprune.prune(model, 0.5, example_inputs=X)
    small.meta["latency"] = Latency(0.2, 0.1, 0.5, 30, 0.01, "cpu", (("0.weight", ((4, 0.1), (8, 0.2))),))
    better = fxprune.repair(model, small, [torch.randn(60, 4)])
    fxprune.save(better, path)
    again = fxprune.load(path, build())
    assert again.meta["repair"] == better.meta["repair"] and again.meta["latency"] == better.meta["latency"]
    assert again.meta["verification"] == better.meta["verification"]


def uneven_llama():
    """A pruned model whose layers have widths of their own, which no configuration says."""
    torch.manual_seed(0)
    widths = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
    config = transformers.LlamaConfig(**widths, num_key_value_heads=2, pad_token_id=0, eos_token_id=2, bos_token_id=1)
    model = transformers.LlamaForCausalLM(config).eval()
    return fxprune.prune(model, {"model.layers.0.mlp": 0.5}, torch.arange(3, 15)[None], same_class=True)


def test_what_a_configuration_describes_is_loaded_by_its_class(tmp_path):
    small = uneven_llama()
    type(small).save_pretrained(small, tmp_path)  # what is written where a configuration describes the model
    with pytest.raises(PruneError) as caught:
        fxprune.load(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path} has a configuration, and no pruned.safetensors\n"
        f"  fix: from_pretrained({str(tmp_path)!r}) of its class, where the configuration describes the model"
    )


def test_save_pretrained_of_what_no_configuration_describes_is_loaded_by_us(tmp_path):
    small = uneven_llama()
    with torch.no_grad():
        small.lm_head.weight.add_(0.25)  # trained since
    for model in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        model.save_pretrained(tmp_path / "folder")
        again = fxprune.load(tmp_path / "folder", same_class=True)
        ids = torch.arange(3, 15)[None]
        with torch.no_grad():
            assert torch.equal(again(ids).logits, small(ids).logits)
        assert type(again) is type(small)
        assert torch.equal(again.generate(ids, max_new_tokens=3), small.generate(ids, max_new_tokens=3))
        again.save_pretrained(tmp_path / "once more")
        assert fxprune.load(tmp_path / "once more").plan.slices.keys() == small.meta["plan"].slices.keys()
        shutil.rmtree(tmp_path / "folder")


def test_from_pretrained_of_such_a_folder_is_told_what_to_call(tmp_path):
    uneven_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"fxprune\.load\(folder\)"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_such_a_model_saves_its_own_values(tmp_path):
    small = uneven_llama()
    small.save_pretrained(tmp_path / "own", state_dict=small.state_dict(), safe_serialization=True)
    small.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    with pytest.raises(PruneError, match="with its own values"):
        small.save_pretrained(tmp_path / "other", state_dict={n: t + 1 for n, t in small.state_dict().items()})


MASKS: dict[int, torch.Tensor] = {}


class Remembers(nn.Module):
    """Looks up a mask that it has computed for a number of tokens; the table is no part of the model."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)
        self.steps = torch.arange(12)

    def forward(self, x):
        n = x.shape[1]
        if n not in MASKS:
            MASKS[n] = torch.ones(n, n).tril() / n
        return self.b((MASKS[n] @ self.a(x)) * torch.tensor([1.0, 2.0] * 6))


@pytest.mark.parametrize("stored_with", ["an empty table", "a full table"])
def test_a_table_that_has_been_filled_or_emptied_since_is_no_other_model(tmp_path, stored_with):
    torch.manual_seed(0)
    model, x = Remembers().eval(), torch.randn(2, 5, 6)
    MASKS.clear()
    if stored_with == "a full table":
        model(x)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    fxprune.save(small, tmp_path / "small.safetensors")
    MASKS.clear()
    if stored_with == "an empty table":
        model(x)
    again = fxprune.load(tmp_path / "small.safetensors", Remembers().eval())
    assert torch.equal(again(x), small(x))


class Formats(nn.Module):
    """Says how a tensor is to lie in memory."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        y = self.a(x).contiguous(memory_format=torch.channels_last)
        return self.b(y + torch.zeros_like(y, memory_format=torch.preserve_format))


def test_a_program_with_a_memory_format_is_pickled_by_any_protocol(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    small = fxprune.prune(Formats().eval(), 0.5, example_inputs=x)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        torch.save(small, tmp_path / "small.pt", pickle_protocol=protocol)
        again = torch.load(tmp_path / "small.pt", weights_only=False)
        assert torch.equal(again(x), small(x)) and again.code == small.code


def chain():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_pruned_model_in_another_precision_is_loaded(tmp_path, dtype):
    """The plan's example inputs are made up in the precision of the model that it is applied to."""
    small = fxprune.prune(chain(), 0.5, X)
    plan = small.plan
    small.to(dtype)
    fxprune.save(small, tmp_path / "small.safetensors")
    for model in (chain(), chain().to(dtype)):
        for same_class in (False, True):
            again = fxprune.load(tmp_path / "small.safetensors", model, same_class=same_class)
            assert torch.equal(again(X.to(dtype)), small(X.to(dtype)))
    assert plan.apply(chain().to(dtype))[0].weight.dtype == dtype
    assert fxprune.masks.masked(chain().to(dtype), plan)(X.to(dtype)).dtype == dtype


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class TakesAPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = chain()

    def forward(self, pair):
        return self.body(pair.left + pair.right)


def test_a_model_that_takes_a_named_tuple_is_loaded(tmp_path):
    model, pair = TakesAPair().eval(), Pair(X, X)
    small = fxprune.prune(model, 0.5, {"pair": pair})
    fxprune.save(small, tmp_path / "small.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "small.safetensors", model)(pair=pair), small(pair=pair))


CHANGES = {
    "4.weight has shape (7, 3), and pruning left (2, 3)": lambda small: small.set_submodule("4", nn.Linear(3, 7)),
    "more.weight was not there when it was pruned": lambda small: small.add_module("more", nn.Linear(2, 2)),
    "0.bias was there when it was pruned": lambda small: setattr(small[0], "bias", None),
    "2.parametrizations.weight.original0 was not there when it was pruned": (
        lambda small: nn.utils.parametrizations.weight_norm(small[2])
    ),
}


@pytest.mark.parametrize("same_class", [False, True])
@pytest.mark.parametrize("why", CHANGES)
def test_a_model_that_would_not_be_loaded_is_not_saved(tmp_path, why, same_class):
    small = fxprune.prune(chain(), 0.5, X, same_class=same_class)
    CHANGES[why](small)
    with pytest.raises(PruneError, match=re.escape(f"the model was changed since it was pruned: {why}\n")):
        fxprune.save(small, tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())
