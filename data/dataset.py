"""A split of a data set file as a map-style torch data set of Items; small ones are held in memory, as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
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
        described: the conditions that do not come from columns, by name, for the facts; see
            ``polydiff.core.adapter.Condition``.
        memory_mb: a split of fewer megabytes is held in memory; a larger one, and a ragged one, is read item by item.
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
        described: Mapping[str, Mapping[str, Any]] | None = None,
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
        self._held: dict[str, np.ndarray] | None = None
        if reader.offsets is None and len(self) * reader.item_bytes <= memory_mb * 1e6:
            self._held = reader.block(self._rows)
        self.facts: dict[str, Any] = {
            "name": reader.attributes["name"],
            "n": len(self),
            "sha256": reader.attributes["sha256"],
            "sigma_data": float(reader.attributes["sigma_data"]),
            "size": dict(size),
            "classes": classes,
        }
        if described:
            self.facts["conditions"] = {name: dict(entry) for name, entry in described.items()}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """The items of a batch, which a torch DataLoader asks for at once; those held in memory are encoded together."""
        rows = [range(len(self))[index] for index in indices]
        if self._held is None:
            states = [self.encode(_single(self.reader.item(self._rows[row]))) for row in rows]
        else:
            batch = self.encode(_single({name: values[rows] for name, values in self._held.items()}))
            states = [take(batch, place) for place in range(len(rows))]
        labels = {name: values[rows].unbind() for name, values in self._labels.items()}
        return [
            Item(state, None, {name: values[place] for name, values in labels.items()}, self._ids[row])
            for place, (row, state) in enumerate(zip(rows, states, strict=True))
        ]


def _single(arrays: dict[str, Any]) -> Any:
    return arrays if len(arrays) > 1 else next(iter(arrays.values()))
