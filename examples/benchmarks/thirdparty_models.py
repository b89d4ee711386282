"""The models of `thirdparty.py`, package by package: small ones, without pretrained weights. Nothing is downloaded.

A model is named `package:path.Constructor`, with `#what` after it where a constructor stands there more than once.
"""

from typing import Any

import torch
from thirdparty_audio import ASTEROID, DEMUCS, ENCODEC, SPEECHBRAIN, TORCHAUDIO
from thirdparty_build import Package
from thirdparty_fields import BRAINDECODE, MONAI, NEURALFORECAST, SPANDREL, TORCH_GEOMETRIC, TSAI
from thirdparty_text import OPEN_CLIP, SMALL, TABULAR, X_TRANSFORMERS
from thirdparty_vision import KORNIA, PYTORCHCV, PYTORCHVIDEO, SMP, VIT_PYTORCH
from torch import nn

PACKAGES: dict[str, Package] = {
    "pytorchcv": PYTORCHCV,
    "segmentation-models-pytorch": SMP,
    "vit-pytorch": VIT_PYTORCH,
    "x-transformers": X_TRANSFORMERS,
    "open_clip_torch": OPEN_CLIP,
    "monai": MONAI,
    "torchaudio": TORCHAUDIO,
    "speechbrain": SPEECHBRAIN,
    "asteroid": ASTEROID,
    "encodec": ENCODEC,
    "demucs": DEMUCS,
    "spandrel": SPANDREL,
    "torch_geometric": TORCH_GEOMETRIC,
    "tsai": TSAI,
    "neuralforecast": NEURALFORECAST,
    "braindecode": BRAINDECODE,
    "pytorchvideo": PYTORCHVIDEO,
    "tab-transformer-pytorch": TABULAR,
    "kornia": KORNIA,
    **SMALL,
}


def names() -> list[str]:
    return [f"{package}:{path}" for package, its in PACKAGES.items() for path in its.cases]


def make(name: str) -> tuple[nn.Module, Any]:
    """A model in evaluation mode and the arguments of one call."""
    package, _, path = name.partition(":")
    its = PACKAGES[package]
    torch.manual_seed(0)
    model = its.build(path, its.cases[path].options).eval()
    torch.manual_seed(0)
    return model, (its.cases[path].inputs or its.inputs)()
