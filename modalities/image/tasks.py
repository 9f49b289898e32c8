"""What a model of images can do with a picture: complete it, enlarge it, colour it, take off its noise, vary it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from polydiff.core import given
from polydiff.core.adapter import Item
from polydiff.core.errors import ConfigError
from polydiff.core.given import Inverse, Known, Vary, named, needed, needed_like
from polydiff.core.inverse import AverageBlocks, Mix
from polydiff.core.noise import Noise
from polydiff.core.tasks import Task
from polydiff.modalities.image.codec import Codec
from polydiff.modalities.image.condition import LUMA

if TYPE_CHECKING:
    from polydiff.core.run import Run


@dataclass(frozen=True)
class Inpaint(Known):
    """Options of ``inpaint``."""

    box: Annotated[
        list[int] | None, "[top, left, height, width] of what is unknown; null: the middle, half as long"
    ] = None
    known: Annotated[Path | None, "instead of box: a picture that is white where pixels are known, black elsewhere"] = (
        None
    )


def inpaint(input: Item | None, options: Inpaint, run: Run, noise: Noise, k: int) -> Task:
    """Fill in a part of a picture."""
    x0 = needed_like(input, "inpaint", run)
    return given.inpaint(x0, _known(x0, options).expand_as(x0), options, run)


def _known(x0: Tensor, options: Inpaint) -> Tensor:
    """Which pixels (1, h, w) are known."""
    height, width = x0.shape[-2:]
    if options.known is not None:
        if options.box is not None:
            raise ConfigError("give task.box or task.known, not both")
        if not options.known.is_file():
            raise ConfigError(f"task.known={options.known}: no such file")
        pixels = torch.from_numpy(Codec({"size": {"channels": 1}}).read(options.known))[..., 0]
        if pixels.shape != (height, width):
            h, w = pixels.shape
            raise ConfigError(
                f"task.known={options.known} is {w}x{h}, the picture is {width}x{height}: make them equal"
            )
        return (pixels >= 128)[None]
    box = options.box or [height // 4, width // 4, height - height // 4 * 2, width - width // 4 * 2]
    top, left, down, across = box if len(box) == 4 else [-1] * 4
    if min(top, left, down - 1, across - 1, height - top - down, width - left - across) < 0:
        raise ConfigError(f"task.box={box} must be [top,left,height,width] of a part of a picture of {width}x{height}")
    known = torch.ones(1, height, width, dtype=torch.bool)
    known[:, top : top + down, left : left + across] = False
    return known


@dataclass(frozen=True)
class SuperResolution(Inverse):
    """Options of ``super-resolution``."""

    factor: Annotated[int | None, "how many times larger; null: as the input says, 2 for one of the full size"] = None


def super_resolution(input: Item | None, options: SuperResolution, run: Run, noise: Noise, k: int) -> Task:
    """Enlarge a picture: it is the mean of each square of ``factor`` x ``factor`` pixels of the sample.

    A picture that has the size of the samples already is reduced first.
    """
    y = needed(input, "super-resolution").x
    assert isinstance(y, Tensor)
    size, own = (run.facts["size"][name] for name in ("height", "width")), y.shape[-2:]
    height, width = size
    full = tuple(own) == (height, width)
    factor = options.factor if options.factor is not None else 2 if full else max(1, round(height / own[0]))
    if own[0] > height or own[1] > width:
        raise ConfigError(
            f"input={named(input)} is {own[1]}x{own[0]}, larger than the samples, {width}x{height}: reduce it, or ask for "
            "larger ones by size.height and size.width"
        )
    divides = factor >= 2 and height % factor == 0 and width % factor == 0
    if not divides:
        valid = [str(n) for n in range(2, min(height, width) + 1) if height % n == 0 and width % n == 0]
        use = f"task.factor can be {', '.join(valid)}" if valid else "no factor divides it"
        raise ConfigError(
            f"samples are {width}x{height}, input={named(input)} is {own[1]}x{own[0]}, {factor} times larger does not fit: {use}"
        )
    if full:
        y = AverageBlocks((factor, factor))(y[None])[0]
    elif tuple(own) != (height // factor, width // factor):
        raise ConfigError(
            f"input={named(input)} is {own[1]}x{own[0]}; to make {width}x{height}, {factor} times larger, give a picture of "
            f"{width // factor}x{height // factor}, or ask for size.height={own[0] * factor} size.width={own[1] * factor}"
        )
    return given.inverse(AverageBlocks((factor, factor)), y, options, run, Item(y))


def colourise(input: Item | None, options: Inverse, run: Run, noise: Noise, k: int) -> Task:
    """Give a grey picture its colours: it is their luma (Rec. 601). The colours of the input have no influence."""
    if run.facts["size"]["channels"] != 3:
        raise ConfigError("task=colourise needs a model of colour pictures, this one makes grey ones")
    x = needed_like(input, "colourise", run)
    luma = Mix(torch.tensor([LUMA], dtype=torch.float32) / 2**16)
    y = luma(x[None])[0]
    return given.inverse(luma, y, options, run, Item(y))


@dataclass(frozen=True)
class Denoise:
    """Options of ``denoise``."""

    noise: Annotated[float, "standard deviation of the noise in the picture; black to white is 2"] = 0.2


def denoise(input: Item | None, options: Denoise, run: Run, noise: Noise, k: int) -> Task:
    """Take off Gaussian noise of known strength."""
    return given.denoise(needed_like(input, "denoise", run), options.noise, run)


def variation(input: Item | None, options: Vary, run: Run, noise: Noise, k: int) -> Task:
    """Make a picture like the given one."""
    return given.vary(needed_like(input, "variation", run), options, run)
