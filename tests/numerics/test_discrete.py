"""Discrete chains as schedules: exact at the chain's own times, monotone and smooth between, usable like any schedule."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from polydiff.core.discrete import Discrete
from polydiff.core.errors import ConfigError, ScheduleError
from polydiff.core.grids import make_grid
from polydiff.core.noise import Noise
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.sampling import sample
from polydiff.core.schedules import VP
from tests.numerics.exact import Gaussian

F64 = torch.float64
CHAINS = {
    "linear": Discrete(),
    "scaled_linear": Discrete("scaled_linear", 0.00085, 0.012),
    "cosine": Discrete("cosine"),
    "zero_terminal": Discrete(zero_terminal=True),
    "cosine, zero_terminal": Discrete("cosine", zero_terminal=True),
    "short": Discrete(length=7),
    "uneven": Discrete(alphas_cumprod=(0.99, 0.98, 0.3, 0.29, 0.001)),
}


def _betas(name: str, n: int = 1000) -> list[mpmath.mpf]:
    """The betas of the papers, in 40 digits."""
    if name == "linear":
        return [mpmath.mpf("1e-4") + (mpmath.mpf("0.02") - mpmath.mpf("1e-4")) * i / (n - 1) for i in range(n)]
    if name == "scaled_linear":
        low, high = mpmath.sqrt(mpmath.mpf("0.00085")), mpmath.sqrt(mpmath.mpf("0.012"))
        return [(low + (high - low) * i / (n - 1)) ** 2 for i in range(n)]
    level = [
        mpmath.cos((mpmath.mpf(i) / n + mpmath.mpf("0.008")) / mpmath.mpf("1.008") * mpmath.pi / 2) ** 2
        for i in range(n + 1)
    ]
    return [min(1 - level[i + 1] / level[i], mpmath.mpf("0.999")) for i in range(n)]


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_alpha_and_sigma_are_exact_at_the_times_of_the_chain(name):
    mpmath.mp.dps = 40
    chain, product = CHAINS[name], mpmath.mpf(1)
    for i, beta in enumerate(_betas(name)):
        product *= 1 - beta
        if i in (0, 1, 2, 57, 500, 998, 999):
            t = torch.tensor((i + 1) / 1000, dtype=F64)
            assert float(chain.alpha(t)) == pytest.approx(float(mpmath.sqrt(product)), rel=1e-11)
            assert float(chain.sigma(t)) == pytest.approx(float(mpmath.sqrt(1 - product)), rel=1e-11)


@pytest.mark.parametrize("name", CHAINS)
def test_the_log_snr_decreases_and_its_inverse_gives_t_back(name):
    chain = CHAINS[name]
    t = torch.linspace(1e-4, 1, 20011, dtype=F64)
    log_snr = chain.log_snr(t)
    assert bool((log_snr.diff() < 0).all())
    torch.testing.assert_close(chain.t_of_log_snr(log_snr), t, rtol=1e-10, atol=0)
    torch.testing.assert_close(chain.t_of_log_snr(log_snr[:6].reshape(2, 3)), t[:6].reshape(2, 3), rtol=1e-10, atol=0)
    torch.testing.assert_close(chain.alpha(t) ** 2 + chain.sigma(t) ** 2, torch.ones_like(t), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", CHAINS)
def test_derivatives_are_those_of_the_interpolant_and_continuous(name):
    chain = CHAINS[name]
    nodes = torch.arange(1, chain.length, dtype=F64) / chain.length
    inside = nodes - 0.37 / chain.length
    for function, derivative in ((chain.alpha, chain.dalpha), (chain.sigma, chain.dsigma)):
        h = 1e-5 / chain.length
        slope = (function(inside + h) - function(inside - h)) / (2 * h)
        torch.testing.assert_close(derivative(inside), slope, rtol=1e-4, atol=1e-5)
        left, right = derivative(nodes - 1e-9 / chain.length), derivative(nodes + 1e-9 / chain.length)
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_diffusion_follows_from_alpha_and_sigma(zero_terminal):
    """g2 = 2 sigma sigma' - 2 (alpha'/alpha) sigma^2, which the class writes without cancellation."""
    schedule = Discrete(length=40, zero_terminal=zero_terminal)
    t = torch.linspace(0.03, 0.97, 57, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    plain = 2 * sigma * schedule.dsigma(t) - 2 * schedule.dalpha(t) / alpha * sigma**2
    torch.testing.assert_close(schedule.g2(t), plain, rtol=1e-9, atol=1e-9)


def test_slopes_at_the_indices_are_exact_for_a_quartic():
    """Differences of fourth order, one-sided at both ends, see 1 - alpha = a polynomial of degree four as it is."""
    n, c = 12, (0.9, 0.6, -0.5, 0.3)
    t = torch.arange(n + 1, dtype=torch.float64) / n
    gamma = 0.6 * sum(a * t ** (k + 1) for k, a in enumerate(c))
    slope = 0.6 * sum((k + 1) * a * t**k for k, a in enumerate(c))
    schedule = Discrete(alphas_cumprod=tuple(((1 - gamma[1:]) ** 2).tolist()))
    torch.testing.assert_close(schedule.dalpha(t), -slope, rtol=1e-9, atol=1e-9)


def test_a_long_chain_with_linear_betas_is_vp():
    """beta(t) = N beta_i with 0.1 = 1000 x 1e-4 and 20 = 1000 x 0.02, the finer the closer."""
    t, vp = torch.linspace(0.01, 1, 50, dtype=F64), VP()
    gaps = []
    for n in (1000, 4000):
        chain = Discrete(beta_start=0.1 / n, beta_end=20 / n, length=n)
        gaps.append(float((chain.log_snr(t) - vp.log_snr(t)).abs().max()))
    assert gaps[0] < 0.06 and gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_zero_terminal_keeps_the_first_alpha_and_ends_at_exactly_none(betas):
    chain, plain = Discrete(betas, zero_terminal=True), Discrete(betas)
    t = (torch.arange(1000, dtype=F64) + 1) / 1000
    assert float(chain.alpha(t[-1])) == 0.0 and float(chain.log_snr(t[-1])) == -math.inf
    assert float(chain.alpha(t[0])) == pytest.approx(float(plain.alpha(t[0])), rel=1e-13)
    # Lin 2024, algorithm 1: shift the roots so that the last is 0, scale them so that the first is kept
    roots = plain.alpha(t)
    expected = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    torch.testing.assert_close(chain.alpha(t), expected, rtol=0, atol=1e-13)


def test_the_given_products_are_the_chain():
    given = (1 - torch.linspace(1e-4, 0.02, 50, dtype=F64)).cumprod(0)
    chain = Discrete(alphas_cumprod=tuple(given.tolist()))
    assert chain == Discrete(alphas_cumprod=tuple(given.tolist())) and hash(chain) == hash(chain)
    assert chain.length == 50 and chain.t_min == 0.02 and chain.t_max == 1.0
    t = (torch.arange(50, dtype=F64) + 1) / 50
    torch.testing.assert_close(chain.alpha(t) ** 2, given, rtol=1e-12, atol=0)
    torch.testing.assert_close(chain.alpha(t), Discrete(length=50).alpha(t), rtol=1e-12, atol=0)


def test_the_grids_of_chains_stand_at_its_indices():
    process = GaussianProcess(Discrete(length=100))
    for name, expected in (
        ("ddpm-leading", [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]),
        ("ddpm-trailing", [99, 89, 79, 69, 59, 49, 39, 29, 19, 9]),
        ("ddpm-linspace", [99, 88, 77, 66, 55, 44, 33, 22, 11, 0]),
    ):
        index = torch.tensor(make_grid(name, 10, process).times, dtype=F64) * 100 - 1
        torch.testing.assert_close(index, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-10)
    with pytest.raises(ScheduleError, match="chain of 100 has no more"):
        make_grid("ddpm-linspace", 101, process)


def test_sampling_from_no_signal_at_all():
    """Zero-terminal chain, trailing grid: the first step starts at alpha = 0, where the denoiser knows the mean alone."""
    data = Gaussian(GaussianProcess(Discrete(zero_terminal=True)), std=(0.5,), mean=(3.0,))
    noise = Noise(3, range(4000))
    x = data.process.prior(torch.zeros(4000, 1, dtype=F64), noise)
    assert float(x.std()) == pytest.approx(1, abs=0.05)
    out = sample(data.x0_hat, data.process, x, "dpmpp-2m", steps=50, grid="ddpm-trailing")
    assert float(out.mean()) == pytest.approx(3, abs=0.03) and float(out.std()) == pytest.approx(0.5, rel=0.03)
    exact = data.mean + 0.5 * x  # standard scores are constant along the flow
    assert float((out - exact).abs().max()) < 0.05


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Discrete("cosin"), "cosine"),
        (lambda: Discrete(beta_end=1.0), "beta_start <= beta_end"),
        (lambda: Discrete(beta_start=0.1), "beta_start <= beta_end"),
        (lambda: Discrete(length=3), "chain of 3 steps"),
        (lambda: Discrete(alphas_cumprod=(0.9, 0.8, 0.8, 0.1)), "index 2"),
        (lambda: Discrete(alphas_cumprod=(0.9, 0.8, 0.7, -0.1)), "index 3"),
        (lambda: Discrete(alphas_cumprod=(1.0, 0.8, 0.7, 0.1)), "index 0"),
        (lambda: Discrete(alphas_cumprod=(0.9, math.nan, 0.7, 0.1)), "index 1"),
        (lambda: gaussian("discrete", betas=1), "process.betas = 1 must be a name"),
        (lambda: gaussian("discrete", zero_terminal=1.0), "process.zero_terminal = 1.0 must be true or false"),
        (lambda: gaussian("discrete", beta_end="0.02"), "process.beta_end = '0.02' must be a number"),
        (lambda: gaussian("vp", beta_min=True), "process.beta_min = True must be a number"),
    ],
)
def test_impossible_chains_are_refused(make, message):
    with pytest.raises((ConfigError, ScheduleError), match=message):
        make()


def test_a_configuration_names_the_chain():
    process = gaussian("discrete", betas="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert process.schedule == CHAINS["scaled_linear"]
    assert gaussian("discrete", zero_terminal=True).schedule == CHAINS["zero_terminal"]


def test_a_chain_is_welcome_in_whatever_holds_it():
    numbers = [float(a) for a in torch.linspace(0.99, 0.01, 20, dtype=torch.float64)]
    expected = Discrete(alphas_cumprod=tuple(numbers))
    for table in (numbers, np.array(numbers), torch.tensor(numbers, dtype=torch.float64)):
        assert Discrete(alphas_cumprod=table) == expected and hash(Discrete(alphas_cumprod=table)) == hash(expected)
        assert gaussian("discrete", alphas_cumprod=table) == GaussianProcess(expected)
    bad: tuple[Any, ...] = (5, "ab", [[0.9, 0.1]], ["a"] * 5, True)
    for table in bad:
        with pytest.raises(ScheduleError, match="alphas_cumprod must be one row of numbers"):
            gaussian("discrete", alphas_cumprod=table)
