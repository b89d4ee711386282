"""Callbacks and trainers of other frameworks, with the frameworks themselves."""

import copy
import importlib
import sys

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune import PruneError
from fxprune.integrations import MissingExtra

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}


@pytest.mark.parametrize(
    ("module", "framework", "extra"),
    [
        ("lightning", "lightning.pytorch", "lightning"),
        ("transformers", "transformers", "hf"),
        ("ultralytics", "ultralytics", "ultralytics"),
    ],
)
def test_a_missing_framework_is_said_with_its_extra(module, framework, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, framework, None)
    monkeypatch.delitem(sys.modules, f"fxprune.integrations.{module}", raising=False)
    with pytest.raises(MissingExtra, match=rf"{framework} cannot be imported(.|\n)*pip install 'fxprune\[{extra}\]'"):
        importlib.import_module(f"fxprune.integrations.{module}")
    assert issubclass(MissingExtra, ImportError) and issubclass(MissingExtra, PruneError)


def size(model):
    return sum(p.numel() for p in model.parameters())


# -- lightning ------------------------------------------------------------------------------------------------------------


def lightning_run(folder, checkpoint=None):
    """A net that is trained for 16 steps and pruned after 4, 8 and 12; with its checkpoints after 8 and 16."""
    lightning = pytest.importorskip("lightning.pytorch")
    from fxprune.integrations.lightning import PruningCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3))

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.parameters(), 1e-2)

    torch.manual_seed(1)
    x = torch.randn(64, 16)
    loader = DataLoader(TensorDataset(x, x.argmax(1) % 3), batch_size=8)
    pruning = PruningCallback("net", every=4, example_inputs=x[:2], params=0.4, steps=3)
    saving = lightning.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    module, quiet = Module(), {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    where = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    lightning.Trainer(max_steps=16, callbacks=[saving, pruning], **quiet, **where).fit(module, loader, ckpt_path=checkpoint)
    return module, pruning


def test_lightning_prunes_and_goes_on_from_a_checkpoint(tmp_path):
    module, pruning = lightning_run(tmp_path)
    assert pruning.pruner.done
    assert size(module.net) <= 0.4 * (17 * 32 + 33 * 24 + 25 * 3)
    again, resumed = lightning_run(tmp_path, tmp_path / "step=8.ckpt")
    assert [str(step) for step in resumed.pruner.history] == [str(step) for step in pruning.pruner.history]
    pairs = zip(module.net.parameters(), again.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "the optimizer's moments were cut as the weights were"


# -- the Trainer of transformers --------------------------------------------------------------------------------------------


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**WIDTHS, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaForCausalLM(config)


def trained(folder, asked, checkpoint=None):
    """A Llama that is trained for 6 steps and pruned after 2 and 4; with checkpoints after 3 and 6."""
    pytest.importorskip("accelerate")
    from fxprune.integrations.transformers import PruningCallback

    ids = torch.randint(3, 60, (24, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0, "logging_steps": 100}
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=6, save_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, **quiet
    )
    model = llama()
    pruning = PruningCallback(every=2, example_inputs={"input_ids": ids[:2]}, steps=2, verify=False, **asked)
    if checkpoint is not None:
        pruning.resume(model, checkpoint)
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[pruning]).train(resume_from_checkpoint=checkpoint)
    return model, pruning


@pytest.mark.parametrize("asked", [{"params": 0.7, "uniform": True}, {"params": 0.7, "ranking": "global"}])
def test_the_trainer_prunes_and_goes_on_from_a_checkpoint(asked, tmp_path):
    model, pruning = trained(tmp_path, asked)
    assert pruning.pruner.done and type(model) is transformers.LlamaForCausalLM
    assert size(model) <= 0.7 * size(llama())
    assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 5)
    again, _ = trained(tmp_path / "again", asked, str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_the_trainer_cannot_go_on_from_is_said(tmp_path):
    from fxprune.integrations.transformers import PruningCallback

    with pytest.raises(PruneError, match=r"pruner\.pt does not exist"):
        PruningCallback(every=2, example_inputs=torch.ones(1, 4).long()).resume(llama(), tmp_path)
    with pytest.raises(PruneError, match="every must be a positive number of optimizer steps, not 0"):
        PruningCallback(every=0)
    with pytest.raises(PruneError, match="mask is not for the callback to be told"):
        PruningCallback(every=1, mask="hold")


# -- ultralytics --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def yolo(tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    ultralytics = pytest.importorskip("ultralytics")
    torch.manual_seed(0)
    return ultralytics.YOLO("yolo11n.yaml", verbose=False)


@pytest.mark.parametrize("asked", [{"ratio": 0.3}, {"params": 0.6, "ranking": "global"}])
def test_yolo_predicts_and_exports_what_it_computes(yolo, asked):
    from fxprune.integrations import ultralytics

    before = size(yolo.model)
    x = torch.rand(1, 3, 64, 64)
    small = ultralytics.prune(yolo, example_inputs=x, verify=False, **asked)
    assert size(small.model) < 0.7 * before and size(yolo.model) == before
    assert len(small.predict(x, verbose=False)) == 1
    exported = torch.jit.load(small.export(format="torchscript", imgsz=64))
    with torch.no_grad():
        wanted = copy.deepcopy(small.model).eval()(x)[0]
        assert (exported(x) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_yolo_trains_with_the_architecture_that_is_left(yolo, tmp_path, monkeypatch):
    known = torch.backends.flags_frozen.__globals__
    monkeypatch.setitem(known, "__allow_nonbracketed_mutation_flag", True)  # which torch.testing takes from all tests
    from PIL import Image

    from fxprune.integrations import ultralytics

    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / part).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / part / f"{i}.png")
            (tmp_path / "labels" / part / f"{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n")

    def data(count):
        path = tmp_path / f"{count}.yaml"
        names = ", ".join(f"{i}: class{i}" for i in range(count))
        path.write_text(f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: {{{names}}}\n")
        return str(path)

    small = ultralytics.prune(yolo, 0.5, torch.rand(1, 3, 64, 64), verify=False)
    shapes = {name: p.shape for name, p in small.model.named_parameters()}
    quiet = {"imgsz": 64, "batch": 2, "workers": 0, "plots": False, "verbose": False, "device": "cpu"}
    asked = {"epochs": 1, "project": str(tmp_path), "name": "run", "exist_ok": True, **quiet}
    with pytest.raises(PruneError, match="tells 80 classes apart, and the data has 3"):
        small.train(trainer=ultralytics.trainer(small), data=data(3), **asked)
    small.train(trainer=ultralytics.trainer(small), data=data(80), **asked)
    again = type(yolo)(tmp_path / "run" / "weights" / "last.pt")
    for model in (small.model, again.model):
        assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert small.val(data=data(80), **quiet).box.map >= 0
