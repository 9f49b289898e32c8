"""Exact mean and variance of what a stochastic solver samples from Gaussian data, without drawing anything.

With the exact denoiser of Gaussian data every step is affine in the state and in each draw of noise, so the response to a
unit start and to a unit of each draw, found by running the solver itself, gives both moments exactly.
"""

from __future__ import annotations

import torch

from polydiff.core.noise import Noise
from polydiff.core.sampling import sample


class Impulses(Noise):
    """Row 2 + j gets a one at draw j and all the others zero; rows 0 and 1 get no noise."""

    def __init__(self, rows: int) -> None:
        super().__init__(0, range(rows))
        self.draws = 0

    def draw(self, k, purpose, like, t=None, s=None, mask=None):
        z = torch.zeros_like(like)
        if 2 + self.draws < len(z):
            z[2 + self.draws] = 1
        self.draws += 1
        return z


def moments(solver, data, grid, mean, variance):
    """Mean and variance at the end of a grid, of states that start with the given ones; all shaped like ``data.mean``."""

    def run(rows):
        noise, x = Impulses(rows), torch.zeros(rows, len(data.mean), dtype=torch.float64)
        x[1] = 1
        return sample(data.x0_hat, data.process, x, solver, grid=grid, generator=noise), noise.draws

    draws = run(2)[1]
    out = run(2 + draws)[0]
    return out[0] + (out[1] - out[0]) * mean, (
        (out[1:] - out[0]) ** 2 * torch.cat([variance[None], torch.ones(draws, len(mean), dtype=torch.float64)])
    ).sum(0)


def start(data, t):
    """Mean and variance of the exact marginal at t."""
    alpha, _, total = data._marginal(t)
    return alpha * data.mean, total**2
