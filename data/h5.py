"""The one file layout of a data set: HDF5, written once, verified before it is read. Format version 1.

``/x/<array> (N, ...)`` for items of one size, or ``/items/<array> (M, ...)`` with ``/offsets (N+1)`` for ragged ones:
item i is rows offsets[i] to offsets[i+1]. ``/columns/<name> (N,)`` holds one value an item, always ``id`` and
``split``; class names stand in the column's attribute ``names``. Text is fixed-length UTF-8, every array carries a
checksum, and nothing is compressed.
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from polydiff.core.errors import DataError
from polydiff.data import guard
from polydiff.data.storage import fill
from polydiff.data.table import Table, blocks

FORMAT_VERSION = 1
SECONDS_TO_WRITE = 86400.0  # without a change; a temporary file of that age is nobody's
REQUIRED = ("name", "modality", "sigma_data", "sha256")


def write(path: str | Path, table: Table) -> Path:
    """Write a data set so that ``path`` either holds all of it or is as it was before.

    Written beside the target, closed, opened and verified, synced to disk, then renamed.

    Args:
        path: the target, usually ``<name>.h5``.
        table: content; its attributes hold ``name``, ``modality`` and ``sigma_data``.
    Returns:
        The path.
    Raises:
        DataError: the content breaks a rule of the layout, or the disk is full or read-only.
    """
    path = Path(path)
    try:
        table.check()
        _check_values(table)
    except ValueError as error:
        raise DataError(f"cannot write {path}: {error}") from error
    stamp = {"sha256": table.sha256(), "format_version": FORMAT_VERSION}
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        try:
            fill(temporary, replace(table, attributes={**table.attributes, **stamp}))
            Reader(temporary).close()
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise DataError(f"cannot write {path}: {reason}; free space or set POLYDIFF_DATA to another folder") from error
    return path


class Reader:
    """A data set file, opened lazily once per process; pickles and forks without sharing the handle.

    Args:
        path: a file in the layout of this module. It is verified here and again whenever a process opens it.
    Attributes:
        attributes: the file's attributes.
        columns: (N,) NumPy array by name; text columns as ``str``.
        names: class names by column.
        shapes: shape of one item by array name, without N; a ragged one starts with -1.
        offsets: (N+1,) int64, or None for items of one size.
        item_bytes: of all arrays of one item, on average.
    Raises:
        DataError: missing, truncated, altered, of another format version, or holding anything but plain arrays.
    """

    attributes: dict[str, Any]
    columns: dict[str, np.ndarray]
    names: dict[str, list[str]]
    shapes: dict[str, tuple[int, ...]]
    offsets: np.ndarray | None
    item_bytes: float

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._pid, self._file = -1, None
        self._open()

    def __len__(self) -> int:
        return len(self.columns["id"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pid": -1, "_file": None, "_arrays": {}}

    def close(self) -> None:
        """Close the file if this process opened it; the next read opens it again."""
        if self._file is not None and self._pid == os.getpid():
            self._file.close()
        self._file = None

    def rows(self, split: str) -> np.ndarray:
        """Indices of the items of a split, increasing.

        Raises:
            DataError: there are none; the message lists the splits there are.
        """
        splits = self.columns["split"]
        rows = np.flatnonzero(splits == split)
        if not len(rows):
            present = ", ".join(f"{s} ({np.sum(splits == s)})" for s in np.unique(splits))
            raise DataError(f"{self.path}: no items in split {split!r}; it has: {present}")
        return rows

    def item(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of one item by name."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        if self.offsets is None:
            return {name: values[0] for name, values in self._read(index, index + 1).items()}
        return self._read(int(self.offsets[index]), int(self.offsets[index + 1]))

    def block(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of many items of one size by name, (len(rows), ...); neighbouring rows are read together."""
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        parts = [self._read(int(run[0]), int(run[-1]) + 1) for run in runs]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.shapes}

    def verify(self) -> None:
        """Read everything and compare with the stored digest.

        Raises:
            DataError: a checksum or the digest differs.
        """
        self._open()
        with guard.reading(self.path):
            found = Table(self._arrays, self.columns, self.names, self.offsets).sha256()
        if found != self.attributes["sha256"]:
            raise guard.refused(self.path, f"the content's digest is {found}, not {self.attributes['sha256']}")

    def _read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        self._open()
        with guard.reading(self.path):
            read = {name: array[start:stop] for name, array in self._arrays.items()}
        for name, values in read.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise guard.refused(self.path, f"array {name!r} is not finite in rows {start} to {stop - 1}")
        return {name: values.astype(values.dtype.newbyteorder("="), copy=False) for name, values in read.items()}

    def _open(self) -> None:
        if self._file is not None and self._pid == os.getpid():
            return
        import h5py

        with guard.reading(self.path):
            size = self.path.stat().st_size
            self._file, self._pid = h5py.File(self.path, "r", locking="best-effort"), os.getpid()
            try:
                self._load(size)
            except BaseException:
                self.close()
                raise

    def _load(self, size: int) -> None:
        path = self.path
        self.attributes = guard.attributes(self._file, path)
        if (version := self.attributes.get("format_version")) != FORMAT_VERSION:
            raise guard.refused(path, f"format_version is {version}, this polydiff reads {FORMAT_VERSION}")
        if missing := [name for name in REQUIRED if name not in self.attributes]:
            raise guard.refused(path, f"lacks the attribute {missing[0]!r}")
        sigma_data = self.attributes["sigma_data"]
        if not isinstance(sigma_data, int | float) or not 0 < sigma_data < float("inf"):
            raise guard.refused(path, f"sigma_data is {sigma_data!r}, not a positive number")
        root = guard.members(self._file, path)
        if root.keys() not in ({"x", "columns"}, {"items", "offsets", "columns"}):
            raise guard.refused(path, f"holds {', '.join(sorted(root))}; expected x or items + offsets, and columns")

        self.columns, self.names, self.offsets = {}, {}, None
        columns_bytes = min(size, guard.MAX_COLUMN_BYTES)
        for name, column in guard.members(root["columns"], path).items():
            guard.array(column, path, columns_bytes, "biufS")
            self.columns[name] = _text(column[:])
            if "names" in column.attrs:
                self.names[name] = list(guard.attributes(column, path)["names"])
        if "offsets" in root:
            guard.array(root["offsets"], path, columns_bytes, "i")
            self.offsets = root["offsets"][:].astype(np.int64)
        self._arrays = guard.members(root["x" if self.offsets is None else "items"], path)
        for array in self._arrays.values():
            guard.array(array, path, size, "biuf")
        Table(self._arrays, self.columns, self.names, self.offsets).check()

        first, longest = ((), 1) if self.offsets is None else ((-1,), int(np.diff(self.offsets).max()))
        self.item_bytes = sum(array.nbytes for array in self._arrays.values()) / len(self)
        self.shapes = {name: first + array.shape[1:] for name, array in self._arrays.items()}
        for array in self._arrays.values():
            if longest * array.nbytes // array.shape[0] > guard.MAX_ITEM_BYTES:
                raise guard.refused(path, f"an item of {array.name} is larger than {guard.MAX_ITEM_BYTES} bytes")


def _text(values: np.ndarray) -> np.ndarray:
    return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values


def _check_values(table: Table) -> None:
    if missing := [name for name in REQUIRED[:-1] if name not in table.attributes]:
        raise ValueError(f"lacks the attribute {missing[0]!r}")
    if len(np.unique(table.columns["id"])) != len(table):
        raise ValueError("two items have the same id")
    for name, values in table.arrays.items():
        if values.dtype.kind == "f" and not all(np.isfinite(block).all() for block in blocks(values)):
            raise ValueError(f"array {name!r} has values that are not finite; the source is damaged")


def _sweep(path: Path) -> None:
    """Remove what killed processes left of this file; a younger one may be in the making."""
    for left in path.parent.glob(f"{escape(path.name)}.*-*.tmp"):
        if time.time() - left.stat().st_mtime > SECONDS_TO_WRITE:
            left.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and a rename is durable without
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
