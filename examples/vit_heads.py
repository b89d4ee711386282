"""Two ways to make the attention of a vision transformer smaller: fewer heads, or narrower ones.

Whole heads (`attention="heads"`, the default) leave the width of a head as it is, and with it the softmax
scale and the sizes that fused kernels like. Dimensions within heads (`attention="dims"`) keep every head, but
narrower.
"""

import torch
from torchvision.models import VisionTransformer

import fxprune


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> dict[str, float]:
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=64, patch_size=16, num_layers=3, num_heads=6, hidden_dim=192, mlp_dim=768, num_classes=10
    ).eval()
    torch.nn.init.normal_(model.heads.head.weight, std=0.1)  # born zero, as would every output be
    images = torch.randn(2, 3, 64, 64)
    before = count_parameters(model)
    print(f"original   {before:>9,} parameters, 6 heads of 32 in each of 3 layers")

    left: dict[str, float] = {}
    for attention in ("heads", "dims"):
        pruned = fxprune.prune(model, 0.5, example_inputs=images, attention=attention, verify=True)
        after = count_parameters(pruned)
        left[attention] = after / before
        print(f"{attention:<10} {after:>9,} parameters, {left[attention]:.0%} left")
        for name, parameter in pruned.named_parameters():
            if "layers.encoder_layer_0.self_attention" in name and name.endswith("weight"):
                print(f"             {name}: {tuple(parameter.shape)}")
        print(f"             {pruned.verification}")
    return left


if __name__ == "__main__":
    main()
