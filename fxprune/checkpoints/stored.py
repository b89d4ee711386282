"""Tensors in `.safetensors` files, read and written one at a time, so that no more than one of them is in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxprune.checkpoints.file import check_header, digest, read_json
from fxprune.passes.errors import PruneError
from fxprune.reports.files import one_line, replacing

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MOST_INDEX = 1 << 27  # bytes
CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODE_OF = {dtype: code for code, dtype in CODES.items()}
FIX = "a folder with model.safetensors, or with its shards and their index, or one .safetensors file"


class Form(NamedTuple):
    """Where a stored tensor is, and what it is like."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Stored:
    """The tensors of one file or of the shards of a folder.

    Attributes:
        files: the files in their order, each with the names in it.
        forms: of each tensor, by name.
        index: the data of the index of shards; None for one file.
    """

    files: dict[Path, list[str]]
    forms: dict[str, Form]
    index: dict[str, Any] | None

    @classmethod
    def at(cls, source: Path) -> Stored:
        """What is stored in a file or a folder, by the headers alone; raises PruneError where that is no set of tensors."""
        index: dict[str, Any] | None = None
        paths = [source]
        if source.is_dir() and (source / INDEX).exists():
            index = read_index(source / INDEX)
            paths = [source / name for name in dict.fromkeys(index["weight_map"].values())]
        elif source.is_dir():
            paths = [source / SINGLE]
        files: dict[Path, list[str]] = {}
        forms: dict[str, Form] = {}
        for path in paths:
            found = read_forms(path)
            files[path] = list(found)
            for name in found.keys() & forms.keys():
                raise PruneError(f"{name} is in {forms[name].file.name} and in {path.name}", where=name, fix=FIX)
            forms |= found
        said = forms if index is None else index["weight_map"]
        for name in sorted(said.keys() ^ forms.keys()):
            one, other = ("the index", "no file") if name in said else ("a file", "not the index")
            raise PruneError(f"{name} is in {one} and in {other}", where=str(source), fix=FIX)
        for name, form in forms.items():
            if index is not None and index["weight_map"][name] != form.file.name:
                raise PruneError(f"{name} is in {form.file.name}, not where the index says", where=str(source), fix=FIX)
        return cls(files, forms, index)

    def read(self, name: str) -> Tensor:
        """A tensor, mapped; the file is opened for it alone, so that its memory goes when the tensor does."""
        path = self.forms[name].file
        try:
            with safe_open(path, "pt") as file:
                found: Tensor = file.get_tensor(name)
                return found
        except (SafetensorError, OSError, RuntimeError) as error:
            raise PruneError(f"{path} cannot be read: {one_line(error)}", where=name, fix=FIX) from error


def read_index(path: Path) -> dict[str, Any]:
    def fail(why: str) -> PruneError:
        return PruneError(f"{path} is no index of shards: {why}", fix=FIX)

    data = read_json(path, MOST_INDEX, fail)
    where = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise fail("it maps no tensors to files")
    outside = next((name for name in where.values() if Path(name).name != name), None)
    if outside is not None:
        raise fail(f"{outside[:40]!r} is not the name of a file beside it")
    return dict(data)


def read_forms(path: Path) -> dict[str, Form]:
    check_header(path)
    found: dict[str, Form] = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                if part.get_dtype() not in CODES:
                    raise PruneError(f"{name} is stored as {part.get_dtype()}, which fxprune does not read", where=str(path))
                found[name] = Form(path, tuple(part.get_shape()), CODES[part.get_dtype()])
    except (SafetensorError, OSError, RuntimeError) as error:
        raise PruneError(f"{path} cannot be read: {one_line(error)}", fix=FIX) from error
    return found


class Entry(NamedTuple):
    """A tensor to write: its name, its form, and what makes it when it is its turn."""

    name: str
    shape: Sequence[int]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_one_by_one(path: Path, entries: Iterable[Entry], metadata: Callable[[Mapping[str, str]], dict[str, str]]) -> None:
    """Write a `.safetensors` file with one tensor in memory at a time; raises PruneError where it cannot be written.

    Arguments:
        path: of the file; what is there is replaced at the end.
        entries: its tensors.
        metadata: from the digests of all tensors, by name, to the texts beside them; as long for any digests.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # so that each begins at a multiple of its element

    def header(digests: Mapping[str, str]) -> bytes:
        said: dict[str, Any] = {"__metadata__": metadata(digests)}
        end = 0
        for name, shape, dtype, _ in ordered:
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            said[name] = {"dtype": CODE_OF[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(said).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    digests = dict.fromkeys((entry.name for entry in ordered), "0" * hashlib.sha256().digest_size * 2)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header(digests))
        for name, shape, dtype, make in ordered:
            tensor = make().detach().contiguous()
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise RuntimeError(f"{name} is {tuple(tensor.shape)}, {tensor.dtype}, not {tuple(shape)}, {dtype}")
            digests[name] = digest(tensor)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.seek(0)
        file.write(header(digests))
    check_header(path)
