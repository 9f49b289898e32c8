"""Nearest-neighbour measures on features: precision, recall, density, coverage, and distance to the training data.

Every measure is a mean over items, and the functions return the value of each item: the caller takes the mean and
can bootstrap it. Distance matrices are made in blocks of rows, so 10,000 x 10,000 items need a few tens of megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from polydiff.core.errors import DataError

BLOCK_ELEMENTS = 4_000_000  # of one block of a distance matrix: 32 MB in float64
WIDE = 512  # dimensions from which neighbours are sought in float32, among which the float64 distances decide
WIDE_ELEMENTS = 32_000_000  # of one block then: 128 MB; a thin block would wait for the memory, not for the product
SPARE = 4  # candidates beyond the wanted ones
ROUND_OFF = 1e-5  # of squared distances from products of thousands of float32 numbers, times the lengths of both


def blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the Euclidean distance matrix between x (n, d) and y (m, d), float64, a block at a time.

    |x|^2 + |y|^2 - 2 x.y is several times faster than differences, and off by up to 1e-7 of the largest norm where
    the distance is near 0: what is below 1e-6 of it becomes 0, so that copies are at distance 0.
    """
    centre = y.double().mean(0)
    x, y = x.double() - centre, y.double() - centre
    floor = 1e-6 * max(float(x.norm(dim=1).max()), float(y.norm(dim=1).max()))
    rows = max(1, BLOCK_ELEMENTS // len(y))
    for start in range(0, len(x), rows):
        part = slice(start, min(start + rows, len(x)))
        distance = torch.cdist(x[part], y, compute_mode="use_mm_for_euclid_dist")
        yield part, distance.masked_fill_(distance < floor, 0.0)


def to_others(x: Tensor, k: int, rows: Tensor | None = None) -> Tensor:
    """Distances of items to their k nearest other items, ascending.

    Args:
        x: (n, d) with n > k. An item is not its own neighbour; its duplicates are.
        k: at least 1.
        rows: which items, int64 (r,); None for all, r = n.
    Returns:
        (r, k) float64.
    Raises:
        DataError: too few items for k.
    """
    if len(x) <= k:
        raise DataError(f"the {k}-th neighbour needs more than {k} items, got {len(x)}: evaluate more samples")
    rows = torch.arange(len(x)) if rows is None else rows
    if x.shape[1] >= WIDE:
        return _screened(x[rows], x, k, rows)[0]
    out = []
    for part, distance in blocks(x[rows], x):
        own = rows[part]
        distance[torch.arange(len(own)), own] = torch.inf
        out.append(distance.topk(k, dim=1, largest=False).values)
    return torch.cat(out)


class Manifold(NamedTuple):
    """Value of each item: precision and density (n_samples,), recall and coverage (n_reference,), float64."""

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def manifold(
    samples: Tensor, reference: Tensor, *, k: int = 3, k_density: int = 5, near: Tensor | None = None
) -> Manifold:
    r"""Precision, recall, density and coverage of samples against a reference, item by item.

    With B_k(z) the closed ball around z that reaches its k-th nearest neighbour in z's own set:

    - precision of a sample: it lies in B_k(r) of some reference item r;
    - recall of a reference item: it lies in B_k(s) of some sample s;
    - density of a sample: the number of B_k'(r) it lies in, over k' (its mean may exceed 1);
    - coverage of a reference item: some sample lies in its B_k'.

    Recall and coverage depend on the number of samples; compare them at equal counts.

    Args:
        samples: features (n, d), n > k.
        reference: features (m, d), m > k and m > k_density.
        k: neighbours for precision and recall; 3 is the source's.
        k_density: k', neighbours for density and coverage; 5 is the source's.
        near: ``to_others(reference, max(k, k_density))``, where it is known already.
    Source:
        Kynkaanniemi et al. 2019 (arXiv 1904.06991), eqs. 1-2; Naeem et al. 2020 (arXiv 2002.09797), section 3.
    """
    slack = 1 + 1e-9  # a ball holds the neighbour on its surface in spite of round-off
    near = (to_others(reference, max(k, k_density)) if near is None else near) * slack
    radius, radius_density = near[:, k - 1], near[:, k_density - 1]
    radius_samples = to_others(samples, k)[:, k - 1] * slack
    n, m = len(samples), len(reference)
    out = Manifold(*(radius.new_zeros(length) for length in (n, m, n, m)))
    for part, distance in blocks(samples, reference):
        inside = distance <= radius_density
        out.precision[part] = (distance <= radius).any(1).double()
        out.density[part] = inside.sum(1).double() / k_density
        out.recall.logical_or_((distance <= radius_samples[part, None]).any(0))
        out.coverage.logical_or_(inside.any(0))
    return out


def nearest(x: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (n,) float64 to the nearest of the training items, and its index (n,) int64; ties give the first.

    From 512 dimensions on, more than five exact ties give any of them.
    """
    if x.shape[1] >= WIDE:
        distance, index = _screened(x, train, 1)
        return distance[:, 0], index[:, 0]
    distances, indices = [], []
    for _, block in blocks(x, train):
        value, index = block.min(1)
        distances.append(value)
        indices.append(index)
    return torch.cat(distances), torch.cat(indices)


def _screened(
    x: Tensor, y: Tensor, k: int, own: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Distances (n, k) float64 to the k nearest of y and their indices, for many dimensions.

    |y - c|^2 - 2 (x - c).y in float32 is half the work of float64 and orders all but near ties rightly; among the k + 4
    best the true distances decide. Where the last of these is no farther than round-off from the k-th, one that was left
    out may be nearer: such rows are sought again in float64. y is never copied: it may be gigabytes.

    Args:
        x, y: (n, d) and (m, d).
        k: how many.
        own: index in y of each x, which then is no neighbour of itself.
        dtype: of the search.
    """
    y = y.float()
    centre, wanted = y.mean(0), min(len(y), k + SPARE + (own is not None))
    norms = torch.cat([(part.to(dtype) - centre).square().sum(1) for part in y.split(4096)])
    longest = float(norms.max().sqrt() + centre.norm())  # at least as long as any y
    rows = max(1, WIDE_ELEMENTS // len(y))
    distances, indices = [], []
    for start in range(0, len(x), rows):
        part = x[start : start + rows].float()
        offset = part.to(dtype) - centre
        pieces = zip(norms.split(4096), y.split(4096), strict=True) if dtype == torch.float64 else [(norms, y)]
        scores = torch.cat([torch.addmm(norm, offset, piece.to(dtype).T, alpha=-2) for norm, piece in pieces], 1)
        near = scores.topk(wanted, 1, largest=False).indices.sort(1).values
        exact = torch.stack([(part.double() - y[column].double()).norm(dim=1) for column in near.T], 1)
        if own is not None:
            exact[near == own[start : start + rows, None]] = torch.inf
        best = exact.sort(dim=1, stable=True)
        index = near.gather(1, best.indices)[:, :k]
        last = best.values[:, -1 if own is None else -2]  # of the finite ones
        doubt = last.square() - best.values[:, k - 1].square() <= ROUND_OFF * longest * (offset.norm(dim=1) + longest)
        doubt &= (best.values[:, k - 1] > 0) & (wanted < len(y))
        if dtype == torch.float32 and bool(doubt.any()):
            again = doubt.nonzero()[:, 0]
            itself = None if own is None else own[start + again]
            best.values[again, :k], index[again] = _screened(part[again], y, k, itself, torch.float64)
        distances.append(best.values[:, :k])
        indices.append(index)
    return torch.cat(distances), torch.cat(indices)
