"""A split of a data set file as a map-style torch data set of Items; small ones are held in memory, encoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from polydiff.core.adapter import Item
from polydiff.core.errors import ConfigError, DataError
from polydiff.core.tree import State, take
from polydiff.data.h5 import Reader


class Stored(Dataset[Item]):
    """The items of one split.

    Args:
        reader: the open file.
        split: which items.
        modality: what the file must hold.
        encode: the codec's: raw array of one item or a batch (a dictionary of them, if there are several) -> State.
        size: what the adapter's ``shape`` takes, for the facts.
        conditions: columns that become conditions, where the file has them with class names; others are left aside.
        memory_mb: a split that needs less than this once encoded as float32 is held in memory; a larger one, and a
            ragged one, is read item by item.
    Attributes:
        facts: what a network and a checkpoint need to know of the data, JSON-able.
    Raises:
        DataError: the file holds another modality, or the split has no items.
    """

    def __init__(
        self,
        reader: Reader,
        split: str,
        *,
        modality: str,
        encode: Callable[[Any], State],
        size: Mapping[str, Any],
        conditions: Sequence[str] = ("label",),
        memory_mb: float = 512.0,
    ):
        if reader.attributes["modality"] != modality:
            raise DataError(
                f"{reader.path}: holds {reader.attributes['modality']!r} data, the adapter {modality!r} needs its own; "
                "choose another data set or adapter"
            )
        if not isinstance(memory_mb, int | float) or not memory_mb >= 0:
            raise ConfigError(f"data.options.memory_mb={memory_mb!r}: must be a number of megabytes, 0 or more")
        self.reader, self.encode = reader, encode
        self._rows = reader.rows(split)
        self._ids = [str(name) for name in reader.columns["id"][self._rows]]
        classes = {name: reader.names[name] for name in conditions if name in reader.names}
        self._labels = {name: torch.from_numpy(reader.columns[name][self._rows].astype("int64")) for name in classes}
        self._x: State | None = None
        n_bytes = 4 * len(self) * sum(math.prod(shape) for shape in reader.shapes.values())
        if reader.offsets is None and n_bytes <= memory_mb * 1e6:
            self._x = encode(_single(reader.block(self._rows)))
        self.facts: dict[str, Any] = {
            "name": reader.attributes["name"],
            "n": len(self),
            "sha256": reader.attributes["sha256"],
            "sigma_data": float(reader.attributes["sigma_data"]),
            "size": dict(size),
            "classes": classes,
        }

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        index = range(len(self))[index]
        x = take(self._x, index) if self._x is not None else self.encode(_single(self.reader.item(self._rows[index])))
        return Item(x, None, {name: values[index] for name, values in self._labels.items()}, self._ids[index])

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """The items of a batch; a torch DataLoader calls this once instead of once an item."""
        return [self[index] for index in indices]


def _single(arrays: dict[str, Any]) -> Any:
    return arrays if len(arrays) > 1 else next(iter(arrays.values()))
