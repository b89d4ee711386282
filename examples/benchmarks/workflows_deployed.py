"""Workflows: a model is compiled, exported and quantized."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from workflow_cases import Case, check, images, rounded, same, workflow

COMPILE, QUANTIZE = "compile and export", "quantize"
RUNTIME = ["onnxscript", "onnxruntime"]


def variants(case: Case) -> list[Any]:
    """The example inputs, and others of other sizes."""
    if isinstance(case.inputs, Tensor):
        size = case.inputs.shape[-1]
        return [case.inputs, images(3, size), images(5, size)]
    return [case.inputs, *({k: resized(v, *to) for k, v in case.inputs.items()} for to in ((3, 9), (4, 15)))]


def resized(value: Any, batch: int, length: int) -> Any:
    return value.repeat(2, 2)[:batch, :length].contiguous() if isinstance(value, Tensor) else value


def free(case: Case) -> Any:
    """Its free dimensions, as `torch.export` takes them."""
    if isinstance(case.inputs, Tensor):
        return ({0: torch.export.Dim.DYNAMIC},)
    dims = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)  # texts and their lengths
    return {k: dims if isinstance(v, Tensor) else None for k, v in case.inputs.items()}


def exported(case: Case) -> torch.export.ExportedProgram:
    args, kwargs = ((case.inputs,), {}) if isinstance(case.inputs, Tensor) else ((), case.inputs)
    with torch.no_grad():
        return torch.export.export(case.model, args, kwargs, dynamic_shapes=free(case))


@workflow(COMPILE, "torch.compile, dynamic", "timm ResNet", "BERT", "Llama")
def compiled(case: Case) -> None:
    model = torch.compile(case.model, dynamic=True)
    for inputs in variants(case):
        same(case.run(model, inputs), case.run(inputs=inputs), 1e-4)


@workflow(COMPILE, "torch.compile, trained", "ViT")
def compiled_training(case: Case) -> None:
    """In evaluation mode, where nothing is random."""
    found = []
    for model in (case.model, torch.compile(case.model)):
        case.model.zero_grad()
        model(case.inputs).square().mean().backward()
        found.append([p.grad.clone() for p in case.model.parameters() if p.grad is not None])
    same(found[1], found[0], 1e-3)


@workflow(COMPILE, "torch.export, dynamic, saved and loaded", "ResNet-18", "BERT, padded", "Llama")
def torch_export(case: Case) -> None:
    torch.export.save(exported(case), case.folder / "model.pt2")
    again = torch.export.load(case.folder / "model.pt2").module()
    for inputs in variants(case):
        same(case.run(again, inputs), case.run(inputs=inputs), 1e-5)


@workflow(COMPILE, "AOTInductor", "timm ResNet", "BERT, padded")
def aot(case: Case) -> None:
    path = torch._inductor.aoti_compile_and_package(exported(case), package_path=str(case.folder / "model.pt2"))
    model = torch._inductor.aoti_load_package(path)
    for inputs in variants(case):
        same(case.run(model, inputs), case.run(inputs=inputs), 1e-4)


@workflow(COMPILE, "ONNX, dynamic, in onnxruntime", "ResNet-18", "BERT, padded", needs=["onnxscript", "onnxruntime"])
def onnx(case: Case) -> None:
    import onnxruntime

    args, kwargs = ((case.inputs,), {}) if isinstance(case.inputs, Tensor) else ((), case.inputs)
    path = str(case.folder / "model.onnx")
    torch.onnx.export(case.model, args, path, kwargs=kwargs, dynamo=True, dynamic_shapes=free(case), verbose=False)
    session = onnxruntime.InferenceSession(path)
    for inputs in variants(case):
        given = [inputs] if isinstance(inputs, Tensor) else [v for v in inputs.values() if isinstance(v, Tensor)]
        names = [i.name for i in session.get_inputs()]
        found = session.run(None, {name: t.numpy() for name, t in zip(names, given, strict=True)})
        same([torch.from_numpy(a) for a in found], case.run(inputs=inputs), 1e-3)


@workflow(COMPILE, "torch.jit.trace, saved and loaded", "ResNet-18")
def traced(case: Case) -> None:
    torch.jit.save(torch.jit.trace(case.model, case.inputs), case.folder / "model.pt")
    same(case.run(torch.jit.load(case.folder / "model.pt")), case.run(), 1e-5)


# -- quantize ---------------------------------------------------------------------------------------------------------------


@workflow(QUANTIZE, "eager int8 after training", "ResNet-18, quantizable")
def eager(case: Case) -> None:
    import torch.ao.quantization as tq

    wanted, model = case.run(), copy.deepcopy(case.model)
    groups: list[Sequence[str]] = [["conv1", "bn1", "relu"]]
    for name, module in model.named_modules():
        if type(module).__name__ == "QuantizableBasicBlock":
            groups += [[f"{name}.conv1", f"{name}.bn1", f"{name}.relu"], [f"{name}.conv2", f"{name}.bn2"]]
            groups += [[f"{name}.downsample.0", f"{name}.downsample.1"]] if module.downsample is not None else []
    tq.fuse_modules(model, groups, inplace=True)
    model.qconfig = tq.get_default_qconfig("x86")
    tq.prepare(model, inplace=True)
    case.run(model)
    tq.convert(model, inplace=True)
    check(".quantized." in type(model.layer1[0].conv1).__module__, "the layers are not quantized")
    rounded(case.run(model), wanted)


@workflow(QUANTIZE, "FX int8 after training", "ResNet-18")
def fx_passes(case: Case) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(copy.deepcopy(case.model), get_default_qconfig_mapping("x86"), (case.inputs,))
    case.run(prepared)
    model = convert_fx(prepared)
    check(any(".quantized" in type(m).__module__ for m in model.modules()), "no layer is quantized")
    rounded(case.run(model), case.run())


@workflow(QUANTIZE, "PT2E int8", "ViT", needs=["torchao"])
def pt2e(case: Case) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported(case).module(), quantizer)
    case.run(prepared)
    rounded(case.run(convert_pt2e(prepared)), case.run())


@workflow(QUANTIZE, "dynamic int8", "BERT")
def dynamic(case: Case) -> None:
    from torch.ao.quantization import quantize_dynamic

    model = quantize_dynamic(case.model, {nn.Linear})
    check(any(".quantized" in type(m).__module__ for m in model.modules()), "no layer is quantized")
    rounded(case.run(model), case.run())


@workflow(QUANTIZE, "torchao int8 weights", "Llama", needs=["torchao"])
def torchao(case: Case) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = copy.deepcopy(case.model)
    quantize_(model, Int8WeightOnlyConfig())
    rounded(case.run(model), case.run())
