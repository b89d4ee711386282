"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxprune.passes.errors import PruneError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, all at once and for good, when the block ends without an error.

    Where `path` is a link, what it leads to is written. Raises: PruneError where nothing can be written there, and for devices
    and pipes, which nothing can take the place of; what was there before is left.
    """
    if is_special(path):
        raise PruneError(f"{path} cannot be written: it is a device or a pipe", fix="the name of a file")
    path = Path(os.path.realpath(path))
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise unwritable(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~current_umask())
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """Whether there is something that is neither a file nor a folder."""
    return path.exists() and not path.is_file() and not path.is_dir()


def as_path(path: Any) -> Path:
    """A path of the text or the path that was given; raises PruneError for what is none."""
    try:
        made = Path(path)
        os.fsencode(made)
        if "\0" in str(made):
            raise ValueError("it holds a null character")
    except (TypeError, ValueError) as error:
        raise PruneError(f"{str(path)[:60]!r} is no path: {one_line(error)}", fix="the name of a file or a folder") from None
    return made


def unwritable(path: Path, error: Exception) -> PruneError:
    return PruneError(
        f"{path} cannot be written: {one_line(error)}", fix="a path in a folder that exists and can be written to"
    )


def one_line(error: Exception) -> str:
    said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return str(said)[:200]


def current_umask() -> int:
    """The permissions that new files do not get; asking for it is setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def flush(path: Path) -> None:
    """Have a file or a folder on the disk, where the system knows how."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened everywhere
        return
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(handle)
