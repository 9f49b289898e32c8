"""Sliced Wasserstein distance: optimal transport on lines, where it is a sort."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def directions(dimensions: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Unit vectors (count, dimensions), float64: evenly spaced half a turn in the plane, else random on the sphere."""
    if dimensions == 2:
        angle = torch.arange(count, dtype=torch.float64) * (math.pi / count)
        return torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.randn(count, dimensions, dtype=torch.float64, generator=generator)
    return x / x.norm(dim=1, keepdim=True)


class SlicedStatistic:
    r"""Sliced 2-Wasserstein distance of resamples of x from a fixed y, the projections of both made once.

    .. math:: SW_2^2 = \frac{1}{L} \sum_l \int_0^1 (F_{x \cdot l}^{-1}(q) - F_{y \cdot l}^{-1}(q))^2 dq

    Quantile functions of finite sets are steps, so the integral is a finite sum, exact for any two counts.

    Args:
        x: (n, d), the set that is resampled; resamples keep the count.
        y: (m, d), the reference.
        lines: unit vectors (L, d).
    Source:
        Peyre & Cuturi 2019 (arXiv 1803.00567), eq. 2.36; Bonneel et al. 2015, "Sliced and Radon Wasserstein
        barycenters of measures", sec. 2.3.
    """

    def __init__(self, x: Tensor, y: Tensor, lines: Tensor) -> None:
        n, m = len(x), len(y)
        ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()  # of the steps, times n m
        self.width = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
        self.steps = (ends - 1) // m
        self.projections = x.double() @ lines.double().T
        self.target = (y.double() @ lines.double().T).sort(0).values[(ends - 1) // n]

    def __call__(self, index: Tensor) -> float:
        """Distance of the resample ``x[index]``, in units of x."""
        quantiles = self.projections[index].sort(0).values[self.steps]
        return float((self.width @ (quantiles - self.target).square()).mean().sqrt())


def sliced_wasserstein(x: Tensor, y: Tensor, lines: Tensor) -> float:
    """Sliced 2-Wasserstein distance between x (n, d) and y (m, d); see ``SlicedStatistic``.

    Between finite sets it is above 0 also for one distribution: compare at equal counts.
    """
    return SlicedStatistic(x, y, lines)(torch.arange(len(x)))
