"""Denoisers and flows known in closed form, against which the numerics are tested; all float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polydiff.core.denoiser import Prediction


def _as_column(t, x: Tensor) -> Tensor:
    """Times () as they are; times (b,) shaped to broadcast against x (b, *dims)."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return t.reshape(t.shape + (1,) * (x.ndim - 1)) if t.ndim else t


class Gaussian:
    """Data N(mean, diag(std^2)): exact denoiser, density and probability flow on any path."""

    def __init__(self, process, std=(0.3, 1.0, 1.7), mean=(0.5, -1.0, 0.2)):
        self.process = process
        self.std, self.mean = torch.tensor(std, dtype=torch.float64), torch.tensor(mean, dtype=torch.float64)

    def _marginal(self, t):
        t = torch.as_tensor(t, dtype=torch.float64)
        alpha, sigma = self.process.schedule.alpha(t), self.process.schedule.sigma(t)
        return alpha, sigma, torch.sqrt((alpha * self.std) ** 2 + sigma**2)

    def x0_hat(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, _, total = self._marginal(_as_column(t, x_t))
        return self.mean + alpha * self.std**2 / total**2 * (x_t - alpha * self.mean)

    def log_prob(self, x_t: Tensor, t) -> Tensor:
        """Exact log density of states (b, d) at a time."""
        alpha, _, total = self._marginal(t)
        return torch.distributions.Normal(alpha * self.mean, total).log_prob(x_t).sum(-1)

    def flow(self, x_t: Tensor, t, s) -> Tensor:
        """Carry states along the probability flow: standard scores are constant."""
        alpha_t, _, total_t = self._marginal(t)
        alpha_s, _, total_s = self._marginal(s)
        return alpha_s * self.mean + total_s / total_t * (x_t - alpha_t * self.mean)

    def draw(self, t, n: int, seed: int = 0) -> Tensor:
        alpha, _, total = self._marginal(t)
        z = torch.randn(n, len(self.std), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return alpha * self.mean + total * z


class Mixture:
    """A mixture of isotropic Gaussians in d dimensions: exact denoiser on any path."""

    def __init__(self, process, d: int = 2, std: float = 0.35, seed: int = 0):
        self.process, self.std = process, std
        g = torch.Generator().manual_seed(seed)
        self.means = torch.randn(5, d, generator=g, dtype=torch.float64)
        self.log_weights = torch.log_softmax(torch.randn(5, generator=g, dtype=torch.float64), 0)

    def x0_hat(self, x_t: Tensor, t: Tensor) -> Tensor:
        t = _as_column(t, x_t[:, None])
        alpha, variance, offset = self._offset(x_t, t)
        weight = torch.softmax(self.log_weights[:, None] - 0.5 * (offset**2).sum(-1, keepdim=True) / variance, 1)
        return (weight * (self.means + alpha * self.std**2 / variance * offset)).sum(1)

    def log_prob(self, x_t: Tensor, t) -> Tensor:
        """Exact log density of states (b, d) at a time."""
        _, variance, offset = self._offset(x_t, torch.as_tensor(t, dtype=torch.float64))
        normal = -0.5 * ((offset**2).sum(-1) / variance + x_t.shape[1] * torch.log(2 * torch.pi * variance))
        return torch.logsumexp(self.log_weights + normal, 1)

    def _offset(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = self.process.schedule.alpha(t), self.process.schedule.sigma(t)
        return alpha, (alpha * self.std) ** 2 + sigma**2, x_t[:, None] - alpha * self.means

    def draw(self, t, n: int, seed: int = 0) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        g = torch.Generator().manual_seed(seed)
        pick = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=g)
        x0 = self.means[pick] + self.std * torch.randn(n, self.means.shape[1], generator=g, dtype=torch.float64)
        z = torch.randn(x0.shape, generator=g, dtype=torch.float64)
        return self.process.schedule.alpha(t) * x0 + self.process.schedule.sigma(t) * z


def as_field(data, field: str):
    """The exact denoiser of some data, given as any field of a Prediction."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = Prediction(data.process, x_t, t, x0=data.x0_hat(x_t, t))
        return Prediction(data.process, x_t, t, **{field: prediction.field(field)})

    return denoise


def slope(error, n: int, low: float = 1e-10, high: float = 1e-3, last: bool = False) -> float:
    """Order of accuracy: slope of log error over two doublings whose errors lie between two bounds.

    Args:
        error: function of the number of intervals.
        n: the smallest number of intervals to try.
        last: take the last two doublings inside the bounds instead of the first two (slower, up to 8,192 intervals).
    """
    found: list[tuple[int, float]] = []
    while n <= 8192:
        value = error(n)
        if value < low:
            break
        if value <= high:
            found.append((n, value))
        if len(found) == 3 and not last:
            break
        n *= 2
    assert len(found) >= 3, f"too few errors inside the window: {found}"
    (n0, e0), (n1, e1) = found[-3], found[-1]
    return math.log(e0 / e1) / math.log(n1 / n0)
