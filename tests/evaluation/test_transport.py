"""Sliced Wasserstein distance against assignment, an independent program and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from polydiff.core.evaluation.transport import SlicedStatistic, directions, sliced_wasserstein


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_line_is_optimal_assignment():
    """Counts 4 and 6: repeat both to 12 and solve the assignment problem."""
    from scipy.optimize import linear_sum_assignment

    x, y = normal(4, 1), 2 * normal(6, 1, seed=1) + 1
    cost = (x.repeat_interleave(3, 0) - y.repeat_interleave(2, 0).T).square()
    rows, columns = linear_sum_assignment(cost)
    expected = math.sqrt(float(cost[rows, columns].mean()))
    assert sliced_wasserstein(x, y, torch.ones(1, 1)) == pytest.approx(expected, rel=1e-12)


def test_a_shift_moves_every_projection():
    """In d dimensions the mean square of a projected shift v is |v|^2 / d; evenly spaced lines are exact in the plane."""
    x, shift = normal(50, 2), torch.tensor([0.6, -0.8], dtype=torch.float64)
    assert sliced_wasserstein(x, x + shift, directions(2, 64)) == pytest.approx(math.sqrt(0.5), rel=1e-12)
    lines = directions(5, 20_000, torch.Generator().manual_seed(0))
    shift = torch.tensor([2.0, 0, 0, 0, 0], dtype=torch.float64)
    assert sliced_wasserstein(normal(3, 5), normal(3, 5) + shift, lines) == pytest.approx(2 / math.sqrt(5), rel=0.02)


def test_gaussians():
    """Isotropic Gaussians with sd 1 and 2: every projection is at distance 1."""
    x, y = normal(20_000, 2), 2 * normal(15_000, 2, seed=1)
    assert sliced_wasserstein(x, y, directions(2, 16)) == pytest.approx(1, rel=0.03)


def test_resamples():
    x, y, lines = normal(20, 2), normal(33, 2, seed=1), directions(2, 8)
    index = torch.randint(20, (20,), generator=torch.Generator().manual_seed(0))
    assert SlicedStatistic(x, y, lines)(index) == pytest.approx(sliced_wasserstein(x[index], y, lines), rel=1e-12)
    assert sliced_wasserstein(x, x.flip(0), lines) == 0.0
