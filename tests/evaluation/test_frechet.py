"""Frechet and kernel distances against closed forms and an independent program."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polydiff.core.errors import DataError
from polydiff.core.evaluation import frechet
from polydiff.core.evaluation.bootstrap import interval
from polydiff.core.evaluation.frechet import (
    KernelStatistic,
    Moments,
    cubic_kernel,
    energy_kernel,
    frechet_distance,
    kernel_distance,
    moments,
    symmetric_sqrt,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moments_match_numpy():
    x = normal(50, 7)
    fitted = moments(x.float())
    assert torch.allclose(fitted.cov, torch.cov(x.float().double().T), atol=1e-12)
    assert torch.allclose(fitted.mean, x.float().double().mean(0), atol=1e-12)


@pytest.mark.parametrize("rank", [20, 7, 1])
def test_square_root_squares_to_the_matrix(rank: int):
    factor = normal(20, rank)
    matrix = factor @ factor.T
    root = symmetric_sqrt(matrix)
    assert torch.allclose(root @ root, matrix, rtol=0, atol=1e-12 * float(matrix.trace()))
    assert torch.equal(root.isfinite(), torch.ones_like(root, dtype=torch.bool))
    assert torch.linalg.matrix_rank(root, rtol=1e-10) == rank


def test_closed_form_of_commuting_covariances():
    basis = torch.linalg.qr(normal(12, 12))[0]
    a, b = normal(12, seed=1).abs(), normal(12, seed=2).abs()
    mean_a, mean_b = normal(12, seed=3), normal(12, seed=4)
    one = Moments(mean_a, basis @ a.diag() @ basis.T, 100)
    two = Moments(mean_b, basis @ b.diag() @ basis.T, 100)
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(one, two) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("n", [200, 12])
def test_agrees_with_scipy(n: int):
    from scipy.linalg import sqrtm

    x, y = normal(200, 24) @ normal(24, 24, seed=5), 1.3 * normal(n, 24, seed=6) + 0.2
    a, b = moments(x), moments(y)
    cross = sqrtm(a.cov.numpy() @ b.cov.numpy()).real.trace()
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5 if n < 24 else 1e-9)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_rank_deficient_sets():
    """Fewer items than dimensions: 0 to itself, and the closed form for two sets on orthogonal subspaces."""
    x = normal(10, 64)
    assert frechet_distance(x, x) < 1e-10
    low, high = torch.zeros(30, 64), torch.zeros(30, 64)
    low[:, :8], high[:, 32:40] = normal(30, 8, seed=1), normal(30, 8, seed=2)
    a, b = moments(low), moments(high)
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_shift_and_scale():
    x = normal(300, 16)
    assert frechet_distance(x, x + 0.5) == pytest.approx(16 * 0.25, rel=1e-10)
    spread = float(moments(x).cov.trace())
    assert frechet_distance(x - x.mean(0), 2 * (x - x.mean(0))) == pytest.approx(spread, rel=1e-10)


@pytest.mark.parametrize("kernel", [cubic_kernel, energy_kernel])
def test_kernel_distance_against_loops(kernel):
    x, y = normal(9, 4), normal(7, 4, seed=1) + 0.3

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 4 + 1) ** 3) if kernel is cubic_kernel else -float((a - b).norm())

    within = [sum(k(a, b) for a in s for b in s if a is not b) for s in (list(x), list(y))]
    across = sum(k(a, b) for a in x for b in y) / 63
    assert kernel_distance(x, y, kernel) == pytest.approx(within[0] / 72 + within[1] / 42 - 2 * across, rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"subsets": 3, "size": 15}])
def test_kernel_distance_is_unbiased(options: dict[str, int]):
    """Mean over draws of one distribution is 0 within three standard errors; a shift of 0.3 is seen."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(n, 5, generator=generator)
    same = torch.tensor([kernel_distance(draw(20), draw(30), generator=generator, **options) for _ in range(600)])
    shifted = torch.tensor(
        [kernel_distance(draw(20) + 0.3, draw(30), generator=generator, **options) for _ in range(600)]
    )
    error = float(same.std()) / 600**0.5
    assert abs(float(same.mean())) < 3 * error
    assert float(shifted.mean()) > 6 * error


def test_energy_distance_is_cramers_in_one_dimension():
    """On a line the (biased) energy distance is 2 int (F - G)^2; the unbiased one differs by the known diagonal terms."""
    from scipy.stats import energy_distance

    x, y = normal(40, 1), normal(55, 1, seed=1) * 1.5 + 1
    means = [float(torch.cdist(s, s).mean()) for s in (x, y)]
    biased = energy_distance(x[:, 0], y[:, 0]) ** 2
    expected = biased + means[0] - means[0] * 40 / 39 + means[1] - means[1] * 55 / 54
    assert kernel_distance(x, y, energy_kernel) == pytest.approx(expected, rel=1e-9)


def test_resamples_leave_out_repetitions():
    """Over many resamples the mean is the estimate; counting repetitions as pairs would add k(x, x) / n to it."""
    x, y = normal(25, 6), normal(40, 6, seed=1)
    statistic = KernelStatistic(x, y)
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([statistic(torch.randint(25, (25,), generator=generator)) for _ in range(2000)])
    error = float(values.std()) / 2000**0.5
    assert abs(float(values.mean()) - kernel_distance(x, y)) < 4 * error
    bias = float(cubic_kernel(x, x).diagonal().mean()) / 25
    assert bias > 20 * error


def test_too_few_and_not_finite():
    with pytest.raises(DataError, match="at least 2"):
        moments(normal(1, 3))
    with pytest.raises(DataError, match="at least 2"):
        kernel_distance(normal(1, 3), normal(5, 3))
    x = normal(5, 3)
    x[3, 1] = torch.nan
    with pytest.raises(DataError, match="item 3 are not finite"):
        moments(x)


def test_the_interval_by_influence_is_that_of_the_bootstrap():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator)
    x, y = torch.randn(3000, 6, generator=generator) @ mix + 0.3, torch.randn(4000, 6, generator=generator)
    reference, value = frechet.moments(y), frechet.frechet_distance(x, y)
    low, high = frechet.frechet_interval(x, reference)
    expected = interval(lambda i: frechet.frechet_distance(x[i], reference), 3000, resamples=400, estimate=value)
    assert low < value < high
    assert high - low == pytest.approx(expected[1] - expected[0], rel=0.15)

    groups = (x.norm(dim=1) > x.norm(dim=1).median()).long()  # classes chosen, not drawn: their scatter is left out
    narrow = frechet.frechet_interval(x, reference, strata=groups)
    strata = interval(lambda i: frechet.frechet_distance(x[i], reference), 3000, resamples=400, strata=groups)
    assert narrow[1] - narrow[0] == pytest.approx(strata[1] - strata[0], rel=0.15)
    assert narrow[1] - narrow[0] < 0.97 * (high - low)


def test_blocks_change_no_number(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(70, 5, generator=generator), torch.randn(50, 5, generator=generator)
    index = torch.randint(70, (4, 70), generator=generator)
    whole = frechet.moments(x), frechet.KernelStatistic(x, y).many(index)
    monkeypatch.setattr(frechet, "BLOCK_ELEMENTS", 300)
    monkeypatch.setattr(frechet, "MOMENT_ROWS", 9)
    parts = frechet.moments(x), frechet.KernelStatistic(x, y).many(index)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(whole[0].cov, torch.from_numpy(np.cov(x.double().numpy(), rowvar=False)))
    kernel = lambda a, b: (a.double() @ b.double().T / 5 + 1) ** 3
    for row, value in zip(index, whole[1], strict=True):  # pairs of different originals only, as drawn
        pairs = kernel(x[row], x[row])[row[:, None] != row].mean()
        off = kernel(y, y)[~torch.eye(50, dtype=torch.bool)].mean()
        assert float(value) == pytest.approx(float(pairs + off - 2 * kernel(x[row], y).mean()), rel=1e-10)
    assert frechet.KernelStatistic(x, y)(index[1]) == pytest.approx(float(whole[1][1]), rel=1e-12)
    ends = interval(frechet.KernelStatistic(x, y), 70)
    assert ends == pytest.approx(interval(lambda i: frechet.KernelStatistic(x, y)(i), 70), rel=1e-10)


def test_the_interval_by_influence_is_that_of_the_jackknife():
    """Of skewed items with another mean, where both parts of the influence and the sign between them count."""
    x = torch.empty(400, 3, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    x = x @ normal(3, 3, seed=1)
    for shift in (-2.0, 2.0):
        reference = Moments(
            moments(x).mean + shift, torch.diag(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)), 100
        )
        left_out = torch.tensor([frechet_distance(torch.cat([x[:i], x[i + 1 :]]), reference) for i in range(400)])
        error = float((left_out - left_out.mean()).square().sum() * 399 / 400) ** 0.5
        low, high = frechet.frechet_interval(x, reference)
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.03)
