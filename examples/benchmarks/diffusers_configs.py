"""Small configurations of diffusers models, each with the arguments of one call. Nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]
BATCH, SIZE = 2, 16
WIDTHS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": SIZE}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def unet2d() -> Built:
    model = diffusers.UNet2DModel(
        **WIDTHS,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model.eval(), {"sample": normal(BATCH, 3, SIZE, SIZE), "timestep": torch.tensor([10, 3])}


def unet2d_condition() -> Built:
    model = diffusers.UNet2DConditionModel(
        **WIDTHS,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    inputs = {"sample": normal(BATCH, 4, SIZE, SIZE), "timestep": torch.tensor([10, 3])}
    return model.eval(), inputs | {"encoder_hidden_states": normal(BATCH, 5, 12)}


def dit() -> Built:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=SIZE,
        norm_num_groups=8,
        num_embeds_ada_norm=20,
    )
    steps = {"timestep": torch.tensor([10, 3]), "class_labels": torch.tensor([1, 7])}
    return model.eval(), {"hidden_states": normal(BATCH, 4, SIZE, SIZE), **steps}


def autoencoder_kl() -> Built:
    model = diffusers.AutoencoderKL(
        **WIDTHS,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    return model.eval(), {"sample": normal(BATCH, 3, SIZE, SIZE)}


CONFIGS: dict[str, Callable[[], Built]] = {
    "unet2d": unet2d,
    "unet2d-condition": unet2d_condition,
    "dit": dit,
    "autoencoder-kl": autoencoder_kl,
}


def dit_by_default() -> Built:
    steps = {"timestep": torch.tensor([10]), "class_labels": torch.tensor([7])}
    return diffusers.DiTTransformer2DModel().eval(), {"hidden_states": normal(1, 4, 32, 32), **steps}


BY_DEFAULT: dict[str, Callable[[], Built]] = {"dit": dit_by_default}  # by the defaults of its configuration
