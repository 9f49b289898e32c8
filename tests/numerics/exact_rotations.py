"""Distributions of rotations whose score, or velocity, is known in closed form; all float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polydiff.core import rotations
from polydiff.core.denoiser import Prediction
from polydiff.core.processes.igso3 import (
    igso3_angle,
    igso3_cdf,
    igso3_log_density,
    igso3_tangent,
    igso3_tangent_score,
)

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rotation(*shape: int, seed: int = 0) -> Tensor:
    """Uniform rotations (*shape, 3, 3)."""
    return rotations.from_quaternion(normal(*shape, 4, seed=seed))


def kolmogorov(probability: Tensor) -> float:
    """Kolmogorov-Smirnov distance of numbers from the uniform distribution on [0, 1]."""
    p, n = probability.flatten().sort().values, probability.numel()
    place = torch.arange(n, dtype=F64) / n
    return float(torch.maximum(p - place, place + 1 / n - p).max())


class Heat:
    """A mixture of IGSO(3) around ``centres`` (m, 3, 3) of one scale: Brownian motion adds sigma^2 to its square."""

    def __init__(self, process, centres: Tensor, scale: float, weights=None):
        self.process, self.centres, self.scale = process, centres.to(F64), scale
        weights = torch.ones(len(centres), dtype=F64) if weights is None else torch.tensor(weights, dtype=F64)
        self.weights = weights / weights.sum()

    def spread(self, t) -> float:
        """Scale at a time."""
        return math.hypot(self.scale, float(self.process.schedule.sigma(torch.as_tensor(t, dtype=F64))))

    def score(self, x_t: Tensor, t) -> Tensor:
        omega, spread = rotations.tangent(self.centres, x_t[..., None, :, :]), self.spread(t)
        log = igso3_log_density(omega.norm(dim=-1), spread) + self.weights.log()
        return (torch.softmax(log, -1)[..., None] * igso3_tangent_score(omega, spread)).sum(-2)

    def __call__(self, x_t: Tensor, t) -> Prediction:
        """The exact denoiser."""
        return Prediction(self.process, x_t, t, score=self.score(x_t, t))

    def flow(self, x_t: Tensor, t, s) -> Tensor:
        """Carry states along the probability flow around one centre: directions stay, and probabilities of angles."""
        omega = rotations.tangent(self.centres[0], x_t)
        angle = omega.norm(dim=-1, keepdim=True)
        moved = igso3_angle(igso3_cdf(angle, self.spread(t)), self.spread(s))
        return rotations.retract(self.centres[0].expand_as(x_t), moved / angle * omega)

    def draw(self, t, n: int, seed: int = 0) -> Tensor:
        """n states (n, 1, 3, 3) at a time."""
        pick = torch.multinomial(self.weights, n, replacement=True, generator=torch.Generator().manual_seed(seed))
        return rotations.retract(self.centres[pick], igso3_tangent(normal(n, 3, seed=seed), self.spread(t)))[:, None]


class Points:
    """Data at a few rotations under a geodesic flow: the exact velocity, the posterior mean of that to each point.

    A state at the tangent w from a point has the density h(w/sigma) / (sigma^3 h(w)) there, h(w) = (1 - cos w)/w^2, as long
    as |w| < pi sigma. Where errors of a solver have left all of these balls the nearest point counts.
    """

    def __init__(self, process, points: Tensor, weights):
        self.process, self.points, self.weights = process, points.to(F64), torch.tensor(weights, dtype=F64)

    def __call__(self, x_t: Tensor, t) -> Prediction:
        """The exact denoiser."""
        sigma, speed = (float(c(t)) for c in (self.process.schedule.sigma, self.process.schedule.dsigma))
        w = rotations.tangent(self.points, x_t[..., None, :, :])
        angle = w.norm(dim=-1).clamp_min(1e-12)
        density = (1 - torch.cos(angle / sigma)) / (1 - torch.cos(angle)) * (angle < math.pi * sigma) * self.weights
        total = density.sum(-1, keepdim=True)
        nearest = (angle == angle.amin(-1, keepdim=True)).to(F64)
        share = torch.where(total > 0, density / total.clamp_min(1e-300), nearest)
        return Prediction(self.process, x_t, t, velocity=speed / sigma * (share[..., None] * w).sum(-2))
