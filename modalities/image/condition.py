"""A picture as the condition of another: what is left of it at a lower resolution, or without its colours.

A condition is made from the 8-bit picture by whole-number arithmetic, rounded to 8 bits, so that a file can hold it: what
a user gives while sampling and what the network saw in training are the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from polydiff.core.adapter import Item
from polydiff.core.errors import ConfigError, DataError, unknown
from polydiff.modalities.image.codec import Codec

NAME = "image"  # of the condition
LUMA = (19595, 38470, 7471)  # Rec. 601: 0.299 R + 0.587 G + 0.114 B in parts of 2^16


class Degradation(Protocol):
    """What makes a condition of a picture."""

    def __call__(self, x: Tensor) -> Tensor:
        """Pictures (..., c, h, w) in [-1, 1] -> their conditions (..., channels, h, w)."""

    def check(self, size: Mapping[str, Any]) -> None:
        """Raise ConfigError where pictures of a size have no such condition."""

    def read(self, path: Path, size: Mapping[str, Any]) -> Tensor:
        """The condition (channels, h, w) that a file stands for."""

    def describe(self, size: Mapping[str, Any]) -> dict[str, Any]:
        """What the facts of the data set say."""


@dataclass(frozen=True)
class LowResolution:
    """The mean of each square of ``factor`` x ``factor`` pixels, rounded to 8 bits, enlarged again by bicubic interpolation.

    The interpolation is torch's (cubic convolution with a = -0.75, pixel centres aligned, edges repeated); it overshoots
    [-1, 1] a little at sharp edges.

    Args:
        factor: how many times smaller, 2 or more.
    """

    factor: int = 4

    def __call__(self, x: Tensor) -> Tensor:
        """Pictures (..., c, h, w) in [-1, 1], sides divisible by the factor -> conditions of the same shape."""
        small = _bytes(F.avg_pool2d(_bytes(x).reshape(-1, *x.shape[-3:]), self.factor), half_up=True)
        return self._enlarged(_normalised(small)).reshape(x.shape)

    def check(self, size: Mapping[str, Any]) -> None:
        """Raise ConfigError where the factor does not divide a side."""
        height, width = size["height"], size["width"]
        if type(self.factor) is not int or self.factor < 2 or height % self.factor or width % self.factor:
            valid = [n for n in range(2, min(height, width) + 1) if height % n == 0 and width % n == 0]
            use = f"use {', '.join(map(str, valid))}" if valid else "no factor does"
            raise ConfigError(f"data.options.factor={self.factor} does not divide pictures of {width}x{height}: {use}")

    def read(self, path: Path, size: Mapping[str, Any]) -> Tensor:
        """The enlarged form of a picture that has the low resolution."""
        self.check(size)
        x = _open(path, size["channels"])
        height, width = size["height"] // self.factor, size["width"] // self.factor
        if x.shape[1:] != (height, width):
            h, w = x.shape[1:]
            raise ConfigError(
                f"{path}: {w}x{h} pixels; to make {size['width']}x{size['height']}, {self.factor} times larger, give a picture "
                f"of {width}x{height}, or ask for size.height={h * self.factor} size.width={w * self.factor}"
            )
        return self._enlarged(x[None])[0]

    def describe(self, size: Mapping[str, Any]) -> dict[str, Any]:
        """Kind, shape, and what a reader of the facts needs to make it again."""
        return {
            "kind": "field",
            "shape": [size["channels"], None, None],
            "name": "low_resolution",
            "factor": self.factor,
        }

    def _enlarged(self, small: Tensor) -> Tensor:
        return F.interpolate(small, scale_factor=self.factor, mode="bicubic", align_corners=False)


@dataclass(frozen=True)
class Grey:
    """The luma of Rec. 601, Y = 0.299 R + 0.587 G + 0.114 B of the 8-bit values, rounded as Pillow's mode "L" is."""

    def __call__(self, x: Tensor) -> Tensor:
        """Pictures (..., 3, h, w) in [-1, 1] -> conditions (..., 1, h, w)."""
        weights = torch.tensor(LUMA, dtype=torch.float64, device=x.device).view(3, 1, 1) / 2**16
        luma = (_bytes(x).double() * weights).sum(-3, keepdim=True)
        return _normalised(_bytes(luma, half_up=True)).to(x.dtype)

    def check(self, size: Mapping[str, Any]) -> None:
        """Raise ConfigError for pictures without colours."""
        if size["channels"] != 3:
            raise ConfigError(
                "data.options.condition=grey needs colour pictures, those of this data set are grey already"
            )

    def read(self, path: Path, size: Mapping[str, Any]) -> Tensor:
        """The grey form of a picture of the full size, whether it has colours or not."""
        x = _open(path, 3)
        if x.shape[1:] != (size["height"], size["width"]):
            h, w = x.shape[1:]
            raise ConfigError(
                f"{path}: {w}x{h} pixels; give a picture of {size['width']}x{size['height']}, or ask for "
                f"size.height={h} size.width={w}"
            )
        return self(x)

    def describe(self, size: Mapping[str, Any]) -> dict[str, Any]:
        """Kind, shape, and what a reader of the facts needs to make it again."""
        return {"kind": "field", "shape": [1, None, None], "name": "grey"}


DEGRADATIONS = ("low_resolution", "grey")


def degradation(name: str, factor: int = 4) -> Degradation:
    """The degradation of that name; raises ConfigError for another one."""
    if name not in DEGRADATIONS:
        raise unknown("value of data.options.condition", name, DEGRADATIONS)
    return LowResolution(factor) if name == "low_resolution" else Grey()


def described(facts: Mapping[str, Any]) -> Degradation | None:
    """The degradation that a data set's facts describe; None for a data set without.

    Raises:
        ConfigError: the facts describe one that there is not.
    """
    found = (facts.get("conditions") or {}).get(NAME)
    return None if found is None else degradation(str(found.get("name")), found.get("factor", 4))


def read(path: Path, facts: Mapping[str, Any], size: Mapping[str, Any]) -> Tensor:
    """The condition that a user's picture stands for.

    Args:
        path: for super-resolution a picture of the low resolution, for colourisation one of the full size.
        facts: of the data set.
        size: height, width and channels of the samples.
    Raises:
        DataError: no picture, or a damaged one.
        ConfigError: a picture of another size; the message says which it should have.
    """
    found = described(facts)
    if found is None:
        raise DataError(f"{path}: this model takes no picture as condition")
    return found.read(path, size)


def same_condition(items: Sequence[Item]) -> dict[bytes, list[Item]]:
    """Pictures by the condition that belongs to them, those without left out; keys as ``key`` gives them."""
    groups: dict[bytes, list[Item]] = {}
    for item in items:
        if NAME in item.cond:
            groups.setdefault(key(item), []).append(item)
    return groups


def key(item: Item) -> bytes:
    """What tells the condition of a picture from any other."""
    return item.cond[NAME].cpu().numpy().tobytes()


def _open(path: Path, channels: int) -> Tensor:
    codec = Codec({"size": {"channels": channels}})
    return codec.encode(codec.read(path))


def _bytes(x: Tensor, half_up: bool = False) -> Tensor:
    """The 8-bit values of normalised pictures, as floats; or values rounded to such, halves upwards as Pillow does."""
    return (x + 0.5).floor() if half_up else ((x + 1) * 127.5).round().clamp(0, 255)


def _normalised(values: Tensor) -> Tensor:
    return values / 127.5 - 1
