"""The files a person gives as ``source=``: found at the top of the folder or in a folder of it, read within bounds."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable
from pathlib import Path

from polydiff.core.errors import DataError


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
    if not source.is_dir():
        what = "is not a folder" if source.exists() else "does not exist"
        raise DataError(f"{name}: source={source} {what}; give the folder that holds {wanted[0]}")
    try:
        if any((source / file).is_file() for file in wanted):
            return source
        found = [inner for inner in sorted(source.iterdir()) if any((inner / file).is_file() for file in wanted)]
    except OSError as error:
        raise DataError(f"{name}: source={source} cannot be read: {error.strerror or error}") from error
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


def reason(error: BaseException) -> str:
    """The first line of what an exception says, without the path an OSError repeats."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
