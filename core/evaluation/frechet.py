"""Distances between two sets of features: Frechet (Gaussians fitted to both) and kernel (unbiased MMD)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from polydiff.core.errors import DataError

Kernel = Callable[[Tensor, Tensor], Tensor]
ROWS = 1024  # of a kernel matrix, computed at a time


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
    x = features.double()
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).any(1).nonzero()[0])
        raise DataError(f"the features of item {bad} are not finite: look at that sample")
    mean = x.mean(0)
    centred = x - mean
    return Moments(mean, centred.T @ centred / (len(x) - 1), len(x))


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
    """The kernel distance of resamples of x from a fixed y, each kernel value computed once.

    A resample draws items with repetition; pairs of one item with itself are left out, else every repetition would
    count as a pair of identical samples and bias the distance.

    Args:
        x: features (n, d) that are resampled; the (n, n) kernel matrix is kept, 8 n^2 bytes.
        y: features (m, d) of the reference; its matrices are reduced in blocks of rows.
        kernel: see ``kernel_distance``.
    """

    def __init__(self, x: Tensor, y: Tensor, kernel: Kernel = cubic_kernel) -> None:
        if min(len(x), len(y)) < 2:
            raise DataError(f"a kernel distance needs at least 2 items a side, got {len(x)} and {len(y)}")
        self.within = kernel(x, x).fill_diagonal_(0.0)
        self.across = torch.cat([kernel(part, y).mean(1) for part in x.split(ROWS)])
        total = sum(float(kernel(part, y).sum()) for part in y.split(ROWS))
        itself = sum(float(kernel(part, part).diagonal().sum()) for part in y.split(ROWS))
        self.reference = (total - itself) / (len(y) * (len(y) - 1))

    def __call__(self, index: Tensor) -> float:
        """Distance of the resample ``x[index]``."""
        weight = torch.bincount(index, minlength=len(self.within)).double()
        pairs = weight.sum() ** 2 - weight.square().sum()
        within = weight @ self.within @ weight / pairs
        return float(within + self.reference - 2 * (weight @ self.across) / weight.sum())
