"""Workflows: images, as users of torchvision, timm and ultralytics work with them."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from workflow_cases import CLASS, Case, check, count_parameters, images, outputs, same, train, workflow

VISION, TIMM, DETECT, YOLO = "modules", "timm", "detection and segmentation", "ultralytics"


@workflow(VISION, "containers: index, iterate, len, call", "ResNet-18", "ViT")
def containers(case: Case) -> None:
    model, x = case.model, case.inputs
    if hasattr(model, "layer1"):
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            layer = getattr(model, name)
            check(len(layer) == 2 and type(layer[0]).__name__ == "BasicBlock", f"{name} has {len(layer)} blocks")
            whole = layer(x)
            for block in layer:
                x = block(x)
            same([x], [whole], 1e-6)
        found = model.fc(torch.flatten(model.avgpool(x), 1))
    else:
        x = model.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([model.class_token.expand(len(x), -1, -1), x], 1) + model.encoder.pos_embedding
        for block in model.encoder.layers:
            x = block(x)
        found = model.heads(model.encoder.ln(x)[:, 0])
    same([found], case.run(), 1e-5)


@workflow(VISION, "a slice of a Sequential", "MobileNetV2")
def sliced(case: Case) -> None:
    features = case.model.features
    first, rest = features[:5], features[5:]
    same([rest(first(case.inputs))], [features(case.inputs)], 1e-6)


@workflow(VISION, "forward hooks on containers and blocks", "ResNet-18", "BERT")
def hooks(case: Case) -> None:
    """Each fires once, and sees what comes out."""
    kept = {"Sequential", "BasicBlock", "BertLayer", "BertAttention", "ConvNeXtStage", "ConvNeXtBlock", "Linear"}
    seen: dict[str, Any] = {}
    for name, module in case.model.named_modules():
        if name and type(module).__name__ in kept and name not in seen:
            module.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, []).append(out))
            seen[name] = []
    check(len(seen) > 3, "there are no blocks")
    case.run()
    silent = sorted(name for name, calls in seen.items() if not calls)
    unused = {"downsample", "shortcut", "conv_dw"}
    silent = [name for name in silent if not unused & set(name.split("."))]
    check(not silent, f"hooks do not fire: {', '.join(silent[:4])}")


@workflow(VISION, "a hook that replaces the output of a block", "ResNet-18")
def replacing(case: Case) -> None:
    wanted = case.run()[0]
    handle = case.model.layer3[1].register_forward_hook(lambda module, args, out: out * 2)
    changed = case.run()[0]
    handle.remove()
    check(not torch.equal(changed, wanted), "the hook changes nothing")
    same(case.run(), [wanted])


@workflow(VISION, "Grad-CAM by hooks on the last stage", "ResNet-18")
def grad_cam(case: Case) -> None:
    held: list[Tensor] = []
    handle = case.model.layer4.register_forward_hook(lambda module, args, out: (out.retain_grad(), held.append(out))[1])
    case.model(case.inputs)[:, 3].sum().backward()
    handle.remove()
    check(held and held[0].grad is not None, "the hook does not fire")
    cam = (held[0].grad.mean((2, 3), keepdim=True) * held[0]).sum(1).relu()
    check(cam.shape == (2, 2, 2), f"the map is {tuple(cam.shape)}")


@workflow(VISION, "IntermediateLayerGetter", "ResNet-18")
def getter(case: Case) -> None:
    from torchvision.models._utils import IntermediateLayerGetter

    found = IntermediateLayerGetter(case.model, {"layer2": "a", "layer4": "b"})(case.inputs)
    x = found["b"]
    same([case.model.fc(case.model.avgpool(x).flatten(1))], case.run(), 1e-6)


@workflow(VISION, "create_feature_extractor", "ResNet-18", "ViT")
def extractor(case: Case) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    nodes = get_graph_node_names(case.model)[1]
    if hasattr(case.model, "layer1"):
        asked = {"layer2": "a", "layer4": "b"}
    else:
        asked = {next(n for n in nodes if n.endswith("ln")): "a", next(n for n in nodes if n.startswith("heads")): "b"}
    found = create_feature_extractor(case.model, asked)(case.inputs)
    check(set(found) == {"a", "b"}, "features are missing")
    if hasattr(case.model, "layer1"):
        same([case.model.fc(case.model.avgpool(found["b"]).flatten(1))], case.run(), 1e-6)


@workflow(VISION, "another head", "ResNet-18", "ViT")
def another_head(case: Case) -> None:
    model = case.model
    owner, name = (model, "fc") if hasattr(model, "fc") else (getattr(model, "classifier", None) or model.heads, -1)
    old = getattr(owner, name) if isinstance(name, str) else owner[name]
    new = nn.Linear(old.in_features, 7)
    if isinstance(name, str):
        setattr(owner, name, new)
    else:
        owner[name] = new
    check(case.run()[0].shape == (2, 7), f"the output has the shape {tuple(case.run()[0].shape)}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    new.requires_grad_(True)
    train(model, case.inputs)


@workflow(VISION, "a block replaced by a module of one's own", "ResNet-18")
def replaced(case: Case) -> None:
    class Doubled(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) * 2

    wanted = case.run()[0]
    case.model.layer4[1] = Doubled(case.model.layer4[1])
    head = case.model.fc
    same([case.run()[0] - head.bias], [2 * (wanted - head.bias)], 1e-4)


@workflow(VISION, "other batch and image sizes", "MobileNetV2", "timm ConvNeXt")
def sizes(case: Case) -> None:
    """Each image has its own output, whatever the batch."""
    for batch, size in ((1, 64), (5, 96), (3, 80)):
        x = images(batch, size)
        same([case.model(x)[:1]], [case.model(x[:1])], 1e-4)


@workflow(VISION, "batch norms folded into convolutions", "ResNet-18")
def folded(case: Case) -> None:
    wanted = case.run()
    for parent in list(case.model.modules()):
        before: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
                setattr(parent, before[0], fuse_conv_bn_eval(before[1], child))
                setattr(parent, name, nn.Identity())
            before = (name, child)
    check(not any(isinstance(m, nn.BatchNorm2d) for m in case.model.modules()), "a batch norm is left")
    same(case.run(), wanted, 1e-4)


@workflow(VISION, "channels_last", "ResNet-18")
def channels_last(case: Case) -> None:
    wanted = case.run()
    case.model.to(memory_format=torch.channels_last)
    x = case.inputs.contiguous(memory_format=torch.channels_last)
    same(case.run(inputs=x), wanted, 1e-4)


# -- timm -------------------------------------------------------------------------------------------------------------------


@workflow(TIMM, "forward_features and forward_head", "timm ViT", "timm ConvNeXt", graph=False)
def forward_features(case: Case) -> None:
    features = case.model.forward_features(case.inputs)
    same([case.model.forward_head(features)], case.run(), 1e-6)
    width = case.model.forward_head(features, pre_logits=True).shape[-1]
    check(case.model.num_features == width, f"num_features is {case.model.num_features}, and there are {width}")


@workflow(TIMM, "reset_classifier", "timm ViT", "timm ConvNeXt", graph=False)
def reset_classifier(case: Case) -> None:
    case.model.reset_classifier(7)
    check(case.run()[0].shape == (2, 7), "the head has another width")
    train(case.model, case.inputs)
    case.model.reset_classifier(0)
    check(case.run()[0].shape == (2, case.model.num_features), "the features have another width")


@workflow(TIMM, "features_only", "timm ResNet, features", graph=False)
def features_only(case: Case) -> None:
    found = [tuple(t.shape[1:2]) for t in case.run()]
    check([(c,) for c in case.model.feature_info.channels()] == found, f"feature_info says other channels than {found}")


@workflow(TIMM, "forward_intermediates", "timm ViT", graph=False)
def intermediates(case: Case) -> None:
    final, found = case.model.forward_intermediates(case.inputs)
    check(len(found) > 2, "there are none")
    same([case.model.forward_head(final)], case.run(), 1e-5)


@workflow(TIMM, "set_grad_checkpointing", "timm ViT", graph=False)
def grad_checkpointing(case: Case) -> None:
    case.model.set_grad_checkpointing()
    train(case.model, case.inputs)


# -- detection and segmentation ---------------------------------------------------------------------------------------------


@workflow(DETECT, "detect in images of other sizes", "Faster R-CNN", "SSDlite")
def detect(case: Case) -> None:
    """Of the two the second is the wider one, as among the example inputs: another path is not the GraphModule's."""
    one, two = photographs((120, 136), (96, 112))
    same([detected(case, [one, two.flip(-1)])[0]["scores"]], [detected(case, [one, two])[0]["scores"]], 1e-3)


@workflow(DETECT, "detect in another number of images", "Faster R-CNN", "SSDlite", graph=False)
def detect_more(case: Case) -> None:
    given = photographs((128, 144), (96, 160), (112, 112))
    found = detected(case, given)
    same([detected(case, given[:1])[0]["scores"]], [found[0]["scores"]], 1e-3)


def photographs(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def detected(case: Case, given: list[Tensor]) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        found = case.model(given)
    check(len(found) == len(given) and all(set(f) == {"boxes", "labels", "scores"} for f in found), "results are missing")
    check(sum(len(f["boxes"]) for f in found) > 0, "there are no boxes")
    return found


@workflow(DETECT, "train with targets", "Faster R-CNN", graph=False)
def train_detector(case: Case) -> None:
    boxes = torch.tensor([[10.0, 10.0, 60.0, 70.0], [30.0, 40.0, 100.0, 100.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([3, 7])} for _ in case.inputs[0]]
    model = case.model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(2):
        loss = sum(model(list(case.inputs[0]), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    check(bool(torch.isfinite(loss)), "the loss is not finite")
    case.run(model.eval())


@workflow(DETECT, "segment and train", "LR-ASPP")
def segment(case: Case) -> None:
    x = images(3, 96)
    check(case.model(x)["out"].shape[-2:] == x.shape[-2:], "the mask has another size")
    train(case.model, x)


@workflow(DETECT, "the backbone by itself", "Faster R-CNN")
def backbone(case: Case) -> None:
    found = case.model.backbone(images(1, 128))
    check(isinstance(found, dict) and len(found) > 1, "features are missing")


# -- ultralytics ------------------------------------------------------------------------------------------------------------


def as_yolo(case: Case) -> Any:
    from ultralytics import YOLO as Yolo

    made = Yolo("yolo11n.yaml", task="detect")
    case.model.args, case.model.task = made.model.args, made.task  # which YOLO sets on what it builds
    made.model = case.model
    return made


def data_set(folder: Path) -> str:
    """Four images of noise, with a box in each."""
    from PIL import Image

    for kind in ("images", "labels"):
        (folder / "data" / kind / "train").mkdir(parents=True)
    for at in range(4):
        pixels = (images(1, 64)[0].permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / "data" / "images" / "train" / f"{at}.png")
        (folder / "data" / "labels" / "train" / f"{at}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    path = folder / "data.yaml"
    names = "\n".join(f"  {at}: thing{at}" for at in range(80))
    path.write_text(f"path: {folder / 'data'}\ntrain: images/train\nval: images/train\nnames:\n{names}\n")
    return str(path)


@workflow(YOLO, "predict", "YOLO11n", graph=False, needs=["ultralytics"])
def predict(case: Case) -> None:
    model, count = as_yolo(case), count_parameters(case.model)
    pixels = (images(1, 64)[0].permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy()
    found = model.predict(pixels, imgsz=64, conf=1e-6, verbose=False, save=False, project=str(case.folder))
    check(len(found) == 1 and len(found[0].boxes) > 0, "there are no boxes")
    check(count_parameters(model.model) == count, "the model has another size now")


@workflow(YOLO, "val", "YOLO11n", graph=False, needs=["ultralytics"])
def val(case: Case) -> None:
    options = {"imgsz": 64, "batch": 2, "workers": 0, "device": "cpu", "plots": False, "verbose": False}
    found = as_yolo(case).val(data=data_set(case.folder), project=str(case.folder), **options)
    check(0 <= found.box.map <= 1, "there is no mAP")


@workflow(YOLO, "export to ONNX", "YOLO11n", graph=False, needs=["ultralytics", "onnxruntime"])
def export(case: Case) -> None:
    import onnxruntime

    model = as_yolo(case)
    model.model.pt_path = str(case.folder / "yolo.pt")
    wanted = outputs(copy.deepcopy(case.model), case.inputs[:1])
    path = model.export(format="onnx", imgsz=64, simplify=False, project=str(case.folder), verbose=False)
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, {session.get_inputs()[0].name: case.inputs[:1].numpy()})
    same([torch.from_numpy(found[0])], wanted[:1], 1e-3)


@workflow(YOLO, "train keeps the architecture, save and load", "YOLO11n", graph=False, needs=["ultralytics"])
def train_yolo(case: Case) -> None:
    from fxprune.integrations.ultralytics import trainer

    trained(case, trainer(as_yolo(case)) if case.form == CLASS else None)


@workflow(YOLO, "the same by a trainer of one's own", "YOLO11n", graph=False, needs=["ultralytics"])
def train_as_it_is(case: Case) -> None:
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Trainer(DetectionTrainer):
        def get_model(self, *args: Any, **options: Any) -> nn.Module:
            return case.model

    trained(case, Trainer)


def trained(case: Case, trainer: Any) -> None:
    from ultralytics import YOLO as Yolo

    model, count = as_yolo(case), count_parameters(case.model)
    options = {"imgsz": 64, "batch": 2, "workers": 0, "device": "cpu", "plots": False, "verbose": False, "val": False}
    options |= {"project": str(case.folder), "name": "run", "exist_ok": True, "trainer": trainer}
    model.train(data=data_set(case.folder), epochs=1, **options)
    check(count_parameters(model.model) == count, f"{count_parameters(model.model):,} parameters instead of {count:,}")
    again = Yolo(str(case.folder / "run" / "weights" / "last.pt"))
    check(count_parameters(again.model) == count, "what is saved has another size")
