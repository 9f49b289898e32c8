"""The problem that solvers are compared on: a Gaussian mixture with its exact denoiser, and the true end of its flow.

Along every path the probability flow is one flow in y = x/alpha and rho = sigma/alpha, dy/drho = (y - D(y, rho))/rho, where
D(y, rho) is the mean of the data given y = x0 + rho z. Each solver is given D in the form it wants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polydiff.core.schedules import as_time

F64 = torch.float64


class Mixture:
    """Gaussians with one isotropic deviation each, then standardised: zero mean, and unit variance of every coordinate.

    Args:
        d: dimensions. seed: of the mixture. components: how many.
    """

    def __init__(self, d: int, seed: int, components: int = 8) -> None:
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(components, d, generator=g, dtype=F64)
        deviations = (0.1 + 0.3 * torch.rand(components, 1, generator=g, dtype=F64)).expand(components, d)
        self.log_weights = torch.log_softmax(0.5 * torch.randn(components, generator=g, dtype=F64), 0)
        weights = self.log_weights.exp()
        means = means - weights @ means
        scale = (weights @ (means**2 + deviations**2)).sqrt()
        self.d, self.means, self.variances = d, means / scale, (deviations / scale) ** 2
        self._cache: dict[float, tuple[Tensor, ...]] = {}

    def draw(self, n: int, rho: float, seed: int) -> Tensor:
        """n points y = x0 + rho z, exactly distributed."""
        g = torch.Generator().manual_seed(seed)
        pick = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=g)
        x0 = self.means[pick] + self.variances[pick].sqrt() * torch.randn(n, self.d, generator=g, dtype=F64)
        return x0 + rho * torch.randn(n, self.d, generator=g, dtype=F64)

    def _at(self, rho: float) -> tuple[Tensor, ...]:
        if rho not in self._cache:
            total = self.variances + rho**2
            constant = self.log_weights - 0.5 * (self.means**2 / total + total.log()).sum(1)
            kept = self.variances / total
            parts = (-0.5 / total).T, (self.means / total).T, constant, self.means * (1 - kept), kept
            self._cache[rho] = tuple(part.contiguous() for part in parts)
        return self._cache[rho]

    def x0_hat(self, y: Tensor, rho: float) -> Tensor:
        """D(y, rho), float64 (n, d)."""
        square, linear, constant, offset, kept = self._at(rho)
        responsibility = torch.softmax(torch.addmm(constant, y, linear).addmm_(y * y, square), 1)
        return torch.addcmul(responsibility @ offset, responsibility @ kept, y)


@dataclass(frozen=True)
class Problem:
    """States at the first time of a path, and where the probability flow carries them.

    Args:
        name: in words. mixture: the data. process: the path. x: states at its t_max. truth: states at its t_min.
    """

    name: str
    mixture: Mixture
    process: Any
    x: Tensor
    truth: Tensor

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and rho = sigma/alpha at times."""
        alpha = self.process.schedule.alpha(times)
        return alpha, self.process.schedule.sigma(times) / alpha

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x0_hat(x_t, t) on the path."""
        alpha = float(self.process.schedule.alpha(t))
        return self.mixture.x0_hat(x_t / alpha, float(self.process.schedule.sigma(t)) / alpha)

    def error(self, x: Tensor) -> float:
        """Root mean square distance of every number from the true end; infinite where the solver failed."""
        value = float((x - self.truth).pow(2).mean().sqrt())
        return math.inf if math.isnan(value) else value


def true_end(mixture: Mixture, y: Tensor, start: float, end: float) -> Tensor:
    """Carry y from the level start to the level end, to 1e-12: the flow in the angle arctan(rho), by scipy's DOP853."""
    from scipy.integrate import solve_ivp

    def slope(angle: float, flat: np.ndarray) -> np.ndarray:
        rho, state = float(np.tan(angle)), torch.from_numpy(flat).reshape(y.shape) / np.cos(angle)
        x0 = mixture.x0_hat(state, rho)
        return (np.cos(angle) * (state - x0) / rho - np.sin(angle) * x0).flatten().numpy()

    first, last = float(np.arctan(start)), float(np.arctan(end))
    begin = (y * np.cos(first)).flatten().numpy()
    found = solve_ivp(slope, (first, last), begin, method="DOP853", rtol=1e-12, atol=1e-12, t_eval=(last,))
    if not found.success:
        raise RuntimeError(f"the true end was not found: {found.message}")
    return torch.from_numpy(found.y[:, -1].copy()).reshape(y.shape) / np.cos(last)


def make_problem(path: str, process: Any, mixture: Mixture, n: int, seed: int) -> Problem:
    """n exact states at the process's t_max and their true ends at its t_min."""
    times = as_time([process.t_max, process.t_min])
    alpha = process.schedule.alpha(times)
    rho = process.schedule.sigma(times) / alpha
    y = mixture.draw(n, float(rho[0]), seed)
    truth = alpha[1] * true_end(mixture, y, float(rho[0]), float(rho[1]))
    return Problem(f"{path}, {mixture.d}-D", mixture, process, alpha[0] * y, truth)
