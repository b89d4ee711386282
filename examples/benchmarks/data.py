"""Fashion-MNIST as Debian packages it (`apt-get install dataset-fashion-mnist`), read with the standard library."""

import gzip
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
MEAN, DEVIATION = 0.286, 0.353  # of all training pixels


def fashion(split: str, count: int, *, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """The first `count` images, normalised, of shape (count, 1, 28, 28), and their classes; `split` is train or t10k."""
    if not folder.exists():
        raise FileNotFoundError(f"there is no {folder}: apt-get install dataset-fashion-mnist")
    images = idx(folder / f"{split}-images-idx3-ubyte.gz")[:count]
    labels = idx(folder / f"{split}-labels-idx1-ubyte.gz")[:count]
    return ((images.float() / 255 - MEAN) / DEVIATION).unsqueeze(1), labels.long()


def idx(path: Path) -> Tensor:
    """The array in a gzipped idx file of unsigned bytes."""
    with gzip.open(path) as file:
        content = file.read()
    zero, kind, dims = struct.unpack(">HBB", content[:4])
    if zero or kind != 8:
        raise ValueError(f"{path} is no idx file of unsigned bytes")
    shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
    body = bytearray(content[4 + 4 * dims :])
    if len(body) != math.prod(shape):
        raise ValueError(f"{path} holds {len(body)} bytes, not {math.prod(shape)}")
    return torch.frombuffer(body, dtype=torch.uint8).reshape(shape)
