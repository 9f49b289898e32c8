"""A small classifier of real data, generic over vectors and arrays with 1 to 3 axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polydiff.core.errors import DataError

VERSION = 2  # raise it when a change changes features or what is kept with them: all of that is then made anew
MEASURED = 10_000  # items, evenly spaced, that tell the scale of the features
POSITIONS = 256  # of an item after the first convolution, about: it bounds what an item costs


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the classifier is built and trained.

    Args:
        label: name of the class condition it predicts.
        features: width of the penultimate layer, whose values are the features.
        channels: of the first convolution; doubled at every halving of the size, up to four times.
        steps: gradient steps, batch: items in each, lr: peak learning rate (one cycle), weight_decay: AdamW's.
        warp: sd of a random affine map near the identity (rotation, scale, shear), and shift: sd of a translation in
            elements along each axis; both only for data with axes.
        noise: sd of added noise in standard deviations of the data.
        mirror: turn half of the items round along the last axis; for data whose mirrored items are as real.
    """

    label: str = "label"
    features: int = 64
    channels: int = 32
    steps: int = 800
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 1e-2
    warp: float = 0.12
    shift: float = 0.5
    noise: float = 0.05
    mirror: bool = False

    @classmethod
    def suited(cls, shape: Sequence[int], **given: Any) -> Settings:
        """Settings for items of a shape: more steps for larger ones, in proportion to their side, up to eight times.

        Arrays of 64 positions and smaller ones get 800 steps, 28 x 28 get 2800. What a step costs is bounded: the first
        convolution leaves at most about ``POSITIONS``.

        Args:
            shape: of one item, (c,) or (c, *axes).
            given: settings that are given.
        """
        larger = math.sqrt(math.prod(shape[1:]) / 64)
        return cls(**{"steps": round(cls.steps * min(max(larger, 1.0), 8.0)), **given})


class FeatureClassifier(nn.Module):
    """A small classifier for vectors (b, c) or arrays (b, c, *axes) with 1 to 3 axes, all of one size.

    A first convolution brings large items down to about ``POSITIONS``; further ones halve every axis until none is
    longer than 4; a linear layer on all positions gives the features, a second one the logits. Vectors get two
    hidden layers instead.

    Args:
        shape: of one item, (c,) or (c, *axes).
        classes: number of classes.
        settings: widths.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor

    def __init__(self, shape: Sequence[int], classes: int, settings: Settings) -> None:
        super().__init__()
        c, *axes = shape
        if len(axes) > 3:
            raise DataError(f"a feature classifier takes items with up to 3 axes, got shape {tuple(shape)}")
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("scale", torch.ones(()))
        layers: list[nn.Module] = []
        width = settings.channels
        if axes:
            conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(axes) - 1]
            coarse = math.ceil((math.prod(axes) / POSITIONS) ** (1 / len(axes)) - 1e-9)
            coarse = max(1, min(coarse, min(axes)))
            layers += [conv(c, width, max(3, 2 * coarse - 1), coarse, max(1, coarse - 1))]
            layers += [nn.GroupNorm(8, width), nn.SiLU()]
            axes = [-(-a // coarse) for a in axes]
            while max(axes) > 4:
                wider = min(2 * width, 4 * settings.channels)
                stride = tuple(2 if a > 4 else 1 for a in axes)
                layers += [conv(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
                layers += [conv(width, wider, 3, stride, 1), nn.GroupNorm(8, wider), nn.SiLU()]
                axes, width = [-(-a // s) for a, s in zip(axes, stride, strict=True)], wider
            layers += [conv(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(), nn.Flatten()]
            width *= math.prod(axes)
        else:
            layers += [nn.Linear(c, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width), nn.SiLU()]
            width *= 4
        self.body = nn.Sequential(*layers, nn.Linear(width, settings.features))
        self.head = nn.Linear(settings.features, classes)

    def features(self, x: Tensor) -> Tensor:
        """Features (b, d) of normalised items (b, c, *axes), with unit variance on average over the training split."""
        return self.body((x - self.mean) / self.std) / self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, classes) of normalised items (b, c, *axes)."""
        return self.head(F.silu(self.body((x - self.mean) / self.std)))


@torch.no_grad()
def extract(model: FeatureClassifier, x: Tensor) -> Tensor:
    """Features (n, d) of normalised items (n, c, *axes), in batches."""
    return torch.cat([model.features(part) for part in x.split(512)])


@torch.no_grad()
def classify(model: FeatureClassifier, x: Tensor) -> Tensor:
    """Predicted class (n,) int64 of normalised items (n, c, *axes), in batches."""
    return torch.cat([model(part).argmax(1) for part in x.split(512)])


def train(x: Tensor, y: Tensor, *, classes: int, seed: int, settings: Settings) -> FeatureClassifier:
    """Train with AdamW and one learning-rate cycle; every draw comes from the seed.

    Args:
        x: normalised items (n, c, *axes).
        y: their classes (n,) int64, below ``classes``.
        classes: number of classes.
        seed: of initial weights, batches and augmentation.
        settings: of the network, its training and its augmentation.
    Returns:
        The classifier, in eval mode, its features scaled to unit variance on average over x.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FeatureClassifier(x.shape[1:], classes, settings)
    generator = torch.Generator().manual_seed(seed)
    model.mean.copy_(x.mean())
    model.std.copy_(x.std().clamp_min(1e-6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.steps)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(settings.steps):
        while len(order) < settings.batch:
            order = torch.cat([order, torch.randperm(len(x), generator=generator)])
        index, order = order[: settings.batch], order[settings.batch :]
        batch = _warp(x[index], settings, generator)
        batch = batch + settings.noise * model.std * torch.randn(batch.shape, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(batch), y[index]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    shown = x[:: -(-len(x) // MEASURED)]
    model.scale.copy_(extract(model, shown).var(0).mean().sqrt().clamp_min(1e-12))
    return model


def _warp(x: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """A random affine map of the axes for each item, mirrored or not; values beyond the border repeated."""
    axes = x.shape[2:]
    n = len(axes)
    if not n:
        return x
    if settings.mirror:
        turned = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(turned.view(-1, *[1] * (n + 1)), x.flip(-1), x)
    sd = torch.full((n, n + 1), settings.warp)
    sd[:, n] = 2 * settings.shift / torch.tensor(axes[::-1])  # the grid spans [-1, 1] and names the last axis first
    theta = torch.eye(n, n + 1) + sd * torch.randn(len(x), n, n + 1, generator=generator)
    if n > 1:
        return _resample(x, theta)
    flat = torch.eye(2, 3).repeat(len(x), 1, 1)
    flat[:, 0, 0], flat[:, 0, 2] = theta[:, 0, 0], theta[:, 0, 1]
    return _resample(x[:, :, None], flat)[:, :, 0]


def _resample(x: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
