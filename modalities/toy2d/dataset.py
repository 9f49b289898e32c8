"""Points of one split of ``/x/point (N, 2)``."""

from pathlib import Path

from polydiff.core.errors import DataError
from polydiff.data.dataset import Stored
from polydiff.data.h5 import Reader
from polydiff.modalities.toy2d.codec import Codec


class Points(Stored):
    """Items with x (2,) and, where the data set has classes, cond ``label``."""

    def __init__(self, path: str | Path, split: str = "train", *, memory_mb: float = 512.0):
        reader = Reader(path)
        if reader.attributes["modality"] == "toy2d" and reader.shapes.get("point") != (2,):
            raise DataError(f"{path}: needs an array point (N, 2), it has {reader.shapes}")
        super().__init__(reader, split, modality="toy2d", encode=Codec().encode, size={}, memory_mb=memory_mb)
