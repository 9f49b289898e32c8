"""What a data set holds, before it is written and after it is read: arrays, columns, class names, attributes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BLOCK_BYTES = 2**24


@dataclass(frozen=True)
class Table:
    """The content of a data set; what a recipe returns.

    Args:
        arrays: by name, (N, ...) each; or, with ``offsets``, (M, ...) each. Anything that slices like a NumPy array.
        columns: by name, (N,) numbers or text; ``id`` (unique) and ``split`` are required.
        names: class names of an integer column whose values index them.
        offsets: (N+1,) rows at which ragged items start, from 0 to M; None for items of one size.
        attributes: text, numbers or lists of them, e.g. units, licence, source.
        skipped: name and reason of what the source has and the content has not; not stored with it.
    """

    arrays: Mapping[str, Any]
    columns: Mapping[str, Any]
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    offsets: Any = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    skipped: Sequence[tuple[str, str]] = ()

    def __len__(self) -> int:
        return len(self.columns["id"])

    def rows(self, split: str) -> np.ndarray:
        """Indices of the items of a split, increasing; none when there is no such split."""
        return np.flatnonzero(np.asarray(self.columns["split"]) == split)

    def check(self) -> None:
        """Hold the content against the rules that the shapes, columns, names and offsets must obey.

        Raises:
            ValueError: the first rule that is broken.
        """
        columns = {name: np.asarray(values) for name, values in self.columns.items()}
        if not {"id", "split"} <= columns.keys() or any(columns[name].dtype.kind != "U" for name in ("id", "split")):
            raise ValueError("needs the text columns id and split")
        n = len(columns["id"])
        if not n or not self.arrays or any(0 in array.shape for array in self.arrays.values()):
            raise ValueError("holds no items")
        for name, values in columns.items():
            if values.shape != (n,):
                raise ValueError(f"column {name!r} has shape {values.shape}, column id ({n},)")
        for name, classes in self.names.items():
            values = columns[name]
            if values.dtype.kind not in "iu" or len({*classes}) != len(classes):
                raise ValueError(f"column {name!r} has class names: it needs integers, and the names must differ")
            if values.min() < 0 or values.max() >= len(classes):
                raise ValueError(f"column {name!r} holds {values.min()}..{values.max()} but has {len(classes)} names")
        self._check_rows(n, {name: array.shape[0] for name, array in self.arrays.items()})

    def _check_rows(self, n: int, rows: dict[str, int]) -> None:
        offsets = None if self.offsets is None else np.asarray(self.offsets)
        if offsets is not None and (offsets.shape != (n + 1,) or offsets[0] != 0 or (np.diff(offsets) <= 0).any()):
            raise ValueError(f"offsets must rise from 0 in {n} steps")
        expected = n if offsets is None else int(offsets[-1])
        for name, found in rows.items():
            if found != expected:
                raise ValueError(f"array {name!r} has {found} rows, expected {expected}")

    def sha256(self) -> str:
        """Digest of the content: equal for equal data, whatever the version of the HDF5 library."""
        digest = hashlib.sha256()
        for name, values in self._parts():
            is_text = values.dtype.kind == "U"
            dtype = np.dtype(values.dtype).newbyteorder("<")
            digest.update(f"{name} {'text' if is_text else dtype.str} {values.shape}\n".encode())
            for block in blocks(values):
                digest.update("".join(f"{s}\n" for s in block).encode() if is_text else block.astype(dtype).tobytes())
        return digest.hexdigest()

    def _parts(self) -> Iterator[tuple[str, Any]]:
        yield from ((f"array/{name}", self.arrays[name]) for name in sorted(self.arrays))
        yield from ((f"column/{name}", np.asarray(self.columns[name])) for name in sorted(self.columns))
        yield from ((f"names/{name}", np.asarray(self.names[name])) for name in sorted(self.names))
        if self.offsets is not None:
            yield "offsets", np.asarray(self.offsets, np.int64)


def blocks(values: Any) -> Iterator[np.ndarray]:
    """An array in pieces of about ``BLOCK_BYTES``, so that one larger than memory streams."""
    rows = max(1, BLOCK_BYTES * values.shape[0] // max(1, values.nbytes))
    for start in range(0, values.shape[0], rows):
        yield np.asarray(values[start : start + rows])
