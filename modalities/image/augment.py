r"""Augmentation that does not leak: pictures are warped at random, and the network is told how.

A generator that is told "not warped" while sampling makes unwarped pictures, although it has learned from the others too.

Sampling of a warped picture: enlarged twice, read by bilinear interpolation at twice the resolution, filtered down. The two
filters are the synthesis and analysis low-pass of the Cohen-Daubechies-Feauveau 9/7 wavelet. They are symmetric and give
:math:`\sum_k \tilde h_k h_{k - 2m} = \delta_m`, so what only moves pixels to pixels (nothing at all, flips, quarter turns,
shifts by whole pixels) is exact. Beyond its edges a picture is mirrored.

Source:
    Karras et al. 2022 (EDM), appendix F.2, table 6; the wavelet: Cohen, Daubechies and Feauveau 1992.
Differs from the source:
    another wavelet (theirs is not symmetric); flipping upside down is off unless asked for; a stretch is never negative.
    To be larger along one direction is to be smaller across it, so pictures are the same, but n along d and -n along d + pi
    would be told alike and are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 9  # what the network is told
SCALE = ANISOTROPY = 2**0.2  # table 6: A_scale, A_aniso
TRANSLATION = 1 / 8  # A_trans, of the sides

# CDF 9/7, from the middle outwards
UP = (1.115087052456994, 0.5912717631142470, -0.05754352622849957, -0.09127176311424948)
DOWN = (0.6029490182363579, 0.2668641184428723, -0.07822326652898785, -0.01686411844287495, 0.02674875741080976)
EDGE = len(DOWN) - 1  # points beyond the edges that filtering down looks at


@dataclass(frozen=True)
class Warp:
    """One draw of the transformations, each of which does nothing by default; they apply in this order.

    Args:
        mirror: left and right change places.
        invert: top and bottom change places.
        scale: n, larger by 2^(n/5).
        angle: turned by it, radians, clockwise as seen.
        stretch: n, larger by 2^(n/5) along ``direction`` and smaller by as much across it.
        direction: radians.
        shift: to the right and downwards, in units of 1/8 of width and height.
    """

    mirror: bool = False
    invert: bool = False
    scale: float = 0.0
    angle: float = 0.0
    stretch: float = 0.0
    direction: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)

    def told(self) -> Tensor:
        """What the network is told, (9,): zero for no transformation. Table 6, column "conditioning"."""
        turn = math.cos(self.angle) - 1, math.sin(self.angle)
        stretch = self.stretch * math.cos(self.direction), self.stretch * math.sin(self.direction)
        return torch.tensor([self.mirror, self.invert, self.scale, *turn, *stretch, *self.shift], dtype=torch.float32)

    def matrix(self) -> list[list[float]]:
        """A of q = A (p - shift): where the place p of the result, from its middle, was in the flipped picture."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        u, v = math.cos(self.direction), math.sin(self.direction)
        along, across = ANISOTROPY**-self.stretch, ANISOTROPY**self.stretch
        size = SCALE**-self.scale
        squeeze = [
            [along * u * u + across * v * v, (along - across) * u * v],
            [(along - across) * u * v, along * v * v + across * u * u],
        ]
        back = [[size * c, size * s], [-size * s, size * c]]
        return [[sum(back[i][k] * squeeze[k][j] for k in (0, 1)) for j in (0, 1)] for i in (0, 1)]

    @property
    def only_flips(self) -> bool:
        """Whether no pixel falls between others."""
        return not (self.scale or self.angle or self.stretch or any(self.shift))


def draw(probability: float, generator: torch.Generator, invert: bool = False) -> Warp:
    """Draw a warp; each transformation is there with a probability, independently of the others.

    Args:
        probability: of each, A_prob of table 6.
        generator: all draws come from it, always as many.
        invert: flip upside down too.
    """
    chance = torch.rand(6, generator=generator).tolist()
    u = torch.rand(4, generator=generator).tolist()
    n = torch.randn(4, generator=generator).tolist()
    on = [value < probability for value in chance]
    return Warp(
        mirror=on[0] and u[0] < 0.5,
        invert=invert and on[1] and u[1] < 0.5,
        scale=n[0] if on[2] else 0.0,
        angle=math.pi * (2 * u[2] - 1) if on[3] else 0.0,
        stretch=abs(n[1]) if on[4] else 0.0,
        direction=math.pi * (2 * u[3] - 1) if on[4] else 0.0,
        shift=(n[2], n[3]) if on[5] else (0.0, 0.0),
    )


def warp(x: Tensor, how: Warp) -> Tensor:
    """Transform a picture.

    Args:
        x: (c, h, w), sides of 2 pixels or more.
        how: the transformations.
    Returns:
        A picture of the same size; x itself where there is nothing to do.
    """
    axes = [axis for axis, flips in ((-1, how.mirror), (-2, how.invert)) if flips]
    x = x.flip(axes) if axes else x
    return x if how.only_flips else resample(x, how)


def resample(x: Tensor, how: Warp) -> Tensor:
    """The part of a warp that is no flip, in float64; see the head of this module."""
    height, width = x.shape[1:]
    (up_y, down_y), (up_x, down_x) = _filters(height), _filters(width)
    places = _places(height, width)
    middle = places.new_tensor([(width - 1) / 2, (height - 1) / 2])
    shift = places.new_tensor([TRANSLATION * how.shift[0] * width, TRANSLATION * how.shift[1] * height])
    source = (places - shift) @ places.new_tensor(how.matrix()).T / middle
    fine = up_y @ x.double() @ up_x.T
    fine = F.grid_sample(fine[None], source[None], "bilinear", "reflection", align_corners=True)[0]
    return (down_y @ fine @ down_x.T).to(x.dtype)


@lru_cache(maxsize=8)
def _places(height: int, width: int) -> Tensor:
    """Places of the fine result, (2 h + 7, 2 w + 7, 2), as (x, y) in pixels from the middle."""
    y, x = (torch.arange(-EDGE, 2 * n - 1 + EDGE, dtype=torch.float64) / 2 - (n - 1) / 2 for n in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


@lru_cache(maxsize=16)
def _filters(n: int) -> tuple[Tensor, Tensor]:
    """Both filters along an axis of n pixels, as matrices: up (2 n - 1, n), mirrored at the edges, and down (n, 2 n + 7)."""
    up, down = torch.zeros(2 * n - 1, n, dtype=torch.float64), torch.zeros(n, 2 * n - 1 + 2 * EDGE, dtype=torch.float64)
    for pixel in range(-1, n + 1):
        for k in range(1 - len(UP), len(UP)):
            if 0 <= 2 * pixel + k < 2 * n - 1:
                inside = n - 1 - abs(n - 1 - abs(pixel))
                up[2 * pixel + k, inside] += UP[abs(k)]
    for pixel in range(n):
        for k in range(-EDGE, EDGE + 1):
            down[pixel, 2 * pixel + k + EDGE] = DOWN[abs(k)]
    return up, down
