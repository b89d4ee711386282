"""What `basis="principal"` can rotate, by model, and how far the rotated model is from the original.

    basis.py                 all models
    basis.py --only 'timm:*' those whose name matches

Each family that can be rotated is turned by a random rotation; outputs of the rotated model are compared with the original's.
Weights, gains and running statistics are random. The table goes to `BASIS.md`.
"""

import argparse
import fnmatch
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import build, randomise
from sweep import markdown_table
from torch import nn
from transformers_configs import CONFIGS

from fxprune.basis.principal import find_rotatable, rotated_basis
from fxprune.basis.pruning import distance, random_rotation
from fxprune.inputs import ExampleInputs
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.pipeline import Compilation

TABLE = Path(__file__).parent / "BASIS.md"
IMAGES = """timm:test_vit timm:test_vit2 timm:test_vit3 timm:test_vit4 timm:test_vit_relpos timm:test_convnext
timm:test_efficientnet timm:test_resnet timm:test_mambaout timm:test_maxvit timm:test_coatnet timm:test_byobnet
timm:mobilenetv2_050 torchvision:mobilenet_v2 torchvision:mnasnet0_5""".split()
MOST = 3  # reasons that are named


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of models")
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args(argv)
    makers: dict[str, Callable[[], tuple[nn.Module, Any]]] = {name: functools.partial(build, name) for name in IMAGES}
    makers |= {f"transformers:{name}": make for name, make in CONFIGS.items()}
    rows = []
    for name, make in makers.items():
        if fnmatch.fnmatchcase(name, arguments.only):
            try:
                row = measure(*make())
            except Exception as error:
                row = [f"{type(error).__name__}: {str(error)[:80]}", "", "", ""]
            print(name, *row, sep=" | ", flush=True)
            rows.append([name, *row])
    head = ["model", "rotated families (channels)", "of parameters", "error", "why others are not"]
    columns = [(text, "l", lambda row, i=i: row[i]) for i, text in enumerate(head)]
    title = "# Families that can be rotated\n\n`basis.py` writes this table.\n\n"
    arguments.table.write_text(title + markdown_table(columns, rows))


def measure(model: nn.Module, inputs: Any) -> list[str]:
    """The cells of a model's row."""
    randomise(model, inputs)
    given = ExampleInputs.parse(inputs, model).check(model)
    found, reasons = find_rotatable(model, Compilation(model, given, CouplingOptions()).couple())
    rotated = rotated_basis(found, [random_rotation(f.linear.size, f.linear.rows) for f in found]).apply(model)
    error = distance(model, rotated, given)
    touched = {member.name for f in found for member in f.linear.members}
    sizes = {n: p.numel() for n, p in rotated.named_parameters()}
    share = sum(sizes.get(n, 0) for n in touched) / sum(sizes.values())
    why = Counter(kind_of(reason) for reason in reasons.values())
    names = ", ".join(f"{f.name} ({f.linear.rows * f.linear.size})" for f in found) or "none"
    return [names, f"{share:.0%}", f"{error:.0e}" if found else "", "; ".join(f"{n} {w}" for w, n in why.most_common(MOST))]


def kind_of(reason: str) -> str:
    """A reason without the place."""
    return reason.partition(" in ")[0].partition(" at %")[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
