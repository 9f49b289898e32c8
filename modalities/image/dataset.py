"""Images of one split, normalised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from polydiff.core.adapter import Item
from polydiff.core.errors import DataError
from polydiff.core.tree import tree_map
from polydiff.data.dataset import Stored
from polydiff.data.h5 import Reader
from polydiff.modalities.image.codec import Codec


class Images(Stored):
    """Images (C, H, W) in [-1, 1] of a file with ``/x/image (N, H, W, C)`` uint8, C = 1 or 3.

    Args:
        path: the file.
        split: ``train``, ``test`` or, where there is one, ``valid``.
        memory_mb: see ``Stored``.
        flip: mirror half of the training items left to right (not for digits and letters).
    Raises:
        DataError: the file does not hold such images, or the split is empty.
    """

    def __init__(self, path: str | Path, split: str = "train", *, memory_mb: float = 512.0, flip: bool = False):
        reader = Reader(path)
        image = reader.shapes.get("image", ())
        if reader.attributes["modality"] == "image" and (len(image) != 3 or image[2] not in (1, 3)):
            raise DataError(f"{path}: needs an array image (N, height, width, 1 or 3), it has {reader.shapes}")
        size = dict(zip(("height", "width", "channels"), image, strict=False))
        super().__init__(reader, split, modality="image", encode=Codec().encode, size=size, memory_mb=memory_mb)
        self.flip = flip

    def augment(self, item: Item, generator: torch.Generator) -> Item:
        """Mirror the image with probability 1/2 if ``flip`` is on."""
        if not self.flip or torch.rand((), generator=generator) < 0.5:
            return item
        return replace(item, x=tree_map(lambda x: x.flip(-1), item.x))
