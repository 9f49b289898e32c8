"""Named solvers against the algorithms of their papers, written out once more, step by step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from polydiff.core.grids import make_grid
from polydiff.core.noise import Noise
from polydiff.core.processes import gaussian
from polydiff.core.sampling import sample
from polydiff.core.solvers import NAMES, Churn, Multistep, RungeKutta
from tests.numerics.exact import Mixture

F64 = torch.float64


def test_first_order_forms_are_ddim():
    """Order 1 in the x0, eps and flow forms is the same update."""
    data = Mixture(gaussian("vp"))
    x = data.draw(1.0, 5)
    results = [
        sample(data.x0_hat, data.process, x, Multistep(1, predict), steps=9) for predict in ("x0", "eps", "flow")
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-11, atol=1e-11)
    rk = sample(data.x0_hat, data.process, x, RungeKutta("euler", "eps"), steps=9)
    torch.testing.assert_close(rk, results[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", ["vp", "edm", "rectified_flow"])
def test_dpmpp_2m_equals_the_published_recursion(schedule):
    data = Mixture(gaussian(schedule))
    process, s = data.process, data.process.schedule
    grid = make_grid("log_snr", 7, process)
    x = data.draw(grid.times[0], 4)
    ours = sample(data.x0_hat, process, x, "dpmpp-2m", grid=grid)
    # Lu 2022, algorithm 2, with the usual last step to x0_hat
    t = torch.tensor(grid.times, dtype=F64)
    alpha, sigma, lam = s.alpha(t), s.sigma(t), s.log_snr(t)
    previous = None
    for i in range(len(t) - 1):
        denoised = data.x0_hat(x, t[i])
        h = lam[i + 1] - lam[i]
        combined = denoised
        if previous is not None:
            r = (lam[i] - lam[i - 1]) / h
            combined = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * previous
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * combined
        previous = denoised
    torch.testing.assert_close(ours, data.x0_hat(x, t[-1]), rtol=1e-10, atol=1e-10)


def test_heun_equals_algorithm_1_of_edm_and_edm_without_churn():
    data = Mixture(gaussian("edm"))
    grid = make_grid("karras", 8, data.process)
    x = data.draw(1.0, 4)
    ours = sample(data.x0_hat, data.process, x, "heun", grid=grid)
    sigmas = [*(float(data.process.schedule.sigma(torch.tensor(t, dtype=F64))) for t in grid.times), 0.0]
    times = [*grid.times, 0.0]
    reference = x
    for i in range(8):
        d = (reference - data.x0_hat(reference, torch.tensor(times[i], dtype=F64))) / sigmas[i]
        euler = reference + (sigmas[i + 1] - sigmas[i]) * d
        if sigmas[i + 1] > 0:
            d2 = (euler - data.x0_hat(euler, torch.tensor(times[i + 1], dtype=F64))) / sigmas[i + 1]
            euler = reference + (sigmas[i + 1] - sigmas[i]) * 0.5 * (d + d2)
        reference = euler
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    quiet = RungeKutta("heun", "eps", Churn(0.0))
    assert torch.equal(sample(data.x0_hat, data.process, x, quiet, grid=grid), ours)


def test_edm_equals_algorithm_2_of_edm():
    """With the same noise: gamma, S_noise and the range [S_min, S_max] as published, the last step included."""
    data, noise = Mixture(gaussian("edm")), Noise(3, range(4))
    n, s = 20, data.process.schedule
    grid = make_grid("karras", n, data.process)
    x = data.draw(1.0, 4)
    for churn in (Churn(), Churn(5.0, 0.1, 10.0, 1.02)):
        sigmas = [*(float(s.sigma(torch.tensor(t, dtype=F64))) for t in grid.times), 0.0]
        reference, raised = x, 0

        def slope_at(x_, sigma):
            return (x_ - data.x0_hat(x_, s.t_of_log_snr(-torch.log(torch.tensor(sigma, dtype=F64))))) / sigma

        for i in range(n):
            gamma = min(churn.amount / n, math.sqrt(2) - 1) if churn.low <= sigmas[i] <= churn.high else 0.0
            raised += gamma > 0
            hat = sigmas[i] * (1 + gamma)
            if gamma:
                z = noise.draw(i, "churn", x)
                reference = reference + math.sqrt(hat**2 - sigmas[i] ** 2) * churn.scale * z
            d = slope_at(reference, hat)
            euler = reference + (sigmas[i + 1] - hat) * d
            if sigmas[i + 1] > 0:
                euler = reference + (sigmas[i + 1] - hat) * 0.5 * (d + slope_at(euler, sigmas[i + 1]))
            reference = euler
        assert 3 < raised < n
        ours = sample(data.x0_hat, data.process, x, RungeKutta("heun", "eps", churn), grid=grid, generator=noise)
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    assert NAMES["edm"].solver == RungeKutta(
        "heun", "eps", Churn(40.0, 0.05, 50.0, 1.003)
    )  # Karras 2022, table 5, ImageNet-64


def test_ddim_with_noise_equals_its_equation_12():
    """DDIM's sigma(eta) of eq. 16, with the same noise."""
    data, noise, eta = Mixture(gaussian("vp")), Noise(5, range(3)), 0.6
    times = [0.8, 0.5, 0.3]
    x = data.draw(0.8, 3)
    ours = sample(
        data.x0_hat, data.process, x, Multistep(1, eta=eta, noise_form="ancestral"), grid=times, generator=noise
    )
    for k, (t, s) in enumerate(itertools.pairwise(torch.tensor(times, dtype=F64))):
        a_t, a_s = data.process.schedule.alpha(t) ** 2, data.process.schedule.alpha(s) ** 2
        x0 = data.x0_hat(x, t)
        eps = (x - a_t.sqrt() * x0) / (1 - a_t).sqrt()
        deviation = eta * ((1 - a_s) / (1 - a_t)).sqrt() * (1 - a_t / a_s).sqrt()
        x = a_s.sqrt() * x0 + (1 - a_s - deviation**2).sqrt() * eps + deviation * noise.draw(k, "step", x)
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_dpmpp_2m_sde_equals_the_published_recursion(eta):
    """Second order with noise, written with the factor exp(-eta^2 h) of a reverse SDE with eta times the noise."""
    data, noise = Mixture(gaussian("cosine")), Noise(7, range(3))
    grid = make_grid("log_snr", 6, data.process)
    s, x = data.process.schedule, data.draw(grid.times[0], 3)
    solver = Multistep(2, rule="midpoint", eta=eta)
    ours = sample(data.x0_hat, data.process, x, solver, grid=grid, generator=noise)
    if eta == 1:
        assert torch.equal(ours, sample(data.x0_hat, data.process, x, "dpmpp-2m-sde", grid=grid, generator=noise))
    t = torch.tensor(grid.times, dtype=F64)
    alpha, sigma, lam = s.alpha(t), s.sigma(t), s.log_snr(t)
    previous = None
    for i in range(len(t) - 1):
        x0, h = data.x0_hat(x, t[i]), lam[i + 1] - lam[i]
        combined = x0 if previous is None else x0 + 0.5 * h / (lam[i] - lam[i - 1]) * (x0 - previous)
        x = (
            sigma[i + 1] / sigma[i] * torch.exp(-(eta**2) * h) * x
            - alpha[i + 1] * torch.expm1(-(1 + eta**2) * h) * combined
            + sigma[i + 1] * torch.sqrt(-torch.expm1(-2 * eta**2 * h)) * noise.draw(i, "step", x)
        )
        previous = x0
    torch.testing.assert_close(ours, data.x0_hat(x, t[-1]), rtol=1e-9, atol=1e-9)


def test_ddpm_equals_the_posterior_of_the_discrete_chain():
    """One step: mean and deviation of q(x_s | x_t, x0), Ho 2020, eq. 6-7."""
    process = gaussian("vp")
    t, s = torch.tensor(0.5, dtype=F64), torch.tensor(0.4, dtype=F64)
    a_t, a_s = process.schedule.alpha(t) ** 2, process.schedule.alpha(s) ** 2
    beta = 1 - a_t / a_s
    x, x0 = torch.full((4000, 8), 0.7, dtype=F64), torch.full((4000, 8), -0.3, dtype=F64)
    out = sample(lambda *_: x0, process, x, "ddpm", grid=[0.5, 0.4], generator=0)
    mean = a_s.sqrt() * beta / (1 - a_t) * -0.3 + (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t) * 0.7
    variance = (1 - a_s) / (1 - a_t) * beta
    n = out.numel()
    assert abs(float(out.mean() - mean)) < 4.2 * float((variance / n).sqrt())
    assert abs(float(out.var() / variance) - 1) < 4.2 * math.sqrt(2 / n)
