"""The file of a checkpoint: named tensors, and a record as JSON in the metadata of a `.safetensors` file.

A file may come from anyone. Nothing in it is executed, and it is looked through before memory is spent on it: its tensors are
mapped, not read, until `ModuleState.fill` copies them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import PLAIN_TENSORS
from fxprune.reports.files import one_line, replacing, unwritable

KEY, DIGEST = "fxprune", "fxprune.sha256"  # of the record, in the metadata
FORMAT = "fxprune.checkpoint/1"
SMALL = 4 << 20  # bytes that a header may have in any file; JSON in Python takes up to 35 times its size
SHARE = 40  # of a larger file's size, this part may be the header
WHOLE = "the file that fxprune.save wrote, complete and unchanged"


def write(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and a record, with a digest of each tensor, in the place of what is at `path`; raises PruneError."""
    stored = storable(tensors)
    digests = {name: digest(tensor) for name, tensor in stored.items()}
    with replacing(path) as temporary:
        try:
            save_file(stored, temporary, metadata_of(record, digests))
        except SafetensorError as error:
            raise unwritable(path, error) from error
        check_header(temporary)


def metadata_of(record: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file with a record and these digests of its tensors."""
    text = json.dumps({"format": FORMAT, "digests": digests, **record})
    return {"format": "pt", KEY: text, DIGEST: hashlib.sha256(text.encode()).hexdigest()}


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory; raises PruneError for what cannot be stored."""
    made: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in tensors.items():
        what = None
        if tensor.is_meta:
            what = "has no values: it is on the meta device"
        elif tensor.layout is not torch.strided or type(tensor) not in PLAIN_TENSORS:
            what = f"is a {type(tensor).__name__} of layout {tensor.layout}, not a plain tensor"
        elif tensor.dtype.is_complex and tensor.dtype != torch.complex64:
            what = f"is {tensor.dtype}, which the file format does not have"
        if what is not None:
            raise PruneError(f"{name} cannot be saved: it {what}", where=name, fix="a plain tensor with values")
        plain = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        storage = plain.untyped_storage()
        alone = storage.nbytes() == plain.nbytes and storage.data_ptr() not in known
        made[name] = plain if alone else plain.clone()
        known.add(made[name].untyped_storage().data_ptr())
    return made


def digest(tensor: Tensor) -> str:
    """SHA-256 of a contiguous tensor's bytes."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def check_header(path: Path) -> int:
    """The size of a file whose header is not too large to be looked at; raises PruneError for any other file."""
    try:
        found = os.stat(path)  # a pipe would wait for ever if it were opened
        if not stat.S_ISREG(found.st_mode):
            what = "is a folder" if stat.S_ISDIR(found.st_mode) else "is no file"
            raise PruneError(f"{path} {what}", fix="the path of a file that fxprune.save wrote")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except (OSError, ValueError) as error:
        raise PruneError(f"{path} cannot be read: {one_line(error)}", fix="the path that fxprune.save was given") from error
    if length > max(SMALL, found.st_size // SHARE):
        raise PruneError(f"{path} is no checkpoint: its header would have {length:,} bytes", fix=WHOLE)
    return found.st_size


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, Any], int]]:
    """The tensors of a file, mapped and not yet read, its record and its size; raises PruneError for what is no checkpoint."""
    size = check_header(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get(KEY)
            if text is None:
                raise PruneError(f"{path} is no checkpoint: its metadata has no {KEY!r}", fix="a file that fxprune.save wrote")
            if hashlib.sha256(text.encode()).hexdigest() != metadata.get(DIGEST):
                raise PruneError(f"{path} is damaged: its record is not what was written", fix=WHOLE)
            record = parse_record(path, text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise PruneError(f"{path} is no checkpoint: {one_line(error)}", fix=WHOLE) from error
    yield tensors, record, size


def parse_record(path: Path, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PruneError(f"{path} is no checkpoint: its record is no JSON: {one_line(error)}", fix=WHOLE) from error
    form = record.get("format") if isinstance(record, dict) else None
    if form != FORMAT:
        raise PruneError(f"{path} is no checkpoint of format {FORMAT}: it says {str(form)[:60]!r}", fix=WHOLE)
    return dict(record)


def check_digests(path: Path, tensors: Mapping[str, Tensor], digests: Any) -> None:
    """Raise PruneError unless every tensor is as it was written."""
    if not isinstance(digests, dict) or digests.keys() != tensors.keys():
        raise PruneError(f"{path} is no checkpoint: its digests are of other tensors", fix=WHOLE)
    for name, tensor in tensors.items():
        if digest(tensor) != digests[name]:
            raise PruneError(f"{path} is damaged: {name} is not what was written", where=name, fix=WHOLE)


def read_json(path: Path, most: int, fail: Callable[[str], PruneError]) -> Any:
    """The content of a small JSON file."""
    try:
        if os.stat(path).st_size > most:
            raise fail(f"it has more than {most:,} bytes")
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise fail(one_line(error)) from error
