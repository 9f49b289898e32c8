"""Toy distributions: samples and densities against closed forms, histograms and the entropy."""

import numpy as np
import pytest
from scipy import special, stats

from polydiff.data import toy2d

NAMES = [*toy2d.CURVES, "checkerboard"]


def draw(name: str, n: int = 20_000, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    return toy2d.sample(name, n, np.random.RandomState(seed))


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_mean_0_and_variance_1(name: str) -> None:
    x, label = draw(name)
    assert x.dtype == np.float32 and x.shape == (20_000, 2)
    error = 5 / np.sqrt(20_000)
    np.testing.assert_allclose(x.mean(0), 0, atol=error)
    assert x.var() == pytest.approx(1, abs=2 * error)
    counts = np.bincount(label)
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("name", toy2d.CURVES)
def test_the_density_integrates_to_1(name: str) -> None:
    """By the trapezoidal rule, which is exact to 1e-8 at this spacing: it is below the blur."""
    axis = np.linspace(-3, 3, 160)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    total = np.exp(toy2d.log_prob(name, grid)).sum() * (axis[1] - axis[0]) ** 2
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_the_density(name: str) -> None:
    """Chi-square of a histogram against the density averaged over each bin."""
    x, _ = draw(name)
    edges = np.linspace(-2.6, 2.6, 27)
    counts = np.histogram2d(x[:, 0], x[:, 1], [edges, edges])[0]
    fine = (edges[:-1, None] + np.diff(edges)[0] * (np.arange(8) + 0.5) / 8).ravel()
    points = np.stack(np.meshgrid(fine, fine, indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(toy2d.log_prob(name, points)).reshape(26, 8, 26, 8).mean((1, 3))
    expected = density * np.diff(edges)[0] ** 2 * len(x)
    often = expected > 8
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    if name == "checkerboard":  # its edges cut bins: the average over 64 points is only good to a few per cent there
        often &= np.isclose(expected, expected.max())
        statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert stats.chi2.sf(statistic, often.sum()) > 1e-4
    assert often.sum() > 40


def test_gaussians8_is_the_closed_form() -> None:
    angle = np.arange(8) * np.pi / 4
    scale = np.sqrt(0.5 + 0.1**2)
    means = np.stack([np.cos(angle), np.sin(angle)], -1) / scale
    points = np.random.RandomState(0).uniform(-3, 3, (500, 2))
    parts = [stats.multivariate_normal(mean, (0.1 / scale) ** 2).logpdf(points) for mean in means]
    expected = special.logsumexp(parts, axis=0) - np.log(8)
    np.testing.assert_allclose(toy2d.log_prob("gaussians8", points), expected, rtol=1e-10, atol=1e-10)


def test_rings_are_the_closed_form_with_a_bessel_function() -> None:
    """A blurred circle: p(x) = exp(-(r-R)^2 / 2 s^2) i0e(r R / s^2) / (2 pi s^2)."""
    noise, radii = 0.1, np.array([1.0, 2.0, 3.0])
    scale = np.sqrt((radii**2).mean() / 2 + noise**2)
    points = np.random.RandomState(0).uniform(-2, 2, (500, 2))
    r = scale * np.linalg.norm(points, axis=1)[:, None]
    parts = -((r - radii) ** 2) / (2 * noise**2) + np.log(special.i0e(r * radii / noise**2) / (2 * np.pi * noise**2))
    expected = special.logsumexp(parts, axis=1) - np.log(3) + 2 * np.log(scale)
    is_near = np.abs(r - radii).min(1) < 5 * noise
    np.testing.assert_allclose(toy2d.log_prob("rings", points)[is_near], expected[is_near], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["moons", "spiral"])
def test_the_quadrature_has_converged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points = draw(name, 200)[0]
    coarse = toy2d.log_prob(name, points)
    u, weights = np.polynomial.legendre.leggauss(2000)
    monkeypatch.setattr(toy2d, "_quadrature", lambda _: ((u + 1) / 2, weights / 2))
    np.testing.assert_allclose(coarse, toy2d.log_prob(name, points), rtol=1e-10, atol=1e-10)


def test_checkerboard_is_uniform_on_its_cells() -> None:
    x, label = draw("checkerboard")
    inside = np.log(toy2d.BOARD_SCALE**2 / 8)
    np.testing.assert_allclose(toy2d.log_prob("checkerboard", x), inside)
    corner = np.array([[-1.5, -0.5], [2.5, 0.5], [-1.5, -1.5]]) / toy2d.BOARD_SCALE
    np.testing.assert_array_equal(toy2d.log_prob("checkerboard", corner), [-np.inf, -np.inf, inside])
    np.testing.assert_array_equal(np.floor(x * toy2d.BOARD_SCALE), toy2d.CELLS[label])


def test_points_of_a_class_lie_on_its_curve() -> None:
    for name, toy in toy2d.CURVES.items():
        x, label = draw(name, 500)
        centre, scale = toy2d._moments(name)
        curves = toy.curves(np.linspace(0, 1, 2000))
        far = [np.linalg.norm(curves[k] - p, axis=1).min() for k, p in zip(label, centre + scale * x, strict=True)]
        assert max(far) < 5 * toy.noise, name


def test_a_seed_means_the_same_points_for_ever() -> None:
    np.testing.assert_allclose(draw("moons", 1, seed=0)[0], [[-1.089321, 1.009904]], atol=1e-5)
