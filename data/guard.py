"""What an HDF5 file must be before a byte of its arrays is read.

HDF5 can point at other files, declare terabytes in a kilobyte and hold references into memory. A data set needs none
of it, so everything else than plain, checksummed, fully stored arrays is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polydiff.core.errors import DataError

MAX_ATTRIBUTE_BYTES = 2**24
MAX_COLUMN_BYTES = 2**30
MAX_ITEM_BYTES = 2**30
FLETCHER32 = 3  # the HDF5 library's number of that filter


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn everything the HDF5 library may raise on a missing, locked or damaged file into one DataError."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {_again(path)}") from None
    except PermissionError:
        raise DataError(f"{path}: not readable by this user; change its permissions") from None
    except BlockingIOError:
        raise DataError(f"{path}: another process is writing it; wait until it is done") from None
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise refused(path, f"not a readable data set, truncated or altered ({reason})") from error


def refused(path: Path, why: str) -> DataError:
    """The error for a file that cannot be trusted, and the way out."""
    return DataError(f"{path}: {why}; {_again(path)}")


def _again(path: Path) -> str:
    """How to come by a file: by its name where that is in the catalogue, else in the way it was made at first."""
    from polydiff.data import catalogue, command

    if path.stem in catalogue():
        return f"prepare it with: {command(path.stem)}, or give another file"
    return "prepare it again as it was made (polydiff data ... name=NAME), or give another file"


def members(group: Any, path: Path) -> dict[str, Any]:
    """The objects of a group by name, hard links only.

    Args:
        group: an open h5py object that should be a group.
        path: the file, for messages.
    Raises:
        DataError: not a group, or a soft or external link in it (which could read any file of this machine).
    """
    import h5py

    if not isinstance(group, h5py.Group):
        raise refused(path, f"{group.name} is not a group")
    found = {}
    for name in group:
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise refused(path, f"{group.name}: {name!r} is a {type(link).__name__}, only plain arrays are allowed")
        found[name] = group[name]
    return found


def array(dataset: Any, path: Path, file_bytes: int, kinds: str) -> None:
    """Check one array: a plain number or fixed-length string, checksummed, uncompressed and really stored.

    Without compression an array cannot be larger than what it occupies, nor that larger than the file: the check needs
    no arbitrary limit and holds for files of any size.

    Args:
        dataset: an open h5py object that should be a data set.
        path: the file, for messages.
        file_bytes: size of the file.
        kinds: permitted NumPy kind characters.
    Raises:
        DataError: whatever is wrong, by name.
    """
    import h5py

    if not isinstance(dataset, h5py.Dataset):
        raise refused(path, f"{dataset.name} is not an array")
    name, dtype = dataset.name, dataset.dtype
    if dtype.kind not in kinds or (dtype.kind == "f" and dtype.itemsize > 8):
        raise refused(path, f"{name} has type {dtype}, only numbers and fixed-length strings are allowed")
    if dataset.external or dataset.is_virtual:
        raise refused(path, f"{name} keeps its values in another file")
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    if dataset.chunks is None or filters != [FLETCHER32]:
        raise refused(path, f"{name} must be chunked with the fletcher32 checksum and no other filter")
    declared = math.prod(dataset.shape) * dtype.itemsize
    stored = dataset.id.get_storage_size()
    if declared > stored or stored > file_bytes or math.prod(dataset.chunks) * dtype.itemsize > file_bytes:
        raise refused(path, f"{name} declares {declared} bytes in a file of {file_bytes}")
    if dataset.ndim == 0 or 0 in dataset.shape:
        raise refused(path, f"{name} is empty")


def attributes(thing: Any, path: Path) -> dict[str, Any]:
    """Read the attributes of an open h5py object: numbers, text and lists of both.

    Raises:
        DataError: an attribute of another type, or larger than ``MAX_ATTRIBUTE_BYTES``.
    """
    values: dict[str, Any] = {}
    for name in thing.attrs:
        header = thing.attrs.get_id(name)
        if header.dtype.kind not in "biufS" or math.prod(header.shape) * header.dtype.itemsize > MAX_ATTRIBUTE_BYTES:
            raise refused(path, f"attribute {name!r} of {thing.name} has type {header.dtype} and shape {header.shape}")
        value = thing.attrs[name].tolist()
        values[name] = _text(value) if header.dtype.kind == "S" else value
    return values


def _text(value: Any) -> Any:
    return [_text(v) for v in value] if isinstance(value, list) else value.decode("utf-8")
