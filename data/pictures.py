"""One picture file of any common kind -> an upright uint8 array of a given size, or the reason why not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polydiff.core.errors import ConfigError, DataError, unknown
from polydiff.data.source import reason

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
CROPS = {
    "center": "the largest centred part of that shape",
    "none": "the whole picture, its shape not kept",
}
MAX_PIXELS = 2**26  # of a file: 268 MB once decoded with transparency
MAX_SIDE = 4096  # of what comes out


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How pictures are made equal.

    Turned upright by their EXIF orientation; transparency laid over white; 16-bit grey v as round(v / 257); CMYK and
    palettes to RGB by Pillow's formulas, without colour profiles; the first frame of animations. Then cropped, and
    resized by Lanczos' filter (a = 3, widened by the factor of reduction, so that nothing aliases) on the stored,
    gamma-encoded values, as reference statistics of published models are made.

    Args:
        height: of the result, in pixels.
        width: of the result.
        crop: a key of ``CROPS``.
        enlarge: a picture that would have to grow by more than this factor along an axis is refused.
    Raises:
        ConfigError: a value that cannot be used.
    """

    height: int
    width: int
    crop: str = "center"
    enlarge: float = 2.0

    def __post_init__(self) -> None:
        sides = (self.height, self.width)
        if not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
            raise ConfigError(f"size={self.height}x{self.width}: sides are whole numbers from 1 to {MAX_SIDE}")
        if self.crop not in (*CROPS,):  # a tuple, because lists have no hash
            raise unknown("crop", str(self.crop), CROPS)
        if type(self.enlarge) not in (int, float) or not 1 <= self.enlarge < float("inf"):
            raise ConfigError(f"enlarge={self.enlarge}: a factor, 1 or more")

    def read(self, path: str | Path, channels: int = 3) -> np.ndarray:
        """The picture as (height, width, channels) uint8: 3 RGB, 1 its luma by ITU-R BT.601.

        Raises:
            DataError: not a whole picture of ``FORMATS``, too large or too small; the message is the reason alone.
        """
        picture = self._resize(upright(path))
        pixels = np.asarray(picture.convert("RGB" if channels == 3 else "L"))
        return pixels.reshape(self.height, self.width, channels)

    def _resize(self, image: Image) -> Image:
        from PIL.Image import Resampling

        width, height = float(image.width), float(image.height)
        if self.crop == "center":
            width, height = min(width, height * self.width / self.height), min(height, width * self.height / self.width)
        if max(self.width / width, self.height / height) > self.enlarge:
            raise DataError(
                f"{image.width} x {image.height} pixels would be enlarged more than {self.enlarge:g} times "
                f"to {self.width} x {self.height}"
            )
        left, top = (image.width - width) / 2, (image.height - height) / 2
        box = (left, top, min(left + width, image.width), min(top + height, image.height))
        return image.resize((self.width, self.height), Resampling.LANCZOS, box=box)


def upright(path: str | Path) -> Image:
    """The picture of a file at its own size, greyscale or RGB, as ``Fit`` describes.

    Raises:
        DataError: not a whole picture of ``FORMATS``, or too large; the message is the reason alone.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if not Path(path).stat().st_size:
            raise ValueError("empty file")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are read")
            return _upright(image)
    except UnidentifiedImageError:
        raise DataError(f"not a picture ({', '.join(FORMATS)}), or damaged at its start") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        raise DataError(reason(error)) from error


@contextmanager
def decoders() -> Iterator[None]:
    """Have Pillow's decoders loaded, before threads use them, and their remarks on odd files silent."""
    from PIL import Image

    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _upright(image: Image) -> Image:
    """As greyscale or RGB, after the EXIF orientation and over white."""
    from PIL import ImageOps
    from PIL.Image import alpha_composite, fromarray, new

    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not deep and image.mode in ("I", "F"):
        raise ValueError(f"{image.mode}: 32 bits a pixel, of which none is known to be white")
    ImageOps.exif_transpose(image, in_place=True)
    if deep:
        grey = np.rint(np.asarray(image).astype(np.float32) / 257).clip(0, 255)
        image = fromarray(grey.astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return alpha_composite(new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")  # a copy, which outlives its file
