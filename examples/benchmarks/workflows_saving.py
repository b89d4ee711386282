"""Workflows: a model is stored, copied, and handed to other processes."""

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from workflow_cases import CLASS, GRAPH, ORIGINAL, Case, check, outputs, same, workflow

import fxprune

GROUP = "save and load"


@workflow(GROUP, "torch.save of the module, loaded in a new process", "ResNet-18", "BERT")
def whole(case: Case) -> None:
    torch.save(case.model, case.folder / "model.pt")
    same(case.elsewhere("model = torch.load('model.pt', weights_only=False)"), case.run())


@workflow(GROUP, "torch.save of the module in training, then eval()", "timm ViT")
def saved_in_training(case: Case) -> None:
    wanted = case.run()
    torch.save(case.model.train(), case.folder / "model.pt")
    same(case.elsewhere("model = torch.load('model.pt', weights_only=False); assert model.training"), wanted)
    again = torch.load(case.folder / "model.pt", weights_only=False)
    torch.manual_seed(0)
    first = case.model(case.inputs)
    torch.manual_seed(0)
    same([again(case.inputs)], [first])


@workflow(GROUP, "state_dict into a copy with other weights", "BERT")
def state_dict(case: Case) -> None:
    torch.save(case.model.state_dict(), case.folder / "state.pt")
    other = case.other()
    other.load_state_dict(torch.load(case.folder / "state.pt", weights_only=True), strict=True)
    same(case.run(other), case.run())


@workflow(GROUP, "safetensors.torch.save_model and load_model", "BERT", needs=["safetensors"])
def safetensors(case: Case) -> None:
    """Both have weights that are tied."""
    from safetensors.torch import load_model, save_model

    save_model(case.model, case.folder / "model.safetensors")
    other = case.other()
    load_model(other, case.folder / "model.safetensors")
    same(case.run(other), case.run())


@workflow(GROUP, "pickle", "BERT")
def pickled(case: Case) -> None:
    same(case.run(pickle.loads(pickle.dumps(case.model))), case.run())


@workflow(GROUP, "copy.deepcopy, independent", "ResNet-18")
def deepcopied(case: Case) -> None:
    wanted, made = case.run(), copy.deepcopy(case.model)
    same(case.run(made), wanted)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    same(case.run(), wanted)


def answer(model: nn.Module, inputs: Any, queue: Any) -> None:
    queue.put([t.numpy() for t in outputs(model, inputs)])


@workflow(GROUP, "handed to a spawned process", "BERT")
def spawned(case: Case) -> None:
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=answer, args=(case.model, case.inputs, queue))
    process.start()
    process.join()
    check(process.exitcode == 0 and not queue.empty(), f"the process ends with {process.exitcode}")
    same([torch.from_numpy(a) for a in queue.get()], case.run(), 1e-5)


@workflow(GROUP, "the tool's own file, loaded in a new process", "ResNet-18", "BERT")
def own_file(case: Case) -> None:
    """fxprune has one; Torch-Pruning's documentation stores the module, a state dict does for the original."""
    original = f"original, _ = build({case.name!r}, seed=3)\n"
    if case.form in (GRAPH, CLASS):
        fxprune.save(case.model, case.folder / "model.safetensors")
        load = original + f"model = fxprune.load('model.safetensors', original, same_class={case.form == CLASS})"
    elif case.form == ORIGINAL:
        torch.save(case.model.state_dict(), case.folder / "model.pt")
        load = original + "model = original; model.load_state_dict(torch.load('model.pt'))"
    else:
        torch.save(case.model, case.folder / "model.pt")
        load = "model = torch.load('model.pt', weights_only=False)"
    same(case.elsewhere(load), case.run())


@workflow(GROUP, "a folder that builds the model, loaded in a new process", "Llama")
def own_folder(case: Case) -> None:
    if case.form in (GRAPH, CLASS):
        fxprune.save(case.model, case.folder / "model")
        load = f"model = fxprune.load('model', same_class={case.form == CLASS})"
    else:
        case.model.save_pretrained(case.folder / "model")
        load = f"import transformers; model = transformers.{type(case.model).__name__}.from_pretrained('model')"
    same(case.elsewhere(load), case.run())


@workflow(GROUP, "cast to bfloat16 and back, to double", "ViT")
def cast(case: Case) -> None:
    wanted = case.run()
    double = copy.deepcopy(case.model).double()(case.inputs.double())
    check(double.dtype == torch.float64, f"the output is {double.dtype}")
    same([double], wanted, 1e-4)
    half = copy.deepcopy(case.model).to(torch.bfloat16)(case.inputs.bfloat16())
    check(half.dtype == torch.bfloat16, f"the output is {half.dtype}")
    same([half], wanted, 0.15)


@workflow(GROUP, "built on the meta device, to_empty and load_state_dict", "ResNet-18")
def materialised(case: Case) -> None:
    made = copy.deepcopy(case.model).to("meta").to_empty(device="cpu")
    buffer = io.BytesIO()
    torch.save(case.model.state_dict(), buffer)
    buffer.seek(0)
    made.load_state_dict(torch.load(buffer))
    same(case.run(made), case.run())


@workflow(GROUP, "torch.func.functional_call, vmap of per-sample gradients", "ViT")
def functional(case: Case) -> None:
    from torch.func import functional_call, grad, vmap

    values = {name: p.detach() for name, p in case.model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(case.model, values, (x[None],)).square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(values, case.inputs)
    for at, x in enumerate(case.inputs):
        wanted = grad(loss)(values, x)
        same([found[name][at] for name in wanted], list(wanted.values()), 1e-3)
