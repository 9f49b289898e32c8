"""Multistep and single-step methods with published names against their algorithms, written out step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polydiff.core.grids import make_grid
from polydiff.core.noise import Noise
from polydiff.core.processes import gaussian
from polydiff.core.sampling import sample
from polydiff.core.solvers import Multistep
from tests.numerics.exact import Mixture

F64 = torch.float64


def _values(process, grid):
    t = torch.tensor(grid.times, dtype=F64)
    s = process.schedule
    return t, s.alpha(t), s.sigma(t), s.log_snr(t)


@pytest.mark.parametrize("schedule", ["vp", "edm"])
def test_dpmpp_3m_equals_the_published_recursion(schedule):
    """Third order by divided differences D1, D2 of x0_hat in log-SNR; its second step is the second-order one."""
    data = Mixture(gaussian(schedule))
    grid = make_grid("log_snr", 8, data.process)
    x = start = data.draw(grid.times[0], 4)
    t, alpha, sigma, lam = _values(data.process, grid)
    seen: list[Any] = []
    for i in range(len(t) - 1):
        seen.insert(0, data.x0_hat(x, t[i]))
        h = lam[i + 1] - lam[i]
        e = torch.expm1(-h)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * e * seen[0]
        if i >= 1:
            r0 = (lam[i] - lam[i - 1]) / h
            first = (seen[0] - seen[1]) / r0
        if i == 1:
            x = x - alpha[i + 1] * e * 0.5 * first
        if i >= 2:
            r1 = (lam[i - 1] - lam[i - 2]) / h
            second = (seen[1] - seen[2]) / r1
            d1 = first + r0 / (r0 + r1) * (first - second)
            d2 = (first - second) / (r0 + r1)
            x = x + alpha[i + 1] * (e / h + 1) * d1 - alpha[i + 1] * ((e + h) / h**2 - 0.5) * d2
    ours = sample(data.x0_hat, data.process, start, "dpmpp-3m", grid=grid)
    torch.testing.assert_close(ours, data.x0_hat(x, t[-1]), rtol=1e-9, atol=1e-9)


def test_blend_is_the_share_of_the_tangent():
    """Through three predictions: 0 keeps the parabola, 1 takes its tangent at the newest, and between both is linear."""
    data = Mixture(gaussian("vp"))
    grid = make_grid("log_snr", 3, data.process, 0.9, 0.05, final=False)
    x = start = data.draw(0.9, 3)
    t, alpha, sigma, lam = _values(data.process, grid)
    ends = {}
    for blend in (0.0, 0.25, 1.0):
        ends[blend] = sample(data.x0_hat, data.process, start, Multistep(3, blend=blend), grid=grid)
    torch.testing.assert_close(ends[0.25], 0.75 * ends[0.0] + 0.25 * ends[1.0], rtol=1e-10, atol=1e-10)
    seen: list[Any] = []
    for i in range(3):
        seen.insert(0, data.x0_hat(x, t[i]))
        h, slope = lam[i + 1] - lam[i], torch.zeros(())
        if i == 1:
            slope = (seen[0] - seen[1]) / (lam[1] - lam[0])
        if i == 2:
            near, far = (seen[0] - seen[1]) / (lam[2] - lam[1]), (seen[1] - seen[2]) / (lam[1] - lam[0])
            slope = near + (near - far) * (lam[2] - lam[1]) / (lam[2] - lam[0])
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * seen[0]
        x = x + alpha[i + 1] * (h + torch.expm1(-h)) * slope
    torch.testing.assert_close(ends[1.0], x, rtol=1e-9, atol=1e-9)


def test_dpmpp_3m_sde_equals_the_published_recursion():
    """With noise: the same differences under the weight exp(2h) of eta = 1, the two-point step by its exact integral."""
    data, noise = Mixture(gaussian("edm")), Noise(5, range(3))
    grid = make_grid("karras", 8, data.process)
    x = start = data.draw(grid.times[0], 3)
    t, _, sigma, lam = _values(data.process, grid)
    seen: list[Any] = []
    for i in range(len(t) - 1):
        seen.insert(0, data.x0_hat(x, t[i]))
        h = lam[i + 1] - lam[i]
        z = noise.draw(i, "step", x)
        x = torch.exp(-2 * h) * x - torch.expm1(-2 * h) * seen[0]
        phi_2 = torch.expm1(-2 * h) / (2 * h) + 1
        phi_3 = phi_2 / (2 * h) - 0.5
        if i == 1:
            x = x + phi_2 * (seen[0] - seen[1]) / ((lam[1] - lam[0]) / h)
        if i >= 2:
            r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
            first, second = (seen[0] - seen[1]) / r0, (seen[1] - seen[2]) / r1
            x = x + phi_2 * (first + (first - second) * r0 / (r0 + r1)) - phi_3 * (first - second) / (r0 + r1)
        x = x + sigma[i + 1] * torch.sqrt(-torch.expm1(-2 * h)) * z
    ours = sample(data.x0_hat, data.process, start, "dpmpp-3m-sde", grid=grid, generator=noise)
    torch.testing.assert_close(ours, data.x0_hat(x, t[-1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "solver,order,kind",
    [("unipc", 2, "bh2"), ("unipc-3", 3, "bh2"), (Multistep(2, corrector="bh1"), 2, "bh1")],
)
def test_unipc_equals_its_linear_systems(solver, order, kind):
    """Zhao 2023, algorithms 1 and 2 for x0_hat: rho from R rho = b, and 1/2 where it stands alone."""
    data = Mixture(gaussian("vp"))
    grid = make_grid("log_snr", 8, data.process)
    x = start = data.draw(grid.times[0], 3)
    t, alpha, sigma, lam = _values(data.process, grid)

    def update(base, places, ahead, i):
        """From time i to i + 1 through x0_hat at the places, and at the end where it is known."""
        h = lam[i + 1] - lam[i]
        size = -h if kind == "bh1" else torch.expm1(-h)
        ratios = [(lam[j] - lam[i]) / h for j in places[1:]]
        differences = [(seen[j] - seen[i]) / r for j, r in zip(places[1:], ratios, strict=True)]
        if ahead is not None:
            ratios.append(torch.ones((), dtype=F64))
            differences.append(ahead - seen[i])
        out = sigma[i + 1] / sigma[i] * base - alpha[i + 1] * torch.expm1(-h) * seen[i]
        phi, factorial, b = torch.expm1(-h) / -h - 1, 1, []
        for n in range(1, len(ratios) + 1):
            b.append(phi * factorial / size)
            factorial *= n + 1
            phi = phi / -h - 1 / factorial
        if len(ratios) == 1:
            rho = [0.5]
        elif ratios:
            rho = torch.linalg.solve(
                torch.stack([torch.stack(ratios) ** n for n in range(len(ratios))]), torch.stack(b)
            )
        else:
            rho = []
        return out - alpha[i + 1] * size * sum((a * d for a, d in zip(rho, differences, strict=True)), torch.zeros(()))

    seen: dict[int, Any] = {}
    base, before = None, []
    for i in range(len(t)):
        seen[i] = data.x0_hat(x, t[i])
        if i == len(t) - 1:
            break
        if base is not None:
            x = update(base, before, seen[i], i - 1)
        base, before = x, list(range(i, max(i - order, -1), -1))
        x = update(base, before, None, i)
    ours = sample(data.x0_hat, data.process, start, solver, grid=grid)
    torch.testing.assert_close(ours, seen[len(t) - 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["dpm-2", "dpm-3", "dpmpp-2s"])
def test_single_step_dpm_solvers_equal_their_algorithms(solver):
    data = Mixture(gaussian("vp"))
    s, x = data.process.schedule, data.draw(0.9, 3)
    grid = make_grid("log_snr", 6, data.process, 0.9, 0.05, final=False)
    t, alpha, sigma, lam = _values(data.process, grid)
    ours = sample(data.x0_hat, data.process, x, solver, grid=grid)

    def eps(x, time):
        return (x - s.alpha(time) * data.x0_hat(x, time)) / s.sigma(time)

    for i in range(len(t) - 1):
        h, first = lam[i + 1] - lam[i], eps(x, t[i])

        def inside(r, i=i, h=h):
            time = s.t_of_log_snr(lam[i] + r * h)
            return time, s.alpha(time), s.sigma(time)

        if solver == "dpmpp-2s":
            time, a, b = inside(0.5)
            x0 = data.x0_hat(x, t[i])
            middle = data.x0_hat(b / sigma[i] * x - a * torch.expm1(-0.5 * h) * x0, time)
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * middle
        elif solver == "dpm-2":
            time, a, b = inside(0.5)
            middle = eps(a / alpha[i] * x - b * torch.expm1(0.5 * h) * first, time)
            x = alpha[i + 1] / alpha[i] * x - sigma[i + 1] * torch.expm1(h) * middle
        else:
            r1, r2 = 1 / 3, 2 / 3
            time, a, b = inside(r1)
            d1 = eps(a / alpha[i] * x - b * torch.expm1(r1 * h) * first, time) - first
            time, a, b = inside(r2)
            bend = b * r2 / r1 * (torch.expm1(r2 * h) / (r2 * h) - 1)
            d2 = eps(a / alpha[i] * x - b * torch.expm1(r2 * h) * first - bend * d1, time) - first
            bend = sigma[i + 1] / r2 * (torch.expm1(h) / h - 1)
            x = alpha[i + 1] / alpha[i] * x - sigma[i + 1] * torch.expm1(h) * first - bend * d2
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["ipndm", "pndm"])
def test_ipndm_and_pndm_equal_the_pseudo_numerical_methods(solver):
    """Liu 2022, eq. 11 to 13: DDIM's transfer of a classical combination; PNDM starts with three pseudo Runge-Kutta steps."""
    data = Mixture(gaussian("vp"))
    s, x = data.process.schedule, data.draw(0.9, 3)
    grid = make_grid("uniform", 8, data.process, 0.9, 0.05, final=False)
    t = torch.tensor(grid.times, dtype=F64)
    ours = sample(data.x0_hat, data.process, x, solver, grid=grid)

    def eps(x, time):
        return (x - s.alpha(time) * data.x0_hat(x, time)) / s.sigma(time)

    def transfer(x, e, start, end):
        return s.alpha(end) / s.alpha(start) * (x - s.sigma(start) * e) + s.sigma(end) * e

    classical = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    seen: list[Any] = []
    for i in range(len(t) - 1):
        seen.insert(0, eps(x, t[i]))
        middle = 0.5 * (t[i] + t[i + 1])
        if solver == "pndm" and i < 3:
            e2 = eps(transfer(x, seen[0], t[i], middle), middle)
            e3 = eps(transfer(x, e2, t[i], middle), middle)
            e4 = eps(transfer(x, e3, t[i], t[i + 1]), t[i + 1])
            combined = (seen[0] + 2 * e2 + 2 * e3 + e4) / 6
        else:
            combined = sum(w * e for w, e in zip(classical[min(4, i + 1)], seen, strict=False))
        x = transfer(x, combined, t[i], t[i + 1])
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["lms", "deis", "ab3-eps-log_snr"])
def test_adams_methods_in_eps_equal_integrals_by_fine_quadrature(solver):
    """x/alpha grows by the integral over sigma/alpha of the polynomial through eps, in sigma, in t, in log-SNR."""
    data = Mixture(gaussian("edm" if solver == "lms" else "vp"))
    s, order = data.process.schedule, 3 if solver.startswith("ab3") else 4
    grid = make_grid("karras", 6, data.process, 0.8, 0.4, final=False)
    x = data.draw(0.8, 3)
    ours = sample(data.x0_hat, data.process, x, solver, grid=grid)
    t = torch.tensor(grid.times, dtype=F64)
    place = {"lms": s.sigma, "deis": lambda time: time}.get(solver, s.log_snr)
    seen: list[Any] = []
    for i in range(len(t) - 1):
        seen.insert(0, (x - s.alpha(t[i]) * data.x0_hat(x, t[i])) / s.sigma(t[i]))
        del seen[order:]
        fine = torch.linspace(float(t[i]), float(t[i + 1]), 4001, dtype=F64)
        tau, u = s.sigma(fine) / s.alpha(fine), place(fine)
        nodes = [place(t[i - j]) for j in range(len(seen))]
        x = x / s.alpha(t[i])
        for j, e in enumerate(seen):
            lagrange = torch.ones_like(u)
            for m, node in enumerate(nodes):
                if m != j:
                    lagrange = lagrange * (u - node) / (nodes[j] - node)
            x = x + torch.trapezoid(lagrange, tau) * e
        x = x * s.alpha(t[i + 1])
    torch.testing.assert_close(ours, x, rtol=1e-6, atol=1e-6)


def test_sa_solver_equals_its_adams_recursion():
    """Xue 2023, algorithm 1 with tau = 1: three-step predictor, corrector through four, the same draw in both."""
    data, noise = Mixture(gaussian("vp")), Noise(2, range(2))
    grid = make_grid("log_snr", 7, data.process, 0.9, 0.05, final=False)
    x = data.draw(0.9, 2)
    ours = sample(data.x0_hat, data.process, x, "sa-solver", grid=grid, generator=noise)
    t, alpha, sigma, lam = _values(data.process, grid)

    def move(base, i, places):
        h = lam[i + 1] - lam[i]
        powers = torch.stack([((lam[places] - lam[i]) / h) ** n for n in range(len(places))])
        moments = [-torch.expm1(-2 * h)]  # of u^n under 2 h exp(-2 h (1 - u)), by parts
        for n in range(1, len(places)):
            moments.append(1 - n / (2 * h) * moments[-1])
        weights = torch.linalg.solve(powers, torch.stack(moments))
        mean = sigma[i + 1] / sigma[i] * torch.exp(-h) * base
        for weight, j in zip(weights, places, strict=True):
            mean = mean + alpha[i + 1] * weight * seen[j]
        return mean + sigma[i + 1] * torch.sqrt(-torch.expm1(-2 * h)) * noise.draw(i, "step", x)

    seen: dict[int, Any] = {}
    base, before = None, []
    for i in range(len(t) - 1):
        seen[i] = data.x0_hat(x, t[i])
        if base is not None:
            x = move(base, i - 1, [i, *before])
        base, before = x, list(range(i, max(i - 3, -1), -1))
        x = move(base, i, before)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_euler_ancestral_is_ddpm():
    """Down to sigma_down by Euler, up again by sigma_up, on a path without scaling (Karras-style ancestral sampling)."""
    data, noise = Mixture(gaussian("edm")), Noise(4, range(3))
    grid = make_grid("karras", 7, data.process)
    x = start = data.draw(grid.times[0], 3)
    t, _, sigma, _ = _values(data.process, grid)
    for i in range(len(t) - 1):
        up = torch.sqrt(sigma[i + 1] ** 2 * (sigma[i] ** 2 - sigma[i + 1] ** 2) / sigma[i] ** 2)
        down = torch.sqrt(sigma[i + 1] ** 2 - up**2)
        slope_ = (x - data.x0_hat(x, t[i])) / sigma[i]
        x = x + slope_ * (down - sigma[i]) + up * noise.draw(i, "step", x)
    ours = sample(data.x0_hat, data.process, start, "euler-ancestral", grid=grid, generator=noise)
    torch.testing.assert_close(ours, data.x0_hat(x, t[-1]), rtol=1e-9, atol=1e-9)
