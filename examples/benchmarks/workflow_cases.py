"""What the workflows of `workflows.py` share: models, the forms in which they are tried, and checks.

A workflow is a function of a `Case`, registered with `workflow`; it raises where the model cannot go through it.
"""

import copy
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from models import call, randomise
from sweep import one_line
from torch import Tensor, nn

import fxprune
from fxprune.passes.ir.pytree import collect, map_tensors

RATIO = 0.5
ORIGINAL, GRAPH, CLASS, TORCH_PRUNING, MODELOPT = "original", "graph", "same class", "torch-pruning", "modelopt"
FORMS = (ORIGINAL, GRAPH, CLASS, TORCH_PRUNING, MODELOPT)
Built = tuple[nn.Module, Any]
ROUNDING = 0.3
# what fxprune is asked besides: the outputs of an encoder stay as wide as they are, and no number of its configuration says
# which heads are left of that width
ASKED = {"BERT, encoder": {"uniform": True}}


class Wrong(Exception):
    """A workflow ran, and its result is not what it should be."""


def check(holds: object, words: str) -> None:
    if not holds:
        raise Wrong(words)


# -- models -----------------------------------------------------------------------------------------------------------------


def images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def of_torchvision(name: str, size: int = 64, **options: Any) -> Callable[[], Built]:
    return lambda: (torchvision.models.get_model(name, weights=None, **options), images(2, size))


def of_timm(name: str, size: int = 64, **options: Any) -> Callable[[], Built]:
    return lambda: (timm.create_model(name, **options), images(2, size))


def of_transformers(name: str, **more: Any) -> Callable[[], Built]:
    """A small configuration; what `more` names is added to the inputs, or left out of them where it is None."""

    def build() -> Built:
        from transformers_configs import CONFIGS

        model, inputs = CONFIGS[name]()
        inputs = {k: v for k, v in (inputs | more).items() if v is not None}
        return model, {k: v(inputs) if callable(v) else v for k, v in inputs.items()}

    return build


def padded(inputs: dict[str, Any]) -> Tensor:
    """A mask of tokens under which the second of two texts is shorter."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, -4:] = 0
    return mask


def small_vit() -> Built:
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    return torchvision.models.VisionTransformer(image_size=32, patch_size=8, **sizes), images(2, 32)


def detector(name: str) -> Callable[[], Built]:
    def build() -> Built:
        from suites import detection

        return detection(name)

    return build


def yolo() -> Built:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolo11n.yaml", verbose=False), images(2, 64)


def encoder() -> Built:
    import transformers as hf
    from transformers_configs import ENCODERS, tokens

    inputs = tokens(None)
    return hf.BertModel(hf.BertConfig(**ENCODERS)), inputs | {"attention_mask": padded(inputs)}


MODELS: dict[str, Callable[[], Built]] = {
    "ResNet-18": of_torchvision("resnet18"),
    "ResNet-18, quantizable": of_torchvision("quantized_resnet18", quantize=False),
    "MobileNetV2": of_torchvision("mobilenet_v2"),
    "ViT": small_vit,
    "timm ViT": of_timm("vit_tiny_patch16_224", 32, img_size=32, drop_path_rate=0.2, num_classes=10),
    "timm ConvNeXt": of_timm("convnext_atto", drop_path_rate=0.2, num_classes=10),
    "timm ResNet": of_timm("resnet10t", num_classes=10),
    "timm ResNet, features": of_timm("resnet10t", features_only=True),
    "BERT": of_transformers("bert"),
    "BERT, padded": of_transformers("bert", attention_mask=padded),
    "BERT, labels": of_transformers("bert", attention_mask=padded, labels=lambda inputs: inputs["input_ids"]),
    "BERT, encoder": encoder,
    "Llama": of_transformers("llama"),
    "Llama, labels": of_transformers("llama", labels=lambda inputs: inputs["input_ids"]),
    "GPT-2": of_transformers("gpt2"),
    "Gemma 3": of_transformers("gemma3"),
    "T5": of_transformers("t5"),
    "Whisper": of_transformers("whisper"),
    "Faster R-CNN": detector("fasterrcnn_mobilenet_v3_large_320_fpn"),
    "SSDlite": detector("ssdlite320_mobilenet_v3_large"),
    "LR-ASPP": lambda: (
        torchvision.models.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None),
        images(),
    ),
    "YOLO11n": yolo,
}


def build(model: str, seed: int = 0) -> Built:
    """The original, in evaluation mode with random weights, and its example inputs."""
    torch.manual_seed(seed)
    network, inputs = MODELS[model]()
    network.eval()
    with torch.no_grad():
        randomise(network, fresh(inputs), seed + 1)
    return network, inputs


def prune(network: nn.Module, inputs: Any, form: str, **asked: Any) -> nn.Module:
    """The model in a form. Torch-Pruning and modelopt are told what `prunability.py` tells them, fxprune what is `asked`."""
    if form == ORIGINAL:
        return network
    if form in (GRAPH, CLASS):
        return fxprune.prune(network, RATIO, example_inputs=inputs, same_class=form == CLASS, **asked)
    from prunability import OTHERS

    return OTHERS[form](network, inputs)


# -- workflows --------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model on its way through a workflow.

    Attributes:
        name, form: of the model, and what was done to it.
        model: in evaluation mode.
        inputs: example inputs, as `prune` takes them.
        folder: an empty one, for files.
        process: one that has not seen the model.
    """

    name: str
    form: str
    model: nn.Module
    inputs: Any
    folder: Path
    process: "NewProcess"

    @classmethod
    def of(cls, name: str, form: str, folder: Path, process: "NewProcess") -> "Case":
        """Raises what pruning raises, and `Wrong` where it removes nothing."""
        network, inputs = build(name)
        before = count_parameters(network)
        pruned = prune(network, fresh(inputs), form, **ASKED.get(name, {})).eval()
        check(form == ORIGINAL or count_parameters(pruned) < before, "nothing was removed")
        return cls(name, form, pruned, inputs, folder, process)

    def run(self, model: nn.Module | None = None, inputs: Any = None) -> list[Tensor]:
        return outputs(self.model if model is None else model, self.inputs if inputs is None else inputs)

    def other(self) -> nn.Module:
        """A copy with other weights."""
        made = copy.deepcopy(self.model)
        with torch.no_grad():
            for tensor in [*made.parameters(), *made.buffers()]:
                if tensor.is_floating_point():
                    tensor.add_(0.1 * torch.rand_like(tensor))
        return made

    def elsewhere(self, load: str) -> list[Tensor]:
        """What the model gives that a few lines of Python load as `model` in a process that has seen none."""
        torch.save(self.inputs, self.folder / "inputs.pt")
        failure = self.process.execute(
            f"import os, torch, fxprune\nfrom workflow_cases import build, outputs\nos.chdir({str(self.folder)!r})\n{load}\n"
            "torch.save(outputs(model.eval(), torch.load('inputs.pt', weights_only=False)), 'outputs.pt')\n"
        )
        check(not failure, f"in a new process: {failure}")
        return torch.load(self.folder / "outputs.pt")


class NewProcess:
    """A process that has imported what this one has, and waits for something to do: it is forked before a model is built."""

    def __init__(self) -> None:
        (reading, self.writing), (self.reading, writing) = os.pipe(), os.pipe()
        self.id = os.fork()
        if self.id == 0:
            os.close(self.writing)
            failure = ""
            try:
                with os.fdopen(reading) as pipe:
                    exec(pipe.read(), {})
            except BaseException as error:
                failure = one_line(error)
            os.write(writing, failure.encode())
            os._exit(0)
        os.close(reading)
        os.close(writing)

    def execute(self, code: str) -> str:
        """Why it failed, or an empty text."""
        with os.fdopen(self.writing, "w") as pipe:
            pipe.write(code)
        with os.fdopen(self.reading) as pipe:
            failure = pipe.read()
        ended = os.waitstatus_to_exitcode(os.waitpid(self.id, 0)[1])
        self.id = 0
        return failure or (f"the process ends with {ended}" if ended else "")

    def end(self) -> None:
        """If it had nothing to do."""
        if self.id:
            os.kill(self.id, signal.SIGKILL)
            os.waitpid(self.id, 0)
            os.close(self.writing)
            os.close(self.reading)


Run = Callable[[Case], None]


@dataclass(frozen=True)
class Workflow:
    """Attributes: `forms`, those that it makes sense for; `needs`, packages."""

    group: str
    name: str
    model: str
    run: Run = field(repr=False)
    forms: Sequence[str]
    needs: Sequence[str] = ()


WORKFLOWS: dict[tuple[str, str], Workflow] = {}
OF_IMAGES = ("ResNet", "MobileNet", "ViT", "timm", "Faster", "SSD", "LR")


def workflow(group: str, name: str, *models: str, graph: bool = True, needs: Sequence[str] = ()) -> Callable[[Run], Run]:
    """Register a workflow for some models. `graph`: whether it makes sense for a GraphModule, which has no methods."""

    def register(run: Run) -> Run:
        for model in models:
            forms = [f for f in FORMS if (graph or f != GRAPH) and (f != MODELOPT or model.startswith(OF_IMAGES))]
            WORKFLOWS[name, model] = Workflow(group, name, model, run, forms, needs)
        return run

    return register


# -- what they compare ------------------------------------------------------------------------------------------------------


def fresh(inputs: Any) -> Any:
    """Copies of inputs, which some forwards write to."""
    return map_tensors(inputs, lambda t: t.clone())


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors of a model's output, those of caches left out."""
    with torch.no_grad():
        out = call(model, fresh(inputs))
    if hasattr(out, "items"):
        out = {name: value for name, value in out.items() if name != "past_key_values"}
    return collect(out, Tensor)


def same(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 0.0) -> None:
    """Raises `Wrong` where tensors differ by more than a share of the largest absolute value of what is wanted."""
    check(len(found) == len(wanted) > 0, f"{len(found)} outputs instead of {len(wanted)}")
    for one, two in zip(found, wanted, strict=True):
        check(one.shape == two.shape, f"an output has the shape {tuple(one.shape)} instead of {tuple(two.shape)}")
        error = (
            float((one.double() - two.double()).abs().max() / two.double().abs().max().clamp(min=1e-30)) if two.numel() else 0
        )
        check(error <= tolerance, f"outputs differ by {error:.1e}")


def rounded(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Likewise of a quantized model: it has to differ, by no more than three tenths in the L2 norm; random layers amplify."""
    check(len(found) == len(wanted) > 0, f"{len(found)} outputs instead of {len(wanted)}")
    check(any(not torch.equal(a.to(b), b) for a, b in zip(found, wanted, strict=True)), "nothing was quantized")
    for one, two in zip(found, wanted, strict=True):
        error = float((one - two).norm() / two.norm())
        check(error <= ROUNDING, f"outputs differ by {error:.1e} in the L2 norm")


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def loss_of(out: Any) -> Tensor:
    """A number to train a model by: the loss that it returns, or one that every output has a part in."""
    if getattr(out, "loss", None) is not None:
        return out.loss
    if isinstance(out, dict) and "loss" in out:
        return out["loss"]
    return sum(t.float().square().mean() for t in collect(out, Tensor) if t.is_floating_point())


def train(model: nn.Module, inputs: Any, optimizer: torch.optim.Optimizer | None = None, steps: int = 3) -> list[float]:
    """Losses of some steps; every parameter that had a gradient in the first one has moved."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.train()
    losses, reached = [], set()
    for _ in range(steps):
        loss = loss_of(call(model, fresh(inputs)))
        optimizer.zero_grad()
        loss.backward()
        reached |= {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    check(all(torch.isfinite(torch.tensor(losses))), "the loss is not finite")
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    check(len(reached) >= 0.9 * len(before), f"only {len(reached)} of {len(before)} parameters have a gradient")
    check(moved >= reached, f"{len(reached - moved)} parameters with a gradient stay as they are")
    return losses
