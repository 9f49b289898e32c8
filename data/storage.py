"""Putting a table into an HDF5 file, chunk by chunk, on a disk that may be full."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from polydiff.data.table import Table, blocks

# A chunk is one sample; samples below 4 KiB share a chunk of that size. Measured on 8-byte points: a random read takes
# 0.005 instead of 0.009 ms, the file is a third as large and read whole in 0.4 instead of 95 ms.
CHUNK_BYTES = 4096


class _Disk(io.FileIO):
    """A file that keeps the disk's first error for itself: the HDF5 library crashes the process when it meets one."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        view, done = memoryview(data).cast("B"), 0
        try:
            while self.error is None and done < len(view):
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size) if self.error is None else size or 0
        except OSError as error:
            self.error = error
            return size or 0


def fill(path: Path, table: Table) -> None:
    """Write a table to a new file and sync it to the disk.

    Args:
        path: must not exist.
        table: checked content.
    Raises:
        OSError: the file exists, or the disk is full or read-only; what is there then is to be thrown away.
    """
    import h5py

    with _Disk(path, "x+") as disk:
        # The 1.10 file format checksums its metadata too: with it a flipped bit anywhere is an error.
        with h5py.File(disk, "w", libver=("v110", "v110")) as file:
            _content(file, table)
        if disk.error is None:
            os.fsync(disk.fileno())
    if disk.error is not None:
        raise disk.error


def _content(file: Any, table: Table) -> None:
    for name, value in table.attributes.items():
        file.attrs.create(name, _fixed(value))
    ragged = table.offsets is not None
    for name, values in table.arrays.items():
        _store(file, f"{'items' if ragged else 'x'}/{name}", values, values.shape[0] // len(table) if ragged else 1)
    if ragged:
        _store(file, "offsets", np.asarray(table.offsets, np.int64))
    for name, values in table.columns.items():
        column = _store(file, f"columns/{name}", _fixed(values))
        if name in table.names:
            column.attrs.create("names", _fixed(list(table.names[name])))


def _store(file: Any, name: str, values: Any, rows: int = 1) -> Any:
    rows = min(values.shape[0], max(rows, CHUNK_BYTES * values.shape[0] // values.nbytes))
    array = file.create_dataset(name, values.shape, values.dtype, chunks=(rows, *values.shape[1:]), fletcher32=True)
    start = 0
    for block in blocks(values):
        array[start : start + len(block)] = block
        start += len(block)
    return array


def _fixed(value: Any) -> np.ndarray:
    """A NumPy array: numbers as they are, text as fixed-length UTF-8."""
    import h5py

    array = np.asarray(value)
    if array.dtype.kind != "U":
        return array
    encoded = np.char.encode(array, "utf-8")
    return encoded.astype(h5py.string_dtype("utf-8", max(1, encoded.dtype.itemsize)))
