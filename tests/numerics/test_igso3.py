"""IGSO(3) against its character series in 70 digits, the heat equation, quadrature and draws."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from polydiff.core import rotations
from polydiff.core.errors import ScheduleError
from polydiff.core.noise import Noise
from polydiff.core.processes.igso3 import (
    igso3_angle,
    igso3_cdf,
    igso3_log_density,
    igso3_score,
    igso3_tangent,
    igso3_tangent_score,
)

SIGMAS = (0.01, 0.05, 0.3, 0.7, 0.999, 1.0, 1.5, 2.5, 3.5)


def double(values):
    return torch.as_tensor(values, dtype=torch.float64)


def reference(angles, sigma: float, digits: int = 70):
    """(f, f'/f, F) at each angle from the character series, summed order by order to the given digits."""
    with mpmath.workdps(digits):
        square = mpmath.mpf(sigma) ** 2
        weights: list[mpmath.mpf] = []
        while not weights or weights[-1] > mpmath.mpf(10) ** -digits:
            order = len(weights)
            weights.append((2 * order + 1) * mpmath.exp(-order * (order + 1) * square / 2))
        results = []
        for angle in map(mpmath.mpf, angles):
            # e^{i m angle} by powers; the character of order l is the sum of 2 cos(m angle) up to l, less 1
            unit, power = mpmath.expj(angle), mpmath.mpc(1)
            character = value = weights[0]
            turn = slope = mpmath.mpf(0)
            below = angle - mpmath.sin(angle)
            for order, weight in enumerate(weights[1:], 1):
                power *= unit
                character, turn = character + 2 * power.real, turn - 2 * order * power.imag
                value, slope = value + weight * character, slope + weight * turn
                below += weight * (power.imag / order - (power * unit).imag / (order + 1))
            results.append((value, slope / value, below / mpmath.pi))
        return results


@pytest.mark.parametrize(
    ("sigma", "angle", "density", "slope"),
    [
        (0.5, 1.0, 5.84038524, -3.91524386),
        (0.5, 2.0, 0.0164963028, -7.82104631),
        (1.0, 1.0, 3.59345016, -0.91520531),
        (1.0, 2.0, 0.91514845, -1.81194360),
        (1.5, 1.0, 1.66518342, -0.33830969),
    ],
)
def test_values_in_print(sigma, angle, density, slope):
    assert float(igso3_log_density(angle, sigma).exp()) == pytest.approx(density, rel=5e-9)
    assert float(igso3_score(angle, sigma)) == pytest.approx(slope, rel=5e-9)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_density_slope_and_distribution_equal_the_series_in_high_precision(sigma):
    angles = [0.0, 1e-12, 1e-6, 1e-3, 0.0999, 1.0, 3.0, math.pi - 1e-4, math.pi, *(sigma * k for k in (0.5, 2, 6, 11))]
    angles = [angle for angle in angles if angle <= math.pi]
    ours = zip(igso3_log_density(double(angles), sigma), igso3_score(double(angles), sigma), strict=True)
    below = igso3_cdf(double(angles), sigma)
    for (log_f, score), cdf, (f, slope, exact) in zip(ours, below, reference(angles, sigma), strict=True):
        assert abs(float(cdf) - float(exact)) <= 1e-14
        if f > 1e-30:
            assert abs(float(log_f) - float(mpmath.log(f))) <= 1e-13 * max(1, abs(float(mpmath.log(f))))
            assert abs(float(score) - float(slope)) <= 1e-9 * max(1e-3, abs(float(slope)))


def test_tails_far_below_the_smallest_float_are_right():
    """exp(-49348) at sigma = 0.01: two images, of which the second is the first seen from the other side."""
    angle, sigma = double([2.0, 3.0, math.pi - 1e-3, math.pi]), 0.01
    other = 2 * math.pi - angle
    shift = torch.log1p(other / angle * torch.exp((angle**2 - other**2) / (2 * sigma**2)))
    constant = 0.5 * math.log(2 * math.pi) - 3 * math.log(sigma) + sigma**2 / 8
    closed = constant + torch.log(angle / torch.sin(angle / 2)) - angle**2 / (2 * sigma**2) + shift
    torch.testing.assert_close(igso3_log_density(angle, sigma), closed, rtol=1e-13, atol=0)
    flat = 1 / angle - angle / sigma**2 - 0.5 / torch.tan(angle / 2)
    torch.testing.assert_close(igso3_score(angle, sigma)[:2], flat[:2], rtol=1e-13, atol=0)
    assert abs(float(igso3_score(angle, sigma)[3])) < 1e-6


@pytest.mark.parametrize("sigma", [0.1, 0.6, 1.0, 1.7])
def test_it_solves_the_heat_equation(sigma):
    """d log f / d sigma^2 = (Laplacian of f) / 2f; the radial Laplacian is f'' + cot(angle/2) f'. Across sigma = 1 too."""
    angle, step = double([0.3, 1.0, 2.0, 3.0]), 1e-5
    variances = [math.sqrt(sigma**2 + sign * step * sigma**2) for sign in (1, -1)]
    rate = (igso3_log_density(angle, variances[0]) - igso3_log_density(angle, variances[1])) / (2 * step * sigma**2)
    score = igso3_score(angle, sigma)
    bend = (igso3_score(angle + step, sigma) - igso3_score(angle - step, sigma)) / (2 * step)
    torch.testing.assert_close(rate, 0.5 * (bend + score**2 + score / torch.tan(angle / 2)), rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("sigma", "mean"), [(0.5, 0.78954717), (1.0, 1.52120966), (1.5, 2.00653184), (50.0, 2.20741610)]
)
def test_mean_angle_and_total_probability(sigma, mean):
    angle = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    density = igso3_log_density(angle, sigma).exp() * (1 - torch.cos(angle)) / math.pi
    cdf = igso3_cdf(angle, sigma)
    assert float(torch.trapezoid(angle * density, angle)) == pytest.approx(mean, abs=2e-6)
    torch.testing.assert_close(torch.cumulative_trapezoid(density, angle), cdf[1:], rtol=0, atol=1e-6)
    assert float(cdf[0]) == 0.0 and float(cdf[-1]) == pytest.approx(1.0, abs=1e-14)


def test_the_two_expansions_meet_without_a_seam():
    angle = torch.linspace(0, math.pi, 50, dtype=torch.float64)
    for function in (igso3_log_density, igso3_score, igso3_cdf):
        torch.testing.assert_close(function(angle, 1 - 1e-14), function(angle, 1.0), rtol=2e-12, atol=1e-13)


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 0.8, 1.2, 2.5, 50.0])
def test_angle_inverts_the_distribution(sigma):
    ends = double([0.0, 1e-12, 1e-9, 1e-5, 1 - 1e-5, 1 - 1e-9, 1 - 1e-12, 1.0])
    p = torch.cat([ends, torch.linspace(0.001, 0.999, 200, dtype=torch.float64)])
    angle = igso3_angle(p, sigma)
    assert float(angle[0]) == 0.0
    torch.testing.assert_close(igso3_cdf(angle, sigma), p, rtol=0, atol=1e-14)


def test_tangents_keep_their_direction_and_are_sigma_z_while_small():
    z = Noise(0, range(3)).draw(0, "z", torch.empty(3, 200, 3, dtype=torch.float64))
    z[0, :7] = double([0.0, 1e-20, 1e-9, 1e-8, 1e-3, 3.0, 5.0])[:, None]
    z[1, :100] = (
        double([1.0, 0, 0]) * torch.logspace(-9, -7, 100, dtype=torch.float64)[:, None]
    )  # chances round below 0
    torch.testing.assert_close(igso3_tangent(z, 1e-4), 1e-4 * z, rtol=1e-6, atol=1e-10)
    sigma = double([[0.02], [0.7], [2.5]])
    tangent = igso3_tangent(z, sigma)
    torch.testing.assert_close(torch.linalg.cross(tangent, z, dim=-1), torch.zeros_like(z), rtol=0, atol=1e-14)
    assert bool(((tangent * z).sum(-1) >= 0).all()) and float(tangent.norm(dim=-1).max()) <= math.pi + 1e-12
    # the chance of a shorter vector is an incomplete gamma function
    chance = torch.special.gammainc(double(1.5), 0.5 * (z * z).sum(-1))
    torch.testing.assert_close(igso3_cdf(tangent.norm(dim=-1), sigma), chance, rtol=0, atol=1e-13)
    assert igso3_tangent(z.float(), sigma).dtype == torch.float32


def test_variances_of_successive_steps_add():
    """The heat-kernel semigroup, 0.5^2 + 1.2^2 = 1.3^2: a draw after a draw, through products of matrices."""
    from scipy.stats import kstest

    like = torch.empty(4, 1000, 3, dtype=torch.float64)
    steps = [igso3_tangent(Noise(7, range(4)).draw(k, "z", like), sigma) for k, sigma in enumerate((0.5, 1.2))]
    angle = rotations.angle(rotations.retract(rotations.exp(steps[0]), steps[1])).flatten()
    assert kstest(igso3_cdf(angle, 1.3).numpy(), "uniform").pvalue > 0.01
    assert kstest(igso3_cdf(angle, 1.2).numpy(), "uniform").pvalue < 1e-4


@pytest.mark.parametrize("sigma", [0.2, 0.9, 1.6])
def test_tangent_score_is_the_gradient_on_the_group(sigma):
    """Derivatives of log f(angle(R_0^T R Exp(s e))) at s = 0 along the three axes e of the body frame."""
    noise = Noise(3, range(2))
    omega = noise.draw(0, "omega", torch.empty(2, 5, 3, dtype=torch.float64))
    step, axes = 1e-5, torch.eye(3, dtype=torch.float64)
    r = rotations.exp(omega).unsqueeze(-3)
    ahead, behind = (igso3_log_density(rotations.angle(rotations.retract(r, s * axes)), sigma) for s in (step, -step))
    score = igso3_tangent_score(rotations.log(rotations.exp(omega)), sigma)
    torch.testing.assert_close(score, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


def test_tangent_score_at_the_ends_in_float32_and_by_item():
    zero = torch.zeros(2, 3)
    assert torch.equal(igso3_tangent_score(zero, 0.1), zero) and torch.equal(igso3_tangent_score(zero, 2.0), zero)
    omega = torch.tensor([[1e-12, 0.0, 0.0], [0.0, math.pi, 0.0]])  # float32(pi) is above pi
    score = igso3_tangent_score(omega, double([0.1, 0.5]))
    assert score.dtype == torch.float32 and abs(float(score[1, 1])) < 1e-6
    assert float(score[0, 0]) == pytest.approx(-1e-12 * (1 / 0.1**2 - 1 / 12), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: igso3_score(1.0, 0.0), "sigma must be positive and finite, not 0"),
        (lambda: igso3_cdf(1.0, double([0.5, -1.0])), r"not -1 at index \[1\]"),
        (lambda: igso3_tangent(torch.ones(3), math.inf), "not inf"),
        (lambda: igso3_log_density(double([[0.1, math.nan]]), 1.0), r"\[0, pi\], not nan at index \[0, 1\]"),
        (lambda: igso3_log_density(3.2, 1.0), r"an angle must lie in \[0, pi\], not 3.2"),
        (lambda: igso3_score(-0.1, 1.0), "not -0.1"),
        (lambda: igso3_tangent_score(double([4.0, 0, 0]), 1.0), "not 4"),
        (lambda: igso3_angle(1.1, 1.0), "a probability must lie in"),
        (lambda: igso3_tangent(torch.full((3,), math.inf), 1.0), "draws must be finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ScheduleError, match=message):
        call()
