"""Distances between two sets of features: Frechet (Gaussians fitted to both) and kernel (unbiased MMD)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from polydiff.core.errors import DataError

Kernel = Callable[[Tensor, Tensor], Tensor]
MOMENT_ROWS = 8192  # of features in float64 at a time
BLOCK_ELEMENTS = 4_000_000  # of a kernel matrix, computed at a time: 32 MB in float64


class Moments(NamedTuple):
    """Mean (d,) and covariance (d, d) of n features, float64."""

    mean: Tensor
    cov: Tensor
    n: int


def moments(features: Tensor) -> Moments:
    """Fit a Gaussian: mean and unbiased covariance (divided by n - 1).

    Args:
        features: (n, d), n >= 2; any float type, computed in float64.
    Raises:
        DataError: fewer than two rows, or a value that is not finite.
    """
    if len(features) < 2:
        raise DataError(f"a covariance needs at least 2 items, got {len(features)}: evaluate more samples")
    if not bool(features.isfinite().all()):
        bad = int((~features.isfinite()).any(1).nonzero()[0])
        raise DataError(f"the features of item {bad} are not finite: look at that sample")
    mean = features.mean(0, dtype=torch.float64)
    centred = (part.double() - mean for part in features.split(MOMENT_ROWS))
    cov = sum((part.T @ part for part in centred), torch.zeros((), dtype=torch.float64))
    return Moments(mean, cov / (len(features) - 1), len(features))


def symmetric_sqrt(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix (d, d), itself symmetric.

    Eigenvalues below d eps times the largest are round-off of a rank-deficient matrix and count as zero: their root
    would turn an error of 1e-16 into one of 1e-8.
    """
    values, vectors = torch.linalg.eigh(matrix)
    floor = len(values) * torch.finfo(matrix.dtype).eps * values.abs().max()
    roots = torch.where(values > floor, values, 0.0).sqrt()
    return (vectors * roots) @ vectors.T


def frechet_distance(a: Moments | Tensor, b: Moments | Tensor) -> float:
    r"""Squared 2-Wasserstein distance between the Gaussians fitted to two sets of features.

    .. math:: |\mu_a - \mu_b|^2 + \mathrm{tr}\, C_a + \mathrm{tr}\, C_b - 2\, \| C_a^{1/2} C_b^{1/2} \|_*

    The nuclear norm equals tr (C_a C_b)^{1/2} and needs no root of a non-symmetric matrix, so rank-deficient
    covariances are fine. Biased upwards by O(1/n): compare values only at equal n.

    Args:
        a, b: features (n, d), or their moments where one side is used again and again.
    Returns:
        The distance in squared units of the features, >= 0.
    Source:
        Dowson & Landau 1982; Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
    """
    a, b = (m if isinstance(m, Moments) else moments(m) for m in (a, b))
    cross = torch.linalg.svdvals(symmetric_sqrt(a.cov) @ symmetric_sqrt(b.cov)).sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet_interval(x: Tensor, reference: Moments, *, strata: Tensor | None = None) -> tuple[float, float]:
    r"""95 % interval of ``frechet_distance(x, reference)`` by its first-order influence, for d too large to resample.

    .. math:: I(x) = (x - \mu)^T (1 - T) (x - \mu) + 2 (\mu - \mu_r)^T (x - \mu), \quad
        T = C^{-1/2} (C^{1/2} C_r C^{1/2})^{1/2} C^{-1/2}

    with the mean mu and the covariance C of x, up to a constant: what one more item at x would add, times n. The
    distance is then asymptotically normal with standard deviation sd(I) / sqrt(n). The bias O(1/n) is not in it.

    Args:
        x: features (n, d), n > d.
        reference: moments of the other side, held fixed.
        strata: int64 (n,), classes of the items if they were chosen, not drawn: only the spread within them counts.
    Source:
        The derivative of the distance, whose T is the optimal map: Rippl, Munk & Sturm 2016, theorem 2.1.
    """
    own = moments(x)
    values, vectors = torch.linalg.eigh(own.cov)
    roots = values.clamp_min(len(values) * torch.finfo(values.dtype).eps * float(values.abs().max())).sqrt()
    root, inverse = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    curved = (
        torch.eye(len(values), dtype=values.dtype) - inverse @ symmetric_sqrt(root @ reference.cov @ root) @ inverse
    )
    parts = (part.double() - own.mean for part in x.split(MOMENT_ROWS))
    influence = torch.cat([((y @ curved) * y).sum(1) + 2 * y @ (own.mean - reference.mean) for y in parts])
    groups = torch.zeros(len(x), dtype=torch.int64) if strata is None else strata
    _, group, count = groups.unique(return_inverse=True, return_counts=True)
    sums = influence.new_zeros(len(count)).index_add_(0, group, influence)
    influence = influence - (sums / count)[group]
    value = frechet_distance(own, reference)
    reach = 1.96 * float(influence.square().mean().sqrt()) / len(x) ** 0.5
    return max(value - reach, 0.0), value + reach


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / d + 1)^3 for x (n, d), y (m, d) -> (n, m) float64; with it the kernel distance is the "KID"."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def energy_kernel(x: Tensor, y: Tensor) -> Tensor:
    """-|x - y| for x (n, d), y (m, d) -> (n, m) float64; with it the kernel distance is the energy distance."""
    return -torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


def kernel_distance(
    x: Tensor,
    y: Tensor,
    kernel: Kernel = cubic_kernel,
    *,
    subsets: int | None = None,
    size: int = 1000,
    generator: torch.Generator | None = None,
) -> float:
    r"""Squared maximum mean discrepancy, unbiased: its mean over draws of one distribution is 0.

    .. math:: \frac{\sum_{i \ne j} k(x_i, x_j)}{n(n-1)} + \frac{\sum_{i \ne j} k(y_i, y_j)}{m(m-1)}
        - \frac{2 \sum_{ij} k(x_i, y_j)}{nm}

    Args:
        x, y: features (n, d) and (m, d); n and m at least 2.
        kernel: (n, d), (m, d) -> (n, m), symmetric.
        subsets: None for the whole sets; else the mean over so many random subsets of both, for very large sets.
        size: items in a subset, at most n and m.
        generator: draws the subsets.
    Returns:
        The distance; it may be slightly negative.
    Raises:
        DataError: fewer than two items on a side.
    Source:
        Gretton et al. 2012, eq. 3; the cubic kernel: Binkowski et al. 2018 (arXiv 1801.01401), sec. 4;
        the energy distance as one: Sejdinovic et al. 2013 (arXiv 1207.6076), sec. 3.
    """
    if subsets is None:
        return KernelStatistic(x, y, kernel)(torch.arange(len(x)))
    size = min(size, len(x), len(y))
    values = []
    for _ in range(subsets):
        i = torch.randperm(len(x), generator=generator)[:size]
        j = torch.randperm(len(y), generator=generator)[:size]
        values.append(kernel_distance(x[i], y[j], kernel))
    return sum(values) / len(values)


class KernelStatistic:
    """The kernel distance of resamples of x from a fixed y; no matrix is kept, whatever the counts.

    A resample draws items with repetition; pairs of one item with itself are left out, else every repetition would
    count as a pair of identical samples and bias the distance.

    Args:
        x: features (n, d) that are resampled.
        y: features (m, d) of the reference.
        kernel: see ``kernel_distance``.
        reference: the mean kernel between different items of y, where another statistic of the same y has it already.
    """

    def __init__(self, x: Tensor, y: Tensor, kernel: Kernel = cubic_kernel, reference: float | None = None) -> None:
        if min(len(x), len(y)) < 2:
            raise DataError(f"a kernel distance needs at least 2 items a side, got {len(x)} and {len(y)}")
        self.x, self.kernel = x, kernel
        self.across = torch.cat([kernel(part, y).mean(1) for part in x.split(max(1, BLOCK_ELEMENTS // len(y)))])
        self.reference = float(self._pairs(y, torch.ones(1, len(y)))) if reference is None else reference

    def __call__(self, index: Tensor) -> float:
        """Distance of the resample ``x[index]``."""
        return float(self.many(index[None]))

    def many(self, indices: Tensor) -> Tensor:
        """Distances (r,) of the resamples ``x[index]`` for the rows of ``indices`` (r, n): each kernel value is made once."""
        weight = torch.stack([torch.bincount(index, minlength=len(self.x)) for index in indices])
        across = (weight.double() @ self.across) / weight.sum(1)
        return self._pairs(self.x, weight) + self.reference - 2 * across

    def _pairs(self, x: Tensor, weight: Tensor) -> Tensor:
        """Mean kernel between different items, drawn ``weight`` (r, n) times -> (r,); half of the matrix is enough."""
        weight = weight.double()
        total = weight.new_zeros(len(weight))
        rows = max(1, BLOCK_ELEMENTS // len(x))
        for start in range(0, len(x), rows):
            block = self.kernel(x[start : start + rows], x[start:])
            n = len(block)
            block[:, :n] = block[:, :n].tril(-1)  # pairs of the block with itself, each once
            total += ((weight[:, start : start + n] @ block) * weight[:, start:]).sum(1)
        return 2 * total / (weight.sum(1).square() - weight.square().sum(1))
