"""Images of one split, normalised, with what the network is told about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polydiff.core.adapter import Item
from polydiff.core.errors import ConfigError, DataError
from polydiff.core.tree import leaves, tree_map
from polydiff.data.dataset import Stored
from polydiff.data.h5 import Reader
from polydiff.modalities.image import augment as augmentation
from polydiff.modalities.image.codec import Codec
from polydiff.modalities.image.condition import NAME, degradation

SETTING = "augment"  # the condition that says how an image was warped


class Images(Stored):
    """Images (C, H, W) in [-1, 1] of a file with ``/x/image (N, H, W, C)`` uint8, C = 1 or 3.

    Args:
        path: the file.
        split: ``train``, ``test`` or, where there is one, ``valid``.
        memory_mb: see ``Stored``.
        classes: use the classes as a condition, where there are some.
        condition: give each image a degraded one as the condition ``image``: ``low_resolution`` (super-resolution) or
            ``grey`` (colourisation); see ``polydiff.modalities.image.condition``.
        factor: how many times smaller ``low_resolution`` is.
        flip: mirror half of the training items left to right (not for digits and letters).
        augment: probability of each random transformation of a training item, about which the network is told by the
            condition ``augment``; 0 for none. See ``polydiff.modalities.image.augment``.
        augment_invert: let them turn images upside down.
    Raises:
        ConfigError: a condition that these images cannot have, or a probability that is none.
        DataError: the file does not hold such images, or the split is empty.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        *,
        memory_mb: float = 512.0,
        classes: bool = True,
        condition: str | None = None,
        factor: int = 4,
        flip: bool = False,
        augment: float = 0.0,
        augment_invert: bool = False,
    ):
        reader = Reader(path)
        image = reader.shapes.get("image", ())
        if reader.attributes["modality"] == "image" and (len(image) != 3 or image[2] not in (1, 3)):
            raise DataError(f"{path}: needs an array image (N, height, width, 1 or 3), it has {reader.shapes}")
        size = dict(zip(("height", "width", "channels"), image, strict=False))
        if isinstance(augment, bool) or not isinstance(augment, int | float) or not 0 <= augment <= 1:
            raise ConfigError(f"data.options.augment={augment!r} must be a probability between 0 and 1")
        described: dict[str, dict[str, Any]] = {}
        self.degrade = None if condition is None else degradation(condition, factor)
        if reader.attributes["modality"] == "image":  # else the file is refused below
            if self.degrade is not None:
                self.degrade.check(size)
                described[NAME] = self.degrade.describe(size)
            if augment:
                if min(image[:2]) < 2:
                    raise ConfigError(
                        f"data.options.augment={augment}: images of {image[1]}x{image[0]} cannot be warped"
                    )
                described[SETTING] = {"kind": "setting", "shape": [augmentation.NUMBERS]}
        super().__init__(
            reader,
            split,
            modality="image",
            encode=Codec().encode,
            size=size,
            conditions=("label",) if classes else (),
            described=described,
            memory_mb=memory_mb,
        )
        self.flip, self.probability, self.invert = flip, float(augment), augment_invert

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """The items of a batch, their conditions made in one go."""
        items = super().__getitems__(indices)
        if self.degrade is None or not items:
            return items
        given = self.degrade(torch.stack([leaves(item.x)[0] for item in items]))
        return [replace(item, cond={**item.cond, NAME: one}) for item, one in zip(items, given, strict=True)]

    def augment(self, item: Item, generator: torch.Generator) -> Item:
        """Mirror the image with probability 1/2 if ``flip`` is on, then warp it if ``augment`` is; its condition with it."""
        if self.flip and torch.rand((), generator=generator) >= 0.5:
            item = replace(item, x=tree_map(lambda x: x.flip(-1), item.x), cond=dict(item.cond))
            if self.degrade is not None:
                item.cond[NAME] = item.cond[NAME].flip(-1)
        if not self.probability:
            return item
        how = augmentation.draw(self.probability, generator, self.invert)
        before = leaves(item.x)[0]
        x, cond = augmentation.warp(before, how), {**item.cond, SETTING: how.told()}
        if self.degrade is not None and x is not before:
            cond[NAME] = self.degrade(x[None])[0]
        return replace(item, x=x, cond=cond)
