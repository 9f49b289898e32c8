"""Images between files, uint8 arrays (H, W, C) and normalised float32 tensors (C, H, W) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polydiff.core.adapter import Item
from polydiff.core.errors import ConfigError, DataError, DivergenceError, unknown
from polydiff.core.tree import State, leaves
from polydiff.data.pictures import MAX_PIXELS, upright

EXTENSIONS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
OPTIONS: dict[str, dict[str, Any]] = {"png": {}, "webp": {"lossless": True, "quality": 90}, "jpeg": {"quality": 95}}


class Codec:
    """8-bit images as x / 127.5 - 1.

    Args:
        facts: of the data set; its number of channels decides whether files are read as greyscale or RGB.
    Attributes:
        tolerance: largest difference between an array and its decoded encoding: 0, the rounding is exact.
        formats: what ``write`` writes; PNG and (by default) WebP keep every pixel.
        endings: of the names of further files that ``read`` reads, among them those that ``write`` gives to JPEG.
    """

    tolerance = 0.0
    formats = tuple(EXTENSIONS)
    endings = ("jpg", "gif", "bmp", "tif", "tiff", "ppm", "pgm")

    def __init__(self, facts: Mapping[str, Any] | None = None):
        self.channels: int | None = (facts or {}).get("size", {}).get("channels")

    def encode(self, raw: np.ndarray) -> Tensor:
        """uint8 (..., H, W, C) -> float32 (..., C, H, W) in [-1, 1]."""
        if raw.dtype != np.uint8 or raw.ndim < 3:
            raise DataError(f"an image must be uint8 (height, width, channels), got {raw.dtype} {raw.shape}")
        return (
            torch.from_numpy(raw).movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
        )

    def decode(self, x: State) -> np.ndarray:
        """float (..., C, H, W) -> uint8 (..., H, W, C); values outside of [-1, 1] are clipped.

        Raises:
            DivergenceError: a value is not finite.
        """
        x = leaves(x)[0].detach().float().cpu()
        if not x.isfinite().all():
            raise DivergenceError("an image has values that are not finite: the sampler or the model diverged")
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous().numpy()

    def read(self, path: str | Path) -> np.ndarray:
        """A picture file of any common kind as uint8 (H, W, C), C = 1 or 3, as ``polydiff.data.pictures.Fit`` describes.

        Raises:
            DataError: missing, damaged, of 32 bits a pixel, or of more than ``MAX_PIXELS``.
        """
        try:
            picture = upright(path)
        except DataError as error:
            raise DataError(f"{path}: {error}; remove it or convert it to PNG") from error
        channels = self.channels or len(picture.getbands())
        return np.array(picture.convert("L" if channels == 1 else "RGB")).reshape(
            picture.height, picture.width, channels
        )

    def write(self, items: Sequence[Item], folder: str | Path, format: str | None = None, **options: Any) -> list[Path]:
        """Write one file an item, ``sample-00000.png`` and so on.

        Args:
            items: x is (C, H, W).
            folder: made if missing.
            format: one of ``formats``; PNG by default.
            options: ``quality`` 1..100 (WebP, JPEG), ``lossless`` (WebP, on by default).
        Raises:
            ConfigError: unknown format or option.
            DataError: the folder cannot be written.
        """
        from PIL import Image

        format, folder = format or self.formats[0], Path(folder)
        if format not in EXTENSIONS:
            raise unknown("image format", format, EXTENSIONS)
        for name in options.keys() - OPTIONS[format].keys():
            raise unknown(f"option of {format}", name, OPTIONS[format])
        paths = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for i, item in enumerate(items):
                pixels = self.decode(item.x)
                paths.append(folder / f"sample-{i:05d}{EXTENSIONS[format]}")
                image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
                image.save(paths[-1], format.upper(), **OPTIONS[format] | options)
        except OSError as error:
            raise DataError(
                f"cannot write images to {folder}: {error.strerror or error}; choose another folder"
            ) from error
        return paths


def shape(size: Mapping[str, Any], cond: Mapping[str, Any] | None = None) -> tuple[Tensor, None]:
    """An empty image of a size: zeros (channels, height, width), no mask.

    Args:
        size: ``height``, ``width`` and ``channels`` (1 or 3).
        cond: has no influence.
    Raises:
        ConfigError: an unknown key, or a value that no image has.
    """
    for name in size.keys() - {"height", "width", "channels"}:
        raise unknown("size key", name, ("height", "width", "channels"))
    sides = [size.get(name) for name in ("height", "width", "channels")]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides):
        raise ConfigError(f"size {dict(size)}: height, width and channels must be whole numbers, 1 or more")
    height, width, channels = (int(n or 0) for n in sides)
    if channels not in (1, 3) or height * width > MAX_PIXELS:
        raise ConfigError(f"size {dict(size)}: channels must be 1 or 3, pixels at most {MAX_PIXELS}")
    return torch.zeros(channels, height, width), None
