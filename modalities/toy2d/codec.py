"""Points between files, arrays (2,) and tensors (2,): all three hold the standardised coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polydiff.core.adapter import Item
from polydiff.core.errors import ConfigError, DataError, unknown
from polydiff.core.tree import State, leaves


class Codec:
    """The data sets are standardised already, so encoding changes nothing."""

    tolerance = 0.0
    formats = ("csv", "npy")

    def __init__(self, facts: Mapping[str, Any] | None = None):
        pass

    def encode(self, raw: np.ndarray) -> State:
        """float32 array (..., 2) -> tensor."""
        return torch.from_numpy(np.asarray(raw, np.float32))

    def decode(self, x: State) -> np.ndarray:
        """Tensor -> float32 array (..., 2)."""
        return leaves(x)[0].detach().float().cpu().numpy()

    def read(self, path: str | Path) -> np.ndarray:
        """A point (2,) from ``.csv`` (a header ``x,y`` and one line) or ``.npy``; else DataError."""
        path = Path(path)
        try:
            if not 0 < path.stat().st_size <= 4096:
                raise ValueError("empty or longer than 4096 bytes")
            is_npy = path.suffix == ".npy"
            raw = np.load(path, mmap_mode="r") if is_npy else np.loadtxt(path, delimiter=",", skiprows=1)
            if raw.shape != (2,) or raw.dtype.kind != "f" or not np.isfinite(raw).all():
                raise ValueError(f"shape {raw.shape} and type {raw.dtype}, expected two finite numbers")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a point ({error}); remove it or write it again") from error
        return np.array(raw, np.float32)

    def write(self, items: Sequence[Item], folder: str | Path, format: str | None = None, **options: Any) -> list[Path]:
        """Write one file an item; nine digits give every float32 back exactly."""
        format, folder = format or self.formats[0], Path(folder)
        if format not in self.formats or options:
            raise unknown("point format or option", next(iter(options), format), self.formats)
        paths = [folder / f"sample-{i:05d}.{format}" for i in range(len(items))]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, item in zip(paths, items, strict=True):
                point = self.decode(item.x)
                if format == "npy":
                    np.save(path, point, allow_pickle=False)
                else:
                    np.savetxt(path, point[None], fmt="%.9g", delimiter=",", header="x,y", comments="")
        except OSError as error:
            raise DataError(f"cannot write points to {folder}: {error.strerror}; choose another folder") from error
        return paths


def shape(size: Mapping[str, Any], cond: Mapping[str, Any] | None = None) -> tuple[State, None]:
    """A point without mask; it has no size to choose."""
    if size:
        raise ConfigError(f"size.{next(iter(size))}: a point has no size; leave it out")
    return torch.zeros(2), None
