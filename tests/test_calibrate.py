"""`calibrate`: what criteria see in data, kept and used again; and calibration of checkpoints, block by block."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from refusals import untouched
from test_prune_checkpoint import IDS, llama, refuses

import fxprune
from fxprune.checkpoints import by_blocks

NO_CACHE = {"use_cache": False}


def words(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 60, (n, 8), generator=generator)} for n in sizes]


def labelled(batches):
    return [b | {"labels": b["input_ids"], "attention_mask": torch.ones_like(b["input_ids"])} for b in batches]


@pytest.mark.parametrize("criterion", ["wanda", "taylor", "token_taylor"])
def test_one_calibration_serves_every_budget(criterion, tmp_path):
    model, data = llama(tmp_path / "model", torch.float32), labelled(words(2, 3))
    with untouched(model):
        seen = fxprune.calibrate(model, data, criterion, IDS | NO_CACHE)
    seen.save(tmp_path / "seen.safetensors")
    again = fxprune.Calibration.load(tmp_path / "seen.safetensors")
    for asked in ({"ratio": 0.5}, {"params": 0.7, "ranking": "global"}):
        asked |= {"example_inputs": IDS | NO_CACHE, "verify": False}
        wanted = fxprune.plan_of(fxprune.prune(model, criterion=criterion, data=data, **asked))
        for found in (seen, again) if "ratio" in asked else (again,):  # what was loaded holds no more than what was saved
            assert fxprune.plan_of(fxprune.prune(model, criterion=found, **asked)) == wanted


def test_a_calibration_stands_for_the_data_of_the_default(tmp_path):
    model, data = llama(tmp_path / "model", torch.float32), labelled(words(2, 3))
    seen = fxprune.calibrate(model, data, example_inputs=IDS | NO_CACHE)
    for asked in ({"params": 0.8}, {"params": 0.6, "only": "*mlp*"}):
        asked |= {"example_inputs": IDS | NO_CACHE, "verify": False}
        wanted = fxprune.prune(model, data=data, **asked)
        found = fxprune.prune(model, criterion=seen, **asked)
        assert fxprune.plan_of(found) == fxprune.plan_of(wanted)
        assert found.meta["chosen"] == wanted.meta["chosen"][1:]  # all but the criterion, which was given


@pytest.mark.parametrize("how", ["influence", "taylor", "loss", lambda stream, added: added.norm() / stream.norm()])
def test_a_calibration_holds_scores_of_branches_and_blocks(how, tmp_path):
    model, data = llama(tmp_path / "model", torch.float32), labelled(words(2, 3))
    with untouched(model):
        seen = fxprune.calibrate(model, iter(data), "wanda", IDS | NO_CACHE, depth_criterion=how)
    seen.save(tmp_path / "seen.safetensors")
    again = fxprune.Calibration.load(tmp_path / "seen.safetensors")
    for depth, share in (("only", 0.9), ("only", 0.7), (True, 0.8), ("blocks", 0.8)):
        asked = {"example_inputs": IDS | NO_CACHE, "verify": False, "depth": depth, "params": share, "ranking": "global"}
        wanted = fxprune.plan_of(fxprune.prune(model, data=data, criterion="wanda", depth_criterion=how, **asked))
        assert bool(wanted.removed) == (depth is not True)
        for found in (seen, again) if depth is True else (again,):  # as above
            assert fxprune.plan_of(fxprune.prune(model, criterion=found, **asked)) == wanted


class TwoInOne(torch.nn.Module):
    """Two residual branches of one module, the second of which adds more."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (torch.nn.Parameter(torch.randn(8, 8) * scale) for scale in (0.1, 1.0))
        self.last = torch.nn.Linear(8, 3)

    def forward(self, x):
        x = x + (x @ self.first).relu()
        return self.last(x + (x @ self.second).relu())


def test_branches_of_one_module_have_a_score_each():
    model, x = TwoInOne(), torch.randn(16, 8)
    seen = fxprune.calibrate(model, [x], "wanda", x, depth_criterion="influence")
    assert seen.branches["first"] < seen.branches["second"] and len(seen.branches) == 2
    assert set(fxprune.plan_of(fxprune.prune(model, 0.5, x, criterion=seen, depth="only")).removed) == {"first"}


def test_a_calibration_without_a_branch_says_so(tmp_path):
    model, data = llama(tmp_path / "model", torch.float32), labelled(words(2, 3))
    seen = fxprune.calibrate(model, data, "wanda", IDS | NO_CACHE, depth_criterion="influence")
    gone = next(iter(seen.branches))
    less = fxprune.Calibration("wanda", seen.evidence, branches={n: s for n, s in seen.branches.items() if n != gone})
    with untouched(model), refuses(f"the calibration has no score of a residual branch\n  at {gone}\n"):
        fxprune.prune(model, criterion=less, example_inputs=IDS | NO_CACHE, depth="only", params=0.9)
    with untouched(model), refuses("depth_criterion must be one of influence, taylor, loss, not 'weights'"):
        fxprune.calibrate(model, data, "wanda", IDS | NO_CACHE, depth_criterion="weights")


ASKED = {
    "wanda": {"ratio": 0.5},
    "flap": {"params": 0.7, "ranking": "global"},
    None: {"ratio": 0.5, "only": "*mlp*"},
}


@pytest.mark.parametrize("criterion", ASKED)
def test_a_checkpoint_is_pruned_as_its_model_in_memory(criterion, tmp_path):
    asked = ASKED[criterion]
    tied = "only" in asked
    model, data = llama(tmp_path / "model", tie_word_embeddings=tied), words(2, 3, 1)
    given = {} if criterion is None else {"criterion": criterion}
    plan = fxprune.prune_checkpoint(tmp_path / "model", tmp_path / "small", example_inputs=IDS, data=data, **given, **asked)
    wanted = fxprune.prune(
        model,
        example_inputs=IDS | NO_CACHE,
        criterion=criterion or "flap",
        data=data,
        same_class=True,
        verify=False,
        **asked,
    )
    assert plan == fxprune.plan_of(wanted)
    loaded = fxprune.load if "params" in asked else transformers.LlamaForCausalLM.from_pretrained
    state = loaded(tmp_path / "small").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.state_dict().items())


def test_one_block_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """And no file is mapped: each tensor of a block would map all of its file, more than some systems allow."""
    model, stages = llama(tmp_path / "model"), []
    source = shutil.copytree(tmp_path / "model", tmp_path / "source")  # which nothing else maps
    load = by_blocks.BlockRun.load

    def watched(run, path):
        load(run, path)
        own = {name: p for name, p in model.named_parameters() if ".layers." in name}
        there = {
            name for name, p in run.model.named_parameters() if name in own and not p.is_meta and torch.equal(p, own[name])
        }
        held = {name for o in run.observers for name in (run.names.get(i) for i in o.held) if name in own}
        stages.append((path, there, held))
        assert str(source) not in Path("/proc/self/maps").read_text()

    monkeypatch.setattr(by_blocks.BlockRun, "load", watched)
    fxprune.prune_checkpoint(source, tmp_path / "small", 0.5, IDS, criterion="wanda", data=words(2, 3))
    norms = {name for name, p in model.named_parameters() if "norm" in name}  # all ones, as many others are
    for path, there, held in stages[1:]:
        assert there - norms and all(name.startswith(f"{path}.") for name in there - norms)
        assert not held
    assert [path for path, _, _ in stages] == ["", "model.layers.0", "model.layers.1"]


def test_what_cannot_be_done(tmp_path):
    model = llama(tmp_path / "model", torch.float32)
    ask = lambda **more: fxprune.prune_checkpoint(tmp_path / "model", tmp_path / "small", 0.5, IDS, **more)  # noqa: E731
    with refuses("the criterion taylor looks at more than activations"):
        ask(criterion="taylor", data=labelled(words(2)))
    with refuses("the criterion FLAP needs data"):
        ask(criterion="flap")
    with refuses("on a batch of data"):
        ask(criterion="flap", data=[{"input_ids": torch.full((2, 3), 99)}])
    assert not (tmp_path / "small").exists()
    with refuses("gathers no data"):
        fxprune.calibrate(model, words(2), "magnitude", IDS)
    with refuses("gathers nothing that could be kept"):
        fxprune.calibrate(model, words(2), "fisher", IDS)
    (tmp_path / "model/model.safetensors").write_text("none")
    for path in (tmp_path / "model/model.safetensors", next((tmp_path / "model").glob("model-00001*"))):
        with pytest.raises(fxprune.PruneError, match=re.escape(str(path))):
            fxprune.Calibration.load(path)
    seen = fxprune.calibrate(model, words(2), "flap", IDS | NO_CACHE)
    with refuses("the calibration is of another model"):
        fxprune.prune(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)), 0.5, torch.randn(2, 3), criterion=seen)
    with refuses("cannot be written"):
        seen.save(tmp_path / "nowhere/seen.safetensors")


def test_losses_of_heads_are_no_losses_of_dimensions(tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 24, dropout=0, batch_first=True)
    model, x = torch.nn.Sequential(torch.nn.Linear(6, 16), layer, torch.nn.Linear(16, 3)).eval(), torch.randn(2, 5, 6)
    loss = lambda out: out.square().mean()  # noqa: E731
    fxprune.calibrate(model, [x], "token_taylor", x, loss=loss).save(tmp_path / "heads.safetensors")
    seen = fxprune.Calibration.load(tmp_path / "heads.safetensors")
    fxprune.prune(model, 0.5, x, criterion=seen)
    for asked in ({"ratio": 0.5}, {"macs": 0.5}):
        with refuses("gathered for attention='heads', and attention='dims' is asked for"):
            fxprune.prune(model, example_inputs=x, criterion=seen, attention="dims", **asked)
    for criterion in ("token_taylor", "wanda"):  # whose evidence is of dimensions, and of none
        seen = fxprune.calibrate(model, [x], criterion, x, loss=loss, attention="dims")
        fxprune.prune(model, 0.5, x, criterion=seen, attention="heads" if criterion == "wanda" else "dims")
    model, seen = model[::2], fxprune.calibrate(model[::2], [x], "token_taylor", x, loss=loss)
    fxprune.prune(model, 0.5, x, criterion=seen, attention="dims")  # there are none


def test_calibration_keeps_no_caches(tmp_path, monkeypatch):
    model, given = llama(tmp_path / "model", torch.float32), []
    forward = transformers.LlamaForCausalLM.forward
    monkeypatch.setattr(
        transformers.LlamaForCausalLM,
        "forward",
        lambda self, *a, use_cache=None, **k: given.append(use_cache) or forward(self, *a, use_cache=use_cache, **k),
    )
    fxprune.calibrate(model, words(2, 3), "wanda", IDS | NO_CACHE)
    assert len(given) > 2 and not any(given)


def perceptron(width):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))


def test_the_first_batch_stands_for_example_inputs():
    model, data = perceptron(6), [torch.randn(3, 4), torch.randn(5, 4)]
    wanted = fxprune.calibrate(model, data, "flap", data[0]).evidence
    for given in (data, iter(data), [{"input": x} for x in data], [(x, 0) for x in data]):
        found = fxprune.calibrate(model, given, "flap").evidence
        assert found.keys() == wanted.keys() and all(torch.equal(found[n], t) for n, t in wanted.items())
    for nothing in ([], iter(())):
        with refuses("data holds no batches"):
            fxprune.calibrate(model, nothing, "flap")
    with refuses("the criterion FLAP needs data"):
        fxprune.calibrate(model, None, "flap")


def test_a_calibration_of_another_width_is_refused():
    seen, x = fxprune.calibrate(perceptron(6), [torch.randn(3, 4)], "flap"), torch.randn(1, 4)
    with refuses("the calibration is of another model"):
        fxprune.prune(perceptron(8), 0.5, x, criterion=seen)
