"""Batches of a stored split are its items, however they are read; and what counts as small enough to be held."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from polydiff.core.adapter import Item, collate
from polydiff.core.training.stream import Stream, loader
from polydiff.data import h5
from polydiff.data.dataset import Stored
from polydiff.data.table import Table


def stored(folder: Path, memory_mb: float) -> Stored:
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 256, (40, *shape), dtype=np.uint8) for name, shape in SHAPES.items()}
    columns = {"id": np.array([f"i{k}" for k in range(40)]), "split": np.array(["train", "test"] * 20)}
    columns["label"] = rng.integers(0, 3, 40)
    attributes = {"name": "made", "modality": "made", "sigma_data": 1.0}
    path = h5.write(folder / "made.h5", Table(arrays, columns, {"label": ["a", "b", "c"]}, attributes=attributes))

    def encode(raw: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(values).float() / 255 for name, values in raw.items()}

    return Stored(h5.Reader(path), "train", modality="made", encode=encode, size={}, memory_mb=memory_mb)


SHAPES = {"near": (3, 4), "far": (5,)}


def same(one: Item, other: Item) -> bool:
    assert isinstance(one.x, dict) and isinstance(other.x, dict)
    states = all(torch.equal(one.x[name], other.x[name]) for name in SHAPES)
    return states and one.id == other.id and torch.equal(one.cond["label"], other.cond["label"])


def test_a_batch_is_its_items_bit_for_bit(tmp_path: Path) -> None:
    held, read = stored(tmp_path, 1.0), stored(tmp_path, 0.0)
    assert held._held is not None and read._held is None and held.reader.item_bytes == 17
    batch = held.__getitems__([7, 0, -1, 7])
    assert all(same(one, other) for one, other in zip(batch, read.__getitems__([7, 0, 19, 7]), strict=True))
    assert [item.id for item in batch] == ["i14", "i0", "i38", "i14"]
    assert all(same(held[k], read[k]) for k in range(20))
    with pytest.raises(IndexError):
        held[20]


def test_a_split_is_held_up_to_its_size(tmp_path: Path) -> None:
    assert stored(tmp_path, 20 * 17 / 1e6)._held is not None
    assert stored(tmp_path, 20 * 17 / 1e6 - 1e-9)._held is None


def test_items_do_not_share_memory_with_the_split(tmp_path: Path) -> None:
    held = stored(tmp_path, 1.0)
    before = held[3].x["far"].clone()  # type: ignore[index]
    held[3].x["far"].zero_()  # type: ignore[index]
    assert torch.equal(held[3].x["far"], before)  # type: ignore[index]


def test_the_stream_delivers_the_same_batches_from_memory_and_from_the_file(tmp_path: Path) -> None:
    batches = [
        list(loader(data, Stream(20, 6, 1), 2, 7, chunks=range(1), collate=collate))
        for data in (stored(tmp_path, 1.0), stored(tmp_path, 0.0))
    ]
    for (x, _, cond), (y, _, other) in zip(*batches, strict=True):
        assert all(torch.equal(x[name], y[name]) for name in SHAPES) and torch.equal(cond["label"], other["label"])  # type: ignore[index]
