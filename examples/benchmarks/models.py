"""Real models by name, with example images and weights in which nothing is hidden.

A fresh network hides mistakes: biases are zero, every norm scale is one, a residual branch that starts at
zero adds nothing, and any two channels have the same running statistics. `randomise` undoes all of that.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
import torchvision
import torchvision.models.quantization
from torch import Tensor, nn

# Those whose position tables or pooling windows are made for one size, or whose auxiliary heads need one.
IMAGE_SIZES = {"inception_v3": 299, "quantized_inception_v3": 299}
WITH_AUXILIARY_HEADS = {"googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3"}


def torchvision_names() -> list[str]:
    """Every classification model, then the float variants of the quantizable ones."""
    plain = torchvision.models.list_models(module=torchvision.models)
    quantizable = torchvision.models.list_models(module=torchvision.models.quantization)
    return [f"torchvision:{name}" for name in [*plain, *quantizable]]


def timm_test_names() -> list[str]:
    return [f"timm:{name}" for name in timm.list_models("test_*")]


SUITES = {"torchvision": torchvision_names, "timm-test": timm_test_names}


def full_name(name: str) -> str:
    """`torchvision:resnet50` for `resnet50`, or timm's model of that name if torchvision has none."""
    library, _, short = name.rpartition(":")
    if library in ("", "torchvision") and short in torchvision.models.list_models():
        return f"torchvision:{short}"
    if library in ("", "timm") and timm.is_model(short):
        return f"timm:{short}"
    raise SystemExit(f"no model {name} in torchvision or timm")


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The model, in eval mode with random weights, and one batch of two images of the size it is made for."""
    library, _, short = full_name(name).partition(":")
    torch.manual_seed(0)
    if library == "timm":
        model = timm.create_model(short)
        size = model.pretrained_cfg["input_size"][-1]
    else:
        options: dict[str, object] = {}
        if short.startswith("quantized_"):
            options["quantize"] = False
        if short in WITH_AUXILIARY_HEADS:
            options |= {"aux_logits": True, "init_weights": True}
        model = torchvision.models.get_model(short, weights=None, **options)
        size = IMAGE_SIZES.get(short, 224)
    return model.eval(), torch.randn(2, 3, size, size)


@contextmanager
def double_throughout() -> Iterator[None]:
    """Within the block single precision means double, also for models that ask for single by name.

    So their error can be held to the tolerance of all others, instead of to a looser one that hides mistakes.
    """
    to = Tensor.to

    def widened(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        return to(self, *wide, **{k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()})

    widened.__name__ = "to"  # which is what a tracer writes down
    cast, standard = Tensor.float, torch.get_default_dtype()
    Tensor.float, Tensor.to = Tensor.double, widened
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        Tensor.float, Tensor.to = cast, to
        torch.set_default_dtype(standard)


@torch.no_grad()
def randomise(model: nn.Module, inputs: object, seed: int = 1) -> None:
    """Random weights and running statistics, such that activations neither vanish nor blow up.

    Matrices and kernels keep the random values they were born with.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        randomise_parameter(name.rpartition(".")[2], value, generator)
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.add_(_normal(value, generator), alpha=0.3)
        elif name.endswith("running_var"):
            value.mul_(_uniform(value, generator))
    match_running_statistics(model, inputs, generator)


def randomise_parameter(leaf: str, value: Tensor, generator: torch.Generator) -> None:
    """A bias is disturbed; a scale, even a tiny LayerScale, is spread around one; anything else that starts
    as a constant gets values of the size that a matrix of its shape would have.
    """
    if not value.numel():
        return
    constant = float(value.flatten()[0]) if bool((value == value.flatten()[0]).all()) else None
    is_vector = value.numel() == max(value.shape, default=1)
    if "bias" in leaf and is_vector:
        value.add_(_normal(value, generator), alpha=0.1)
    elif constant is not None and is_vector and (constant or leaf in ("weight", "gamma", "gain", "scale")):
        value.copy_(_uniform(value, generator) * (constant if abs(constant) > 0.1 else 1.0))
    elif constant is not None:
        fan_in = value.numel() // value.shape[0] if value.ndim > 1 else 1
        value.copy_(_normal(value, generator) / math.sqrt(max(fan_in, 1)))


def call(model: nn.Module, inputs: object) -> object:
    """The model on inputs as `prune` takes them: a tensor, a tuple of arguments or a dict of them."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def match_running_statistics(model: nn.Module, inputs: object, generator: torch.Generator) -> None:
    """Set each batch norm's statistics near those of its input, as it is reached in one forward.

    Statistics that know nothing of the input would let the signal of fifty residual blocks double at each,
    and drown every bias; so would ones measured first and all disturbed later.
    """

    def match(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        others = [dim for dim in range(inputs[0].ndim) if dim != 1]
        var, mean = torch.var_mean(inputs[0], dim=others, correction=0)
        var = var.clamp(min=0.1 * float(var.mean()) + 1e-6)  # a dead channel must not become a loud one
        norm.running_mean.copy_(mean + 0.3 * var.sqrt() * _normal(mean, generator))
        norm.running_var.copy_(var * _uniform(var, generator))

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(match) for norm in norms if norm.running_var is not None]
    try:
        call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(like.shape, generator=generator) + 0.5).to(like)
