"""Checkpoints pruned on disk: the tensors that `prune` leaves in memory, file by file; or one error, and nothing written."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import fxprune
from fxprune.checkpoints.stored import Entry, write_one_by_one

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
IDS = {"input_ids": torch.arange(3, 15).view(2, 6)}


def llama(folder, dtype=torch.bfloat16, shard="10KB", **more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **more)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def refuses(why):
    return pytest.raises(fxprune.PruneError, match=re.escape(why))


def logits(model):
    with torch.no_grad():
        return model(**IDS)["logits"]


def alike(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


ASKED = {
    "half": {"ratio": 0.5},
    "layers apart": {"ratio": {"*layers.0.mlp*": 0.5, "*layers.1.mlp*": 0.25}},
    "budget": {"params": 0.7},
    "fpgm": {"ratio": 0.5, "criterion": "fpgm"},
    "lamp": {"params": 0.6, "ranking": "global", "criterion": "lamp", "round_to": 2},
    "uniform": {"params": 0.6, "ranking": "global", "uniform": True},
    "only": {"ratio": 0.5, "only": "*mlp*"},
}


@pytest.mark.parametrize(("asked", "tied"), [*((asked, False) for asked in ASKED), ("half", True), ("lamp", True)])
def test_as_pruning_in_memory(asked, tied, tmp_path):
    model = llama(tmp_path / "model", tie_word_embeddings=tied)
    wanted = fxprune.prune(model, example_inputs=IDS | {"use_cache": False}, same_class=True, verify=False, **ASKED[asked])
    plan = fxprune.prune_checkpoint(tmp_path / "model", tmp_path / "small", example_inputs=IDS, **ASKED[asked])
    assert plan == fxprune.plan_of(wanted)
    described = "config" not in wanted.meta["stale"]
    assert described == (tmp_path / "small/model.safetensors.index.json").exists()
    layers = [[tuple(p.shape) for p in layer.parameters()] for layer in wanted.model.layers]
    assert described == all(shapes == layers[0] for shapes in layers)  # which a configuration can say
    assert described or asked not in ("half", "fpgm", "uniform", "only")
    if described:
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
        assert again.dtype == torch.bfloat16
    else:
        again = fxprune.load(tmp_path / "small", same_class=True)
    alike(again.state_dict(), wanted.state_dict())
    assert torch.equal(logits(again), logits(wanted))


def test_shards_and_their_index(tmp_path):
    llama(tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text("{}")
    (tmp_path / "model/pytorch_model.bin").write_text("no weights twice")
    fxprune.prune_checkpoint(tmp_path / "model", tmp_path / "small", 0.5)
    index, before = (json.loads((tmp_path / f / "model.safetensors.index.json").read_text()) for f in ("small", "model"))
    assert index["weight_map"] == before["weight_map"] and len(set(index["weight_map"].values())) > 3
    tensors = {}
    for file in set(index["weight_map"].values()):
        found = load_file(tmp_path / "small" / file)
        assert {index["weight_map"][name] for name in found} == {file}
        tensors |= found
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in tensors.values())
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert "tokenizer.json" in names and "generation_config.json" in names and "pytorch_model.bin" not in names


def test_one_file_and_any_module(tmp_path):
    def build():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)
        )

    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, 3, 8, 8)
    model[1].running_var.uniform_(1, 2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        form = build()
    wanted = fxprune.prune(model, 0.5, x, verify=False)
    out = tmp_path / "small.safetensors"
    fxprune.prune_checkpoint(tmp_path / "model.safetensors", out, 0.5, x, model=form)
    again = fxprune.load(out, form.to_empty(device="cpu"))
    alike(again.state_dict(), wanted.state_dict())
    assert torch.equal(again.eval()(x), wanted.eval()(x))


CHANGES = {
    "a tensor more": (
        lambda t: t | {"model.extra.weight": torch.ones(3)},
        "model.extra.weight is stored, and",
    ),
    "a tensor less": (lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"}, "model.norm.weight is not stored"),
    "another shape": (
        lambda t: t | {"model.norm.weight": torch.ones(31)},
        "is stored with shape (31,), not (32,)",
    ),
    "another kind": (lambda t: t | {"model.norm.weight": torch.ones(32).int()}, "model.norm.weight is stored as torch.int32"),
    "no tie": (lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1}, "differ, and are one tensor of the model"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_of_another_model_are_refused(change, tmp_path):
    llama(tmp_path / "model", shard="1GB", tie_word_embeddings=True)
    path, (made, why) = tmp_path / "model/model.safetensors", CHANGES[change]
    save_file({n: t.clone() for n, t in made(load_file(path)).items()}, path, {"format": "pt"})
    with refuses(why):
        fxprune.prune_checkpoint(tmp_path / "model", tmp_path / "small", 0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_tied_tensor_that_is_stored_twice(tmp_path):
    model = llama(tmp_path / "model", shard="1GB", tie_word_embeddings=True)
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    fxprune.prune_checkpoint(tmp_path / "model", tmp_path / "small", 0.5)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small")
    wanted = fxprune.prune(model, 0.5, IDS, same_class=True, verify=False)
    alike(again.state_dict(), wanted.state_dict())


def damaged_index(folder, change):
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    change(data["weight_map"])
    path.write_text(json.dumps(data))


DAMAGE = {
    "a shard is gone": (lambda f: next(f.glob("model-00002*")).unlink(), "cannot be read"),
    "a shard is cut short": (lambda f: shorten(next(f.glob("model-00002*"))), "cannot be read"),
    "a shard twice": (lambda f: shutil.copy(next(f.glob("model-00002*")), next(f.glob("model-00003*"))), "is in model-0000"),
    "unknown to the index": (lambda f: damaged_index(f, lambda m: m.pop("model.norm.weight")), "not the index"),
    "elsewhere": (lambda f: damaged_index(f, lambda m: m.update({"x": "../model-00001-of-00005.safetensors"})), "beside it"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "no model can be built"),
}


def shorten(path):
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused(damage, tmp_path):
    llama(tmp_path / "model")
    harm, why = DAMAGE[damage]
    harm(tmp_path / "model")
    with refuses(why):
        fxprune.prune_checkpoint(tmp_path / "model", tmp_path / "small", 0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_runs_the_model_and_what_is_there_is_refused(tmp_path):
    llama(tmp_path / "model")
    with refuses("the criterion taylor looks at more than activations"):
        fxprune.prune_checkpoint(tmp_path / "model", tmp_path / "small", 0.5, criterion="taylor", data=[IDS])
    with refuses("latency is measured"):
        fxprune.prune_checkpoint(tmp_path / "model", tmp_path / "small", latency=0.5)
    with refuses("exists"):
        fxprune.prune_checkpoint(tmp_path / "model", tmp_path / "model", 0.5)
    for name, value in {"verify": True, "depth": True, "remove": {"model.layers.0.mlp.up_proj": [0]}}.items():
        with refuses(f"no argument {name!r}"):
            fxprune.prune_checkpoint(tmp_path / "model", tmp_path / "small", **{name: value})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_writer_writes_what_safetensors_reads(tmp_path):
    tensors = {
        "b": torch.arange(5) > 2,
        "f": torch.randn(2, 3),
        "h": torch.randn(3).bfloat16(),
        "n": torch.tensor(7),
        "e": torch.ones(0),
    }
    entries = [Entry(name, t.shape, t.dtype, t.clone) for name, t in tensors.items()]
    write_one_by_one(tmp_path / "a.safetensors", entries, lambda digests: {"format": "pt", **digests})
    alike(load_file(tmp_path / "a.safetensors"), tensors)
