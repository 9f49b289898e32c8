"""The files a person gives as ``source=``: found at the top of the folder or in a folder of it, read within bounds."""

from __future__ import annotations

import gzip
import stat
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from polydiff.core.errors import DataError


def check_folder(name: str, source: Path, wanted: str) -> None:
    """Raise a DataError that says what to give, if ``source`` is no folder."""
    try:
        if stat.S_ISDIR(source.stat().st_mode):
            return
        why = "is not a folder"
    except (OSError, ValueError) as error:
        why = f"cannot be read ({reason(error)})"
    raise DataError(f"{name}: source={source} {why}; give {wanted}")


def find(name: str, source: Path, wanted: Iterable[str]) -> Path:
    """The folder that holds any of the wanted files: ``source`` or, if it has none, the only such folder inside it.

    Args:
        name: the data set, for messages.
        source: what the user gave.
        wanted: file names.
    Raises:
        DataError: ``source`` is missing or no folder, or none or several of its folders have the files.
    """
    wanted = list(wanted)
    check_folder(name, source, f"the folder that holds {wanted[0]}")
    try:
        if any((source / file).is_file() for file in wanted):
            return source
        found = [inner for inner in sorted(source.iterdir()) if any((inner / file).is_file() for file in wanted)]
    except OSError as error:
        raise DataError(f"{name}: source={source} cannot be read: {reason(error)}") from error
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{name}: {', '.join(map(str, found))} all hold such files; give one of them as source=")
    raise DataError(
        f"{name}: source={source} has no {wanted[0]}, nor has a folder in it; give the folder that holds it"
    )


def read(path: Path, limit: int) -> bytes:
    """At most ``limit`` bytes of a file, unpacked if its name ends in ``.gz``; the checksum is verified at its end.

    Args:
        path: the file.
        limit: what a small file may unpack to; a longer content is cut there, so ask for one byte more than is right.
    Raises:
        DataError: missing, unreadable, or not a whole gzip file.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(limit)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({reason(error)}); get it again") from error


def members(path: Path, limits: Mapping[str, int]) -> dict[str, bytes]:
    """The wanted files of a ``.tar.gz`` archive by name, in whatever folder of it; nothing is written to the disk.

    Args:
        path: the archive.
        limits: largest size by file name. The whole archive may unpack to twice their sum, other members included.
    Raises:
        DataError: damaged, larger than that, a wanted member larger than its limit or there twice.
    """
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path, "rb") as packed:
            stream: Any = _Bounded(packed, 2 * sum(limits.values()) + 2**20)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    file = PurePosixPath(member.name).name
                    if file not in limits or not member.isreg():
                        continue
                    if file in found or member.size > limits[file]:
                        why = "is there twice" if file in found else f"has {member.size} bytes"
                        raise DataError(f"{path}: {member.name} {why}, expected one of at most {limits[file]} bytes")
                    content = archive.extractfile(member)
                    found[file] = content.read() if content else b""
            while stream.read(2**20):  # the checksum stands at the end
                pass
    except DataError:
        raise
    except Exception as error:  # tarfile raises a dozen kinds on damaged headers
        raise DataError(f"{path}: not a readable tar.gz archive ({reason(error)}); get it again") from error
    return found


class _Bounded:
    """A stream that ends in an error where it grows beyond its limit."""

    def __init__(self, file: gzip.GzipFile, limit: int):
        self.file, self.limit, self.left = file, limit, limit

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.left -= len(block)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {self.limit} bytes")
        return block


def reason(error: BaseException) -> str:
    """The first line of what an exception says, without the path an OSError repeats."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
