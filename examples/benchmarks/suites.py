"""The suites of `prunability.py`: every entry builds a model and the arguments of one call.

A builder returns the model in evaluation mode with random weights and a dict or tuple of example inputs. Sizes are small
where a model allows it; nothing is downloaded. What a model returns only for training (losses, caches) is switched off by
its own options.
"""

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from models import IMAGE_SIZES, build, full_name
from torch import Tensor, nn

Built = tuple[nn.Module, Any]
# Image sizes of timm models that take any, where 96 is too small or does not fit the patches.
SIZES = {"deepseek_vit_412m": 126, "sam2_hiera_tiny": 224, "inception_v3": 128, "inception_v4": 128, "csatv2": 128}
# and of large ones that are built for one size, but for any
BUILT_FOR = {
    "beit_base_patch16_224": 96,
    "samvit_base_patch16_224": 112,
    "cait_xxs24_224": 112,
    "volo_d1_224": 112,
    "sequencer2d_s": 56,
}
# Hidden states that a model returns besides its answer: `prunability.py` also says what can go where these may.
RELEASED = {
    "transformers:bart": ["encoder_last_hidden_state"],
    "transformers:clip": ["text_model_output", "vision_model_output"],
    "transformers:blip": ["last_hidden_state", "image_embeds"],
}
YOLO = ("yolov8n", "yolov8n-seg", "yolov10n", "yolo11n", "yolo11n-seg", "yolo12n", "yolo12n-seg")


def torchvision_suite() -> list[str]:
    return [f"torchvision:{name}" for name in torchvision.models.list_models()]


def timm_suite() -> list[str]:
    """The smallest model of each of timm's families, as `timm_families.json` beside this file lists them."""
    listed = json.loads((Path(__file__).parent / "timm_families.json").read_text())
    return [f"timm:{name}" for name in listed.values()]


def transformers_suite() -> list[str]:
    from transformers_configs import CONFIGS

    return [f"transformers:{name}" for name in CONFIGS]


def diffusers_suite() -> list[str]:
    if importlib.util.find_spec("diffusers") is None:
        return left_out("diffusers")
    from diffusers_configs import CONFIGS

    return [f"diffusers:{name}" for name in CONFIGS]


def ultralytics_suite() -> list[str]:
    """Built from the package's own descriptions of the architectures."""
    if importlib.util.find_spec("ultralytics") is None:
        return left_out("ultralytics")
    return [f"ultralytics:{name}" for name in YOLO]


def left_out(package: str) -> list[str]:
    print(f"{package} is not installed: its models are left out", file=sys.stderr)
    return []


SUITES: dict[str, Callable[[], list[str]]] = {
    "torchvision": torchvision_suite,
    "timm": timm_suite,
    "transformers": transformers_suite,
    "diffusers": diffusers_suite,
    "ultralytics": ultralytics_suite,
}


def make(name: str, *, own_size: bool = False) -> Built:
    """The model of a suite's entry and its example inputs; with `own_size` timm's at the image size they are made for."""
    library, _, short = name.partition(":")
    torch.manual_seed(0)
    if library == "torchvision":
        return torchvision_model(short)
    if library == "timm":
        return timm_model(short, own_size)
    if library == "ultralytics":
        return yolo(short)
    return importlib.import_module(f"{library}_configs").CONFIGS[short]()


def timm_model(short: str, own_size: bool) -> Built:
    import timm

    if short in BUILT_FOR and not own_size:
        return timm.create_model(short, img_size=BUILT_FOR[short]).eval(), images(2, BUILT_FOR[short])
    model = timm.create_model(short).eval()
    config = model.pretrained_cfg
    size = config["input_size"][-1] if own_size or config.get("fixed_input_size") else SIZES.get(short, 96)
    return model, images(2, size)


def yolo(short: str) -> Built:
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())  # the package writes its settings on import
    tasks = importlib.import_module("ultralytics.nn.tasks")
    kind = tasks.SegmentationModel if short.endswith("-seg") else tasks.DetectionModel
    model = kind(f"{short}.yaml", verbose=False).eval()
    for module in model.modules():
        if hasattr(module, "export"):
            module.export = True  # predictions alone, without the features that losses are computed from
    return model, images(2, 96)


def torchvision_model(short: str) -> Built:
    builders = torchvision.models
    if short in builders.list_models(module=builders) or short.startswith("quantized_"):
        return build(full_name(short))
    for module, maker in MAKERS.items():
        if short in builders.list_models(module=getattr(builders, module)):
            return maker(short)
    raise SystemExit(f"no builder for torchvision:{short}")


def segmentation(short: str) -> Built:
    return torchvision.models.get_model(short, weights=None, weights_backbone=None, aux_loss=None).eval(), images(2, 96)


def detection(short: str) -> Built:
    """Every box is kept, so that there is something to compare."""
    options: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if "rcnn" in short:
        options |= {"box_score_thresh": 0.0, "box_detections_per_img": 20}
        options |= {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 30, "min_size": 128, "max_size": 160}
    elif "ssd" in short:
        options |= {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 30}
    else:
        options |= {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 30, "min_size": 128, "max_size": 160}
    model = torchvision.models.get_model(short, **options).eval()
    return model, ([torch.rand(3, 128, 144), torch.rand(3, 112, 128)],)


def video(short: str) -> Built:
    size, frames = (224, 16) if short.startswith(("mvit", "s3d")) else (48, 8)
    return torchvision.models.get_model(short, weights=None).eval(), torch.randn(1, 3, frames, size, size)


def optical_flow(short: str) -> Built:
    model = torchvision.models.get_model(short, weights=None).eval()
    return model, {"image1": images(1, 128), "image2": images(1, 128), "num_flow_updates": 2}


MAKERS: dict[str, Callable[[str], Built]] = {
    "segmentation": segmentation,
    "detection": detection,
    "video": video,
    "optical_flow": optical_flow,
}


def images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size)


__all__ = ["IMAGE_SIZES", "SUITES", "make"]
