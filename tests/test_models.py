"""One real model of every architecture family, pruned by half without hints, against its masked original.

The sweep over all of them is `examples/benchmarks/exactness.py`. Here the images are small and the
transformers shallow, so that a run takes minutes.
"""

import gc
import importlib.util
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import torchvision.models.quantization as quantizable
from torch import nn
from torchvision.models import MaxVit, SwinTransformer, VisionTransformer, swin_transformer

import fxprune

MODELS_FILE = Path(__file__).parents[1] / "examples" / "benchmarks" / "models.py"
TOLERANCE = 1e-9  # relative, in double precision

# Models that keep more than half of their parameters at ratio 0.5, and why that is as it should be.
KEEPS_MORE: dict[str, tuple[float, str]] = {}


def named(name, size=64, **options):
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=20, **options), size


def quantized(name, size=64, **options):
    build = getattr(quantizable, name)
    return lambda: build(weights=None, quantize=False, num_classes=20, **options), size


def swin(**options):
    return lambda: SwinTransformer(
        patch_size=[4, 4],
        embed_dim=48,
        depths=[2, 2, 1],
        num_heads=[3, 6, 12],
        window_size=[4, 4],
        stochastic_depth_prob=0.1,
        num_classes=20,
        **options,
    ), 64


def vgg():
    """A vgg11_bn whose two wide layers, nine tenths of its parameters, are narrow."""
    model = torchvision.models.vgg11_bn(weights=None, num_classes=20)
    flat = model.classifier[0].in_features
    model.classifier[0], model.classifier[3] = nn.Linear(flat, 128), nn.Linear(128, 128)
    model.classifier[6] = nn.Linear(128, 20)
    return model


def vit():
    return VisionTransformer(
        image_size=64,
        patch_size=16,
        num_layers=2,
        num_heads=6,
        hidden_dim=192,
        mlp_dim=384,
        num_classes=20,
    )


def maxvit():
    return MaxVit(
        input_size=(64, 64),
        stem_channels=32,
        partition_size=2,
        block_channels=[32, 64],
        block_layers=[1, 2],
        head_dim=16,
        stochastic_depth_prob=0.1,
        num_classes=20,
    )


AUXILIARY = {"aux_logits": True, "init_weights": False}

# name -> (build, image size); the size is the smallest at which every pooling still sees more than one pixel.
TORCHVISION = {
    "alexnet": named("alexnet", 96),
    "vgg": (vgg, 32),
    "resnet18": named("resnet18"),
    "resnet50": named("resnet50"),
    "resnext50_32x4d": named("resnext50_32x4d"),
    "densenet121": named("densenet121"),
    "squeezenet1_0": named("squeezenet1_0"),
    "squeezenet1_1": named("squeezenet1_1"),
    "googlenet": named("googlenet", 96, **AUXILIARY),
    "inception_v3": named("inception_v3", 299, **AUXILIARY),
    "mobilenet_v2": named("mobilenet_v2"),
    "mobilenet_v3_small": named("mobilenet_v3_small"),
    "mnasnet0_5": named("mnasnet0_5"),
    "shufflenet_v2_x0_5": named("shufflenet_v2_x0_5"),
    "efficientnet_b0": named("efficientnet_b0"),
    "efficientnet_v2_s": named("efficientnet_v2_s"),
    "regnet_x_400mf": named("regnet_x_400mf"),
    "regnet_y_400mf": named("regnet_y_400mf"),
    "convnext_tiny": named("convnext_tiny"),
    "vit": (vit, 64),
    "swin": swin(),
    "swin_v2": swin(block=swin_transformer.SwinTransformerBlockV2, downsample_layer=swin_transformer.PatchMergingV2),
    "maxvit": (maxvit, 64),
    "quantizable_resnet18": quantized("resnet18"),
    "quantizable_mobilenet_v2": quantized("mobilenet_v2"),
    "quantizable_mobilenet_v3_large": quantized("mobilenet_v3_large"),
    "quantizable_shufflenet_v2_x0_5": quantized("shufflenet_v2_x0_5"),
    "quantizable_googlenet": quantized("googlenet", 96, **AUXILIARY),
    "quantizable_inception_v3": quantized("inception_v3", 299, **AUXILIARY),
}


@pytest.fixture(scope="module")
def benchmark():
    """How the sweep makes weights random and keeps models in double, so that both mean the same by exact."""
    spec = importlib.util.spec_from_file_location("benchmark_models", MODELS_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _release_memory():
    yield
    gc.collect()  # graph modules hold themselves in cycles, and the next model is as large


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def prune_and_check(name, model, size, benchmark):
    model = model.double().eval()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    benchmark.randomise(model, images)

    with benchmark.double_throughout():
        pruned = fxprune.prune(model, 0.5, example_inputs=images, verify=False)
        found = fxprune.verify(model, pruned, images)

    assert found.ok, found
    assert found.error < TOLERANCE, found
    share = count_parameters(pruned) / count_parameters(model)
    at_most, reason = KEEPS_MORE.get(name, (0.5, ""))
    print(f"{name}: {share:.0%} of the parameters left, error {found.error:.1e}", reason and f"({reason})")
    assert share <= at_most, f"{share:.0%} of the parameters left, at most {at_most:.0%} expected\n{found}"


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, benchmark):
    build, size = TORCHVISION[name]
    torch.manual_seed(0)
    prune_and_check(name, build(), size, benchmark)


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_timm(name, benchmark):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=20)
    prune_and_check(name, model, model.pretrained_cfg["input_size"][-1], benchmark)


def test_every_exception_names_a_model():
    assert set(KEEPS_MORE) <= {*TORCHVISION, *timm.list_models("test_*")}
