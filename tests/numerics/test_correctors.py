"""Correctors, full starts, levels of noise that vary, single-step methods: orders by slopes, weights by fine quadrature."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from polydiff.core.errors import ConfigError
from polydiff.core.grids import Grid, make_grid
from polydiff.core.noise import Noise
from polydiff.core.processes import gaussian
from polydiff.core.sampling import count, sample
from polydiff.core.solvers import Multistep, RungeKutta
from polydiff.core.solvers.base import COORDINATES
from tests.numerics.exact import Mixture, slope

F64 = torch.float64
START, END = 0.6, 0.3


def _measured(solver, schedule="cosine", n=16, high=1e-3):
    """Slope of the error at END on a mixture, on a grid that is uniform in nothing the methods use."""
    data = Mixture(gaussian(schedule), std=0.8)
    process, x = data.process, data.draw(START, 2)

    def grid(n):
        place = torch.linspace(0, 1, n + 1, dtype=F64)
        return START + (END - START) * (place + 0.15 * place * (1 - place))

    truth = sample(data.x0_hat, process, x, RungeKutta("rk4", "v"), grid=grid(400))

    def error(n):
        return float((sample(data.x0_hat, process, x, solver, grid=grid(n)) - truth).pow(2).mean().sqrt())

    return slope(error, n, low=1e-13, high=high)


@pytest.mark.parametrize("predict,variable", list(itertools.product(COORDINATES, ["log_snr", "t", "angle"])))
@pytest.mark.parametrize("terms", [1, 2])
def test_a_corrector_raises_the_order_by_one(terms, predict, variable):
    """In every form: the fields of the history are those of the states at which the network was called."""
    solver = Multistep(terms, predict, variable, corrector="exact")
    assert solver.order == terms + 1
    assert -0.15 <= _measured(solver, n=32 if terms == 1 else 16) - solver.order <= 0.6


@pytest.mark.parametrize("predict", ["x0", "eps"])
@pytest.mark.parametrize("corrector,terms", [("bh1", 1), ("bh2", 1), ("bh1", 2), ("bh2", 2)])
def test_published_correctors_raise_it_too(predict, corrector, terms):
    assert _measured(Multistep(terms, predict, corrector=corrector), n=32) >= terms + 1 - 0.15


@pytest.mark.parametrize("predict", COORDINATES)
@pytest.mark.parametrize("terms,corrector", [(3, None), (4, None), (3, "exact"), (4, "exact")])
def test_a_full_start_reaches_the_nominal_order(terms, corrector, predict):
    solver = Multistep(terms, predict, "angle", corrector=corrector, startup="full")
    assert solver.order == terms + (corrector is not None)
    assert -0.15 <= _measured(solver, n=32 if solver.order < 5 else 40) - solver.order <= 0.8


@pytest.mark.parametrize("corrector,order", [(None, 2), ("exact", 3)])
def test_a_low_start_caps_the_order(corrector, order):
    solver = Multistep(4, "eps", "t", corrector=corrector)
    assert solver.order == order
    assert -0.15 <= _measured(solver, n=512) - order <= 0.35


@pytest.mark.parametrize(
    "terms,corrector,more", [(2, None, 0), (3, None, 1), (4, None, 4), (3, "exact", 2), (4, "exact", 6)]
)
def test_a_full_start_costs_the_calls_it_says(terms, corrector, more):
    data = Mixture(gaussian("vp"))
    solver, grid = Multistep(terms, corrector=corrector, startup="full"), make_grid("log_snr", 9, data.process)
    denoise = count(data.x0_hat)
    sample(denoise, data.process, data.draw(1.0, 2), solver, grid=grid)
    assert denoise.calls == solver.calls(solver.plan(data.process, grid)) == 9 + more


def test_classical_weights_have_order_two_unless_the_grid_is_uniform_in_tau():
    assert Multistep(4, "v", "index").order == 2
    assert -0.15 <= _measured(Multistep(4, "v", "index", startup="full"), n=64) - 2 <= 0.3
    plan = Multistep(3, "velocity", "index", corrector="exact").plan(gaussian("vp"), Grid((0.6, 0.5, 0.4, 0.3, 0.2)))
    adams, moulton = (23 / 12, -16 / 12, 5 / 12, 0), (9 / 24, 19 / 24, -5 / 24, 1 / 24)
    expected = [a + m - b for a, m, b in zip(adams, moulton, (0, *adams[:3]), strict=True)]
    assert plan.steps[3].weights == pytest.approx([-0.1 * w for w in expected], rel=1e-12)


def test_a_corrector_is_the_same_step_again_with_the_prediction_at_its_end():
    """Predictor and corrector written out with all states kept, in the v form, against the folded weights."""
    data = Mixture(gaussian("cosine"))
    s, times = data.process.schedule, torch.linspace(0.7, 0.2, 8, dtype=F64)
    x = data.draw(0.7, 3)
    ours = sample(data.x0_hat, data.process, x, Multistep(2, "v", "angle", corrector="exact"), grid=times)
    angle = torch.atan2(s.sigma(times), s.alpha(times))

    def weights(nodes, a, b):
        powers = torch.stack([nodes**i for i in range(len(nodes))])
        return torch.linalg.solve(
            powers, torch.stack([(b ** (i + 1) - a ** (i + 1)) / (i + 1) for i in range(len(nodes))])
        )

    base, fields = None, []
    for k in range(7):
        x0 = data.x0_hat(x, times[k])
        eps = (x - s.alpha(times[k]) * x0) / s.sigma(times[k])
        fields.append(torch.cos(angle[k]) * eps - torch.sin(angle[k]) * x0)
        if base is not None:
            places = list(range(k, max(k - 3, -1), -1))
            x = base + sum(
                w * fields[i] for w, i in zip(weights(angle[places], angle[k - 1], angle[k]), places, strict=True)
            )
        base, places = x, list(range(k, max(k - 2, -1), -1))
        w = weights(angle[places], angle[k], angle[k + 1])
        x = base + sum(a * fields[i] for a, i in zip(w, places, strict=True))
    torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variable", ["t", "log_snr"])
def test_the_corrector_with_noise_uses_the_same_draw_and_the_exact_integral(variable):
    """One corrected step of eta = 0.7, by fine quadrature over log-SNR, with z drawn once."""
    data, noise, eta = Mixture(gaussian("vp")), Noise(3, range(2)), 0.7
    s, times = data.process.schedule, torch.tensor([0.6, 0.5, 0.42], dtype=F64)
    x = data.draw(0.6, 2)
    solver = Multistep(1, variable=variable, corrector="exact", eta=eta)
    ours = sample(data.x0_hat, data.process, x, solver, grid=times, generator=noise)
    lam = s.log_snr(times)

    def move(x, i, polynomial):
        h = lam[i + 1] - lam[i]
        grid = torch.linspace(float(lam[i]), float(lam[i + 1]), 4001, dtype=F64)
        density = (1 + eta**2) * torch.exp((1 + eta**2) * (grid - lam[i + 1]))
        integral = torch.trapezoid(density * polynomial(grid), grid)
        return (
            s.sigma(times[i + 1]) / s.sigma(times[i]) * torch.exp(-(eta**2) * h) * x,
            s.alpha(times[i + 1]) * integral,
            s.sigma(times[i + 1]) * torch.sqrt(-torch.expm1(-2 * eta**2 * h)) * noise.draw(i, "step", x),
        )

    unit = lambda grid: torch.ones_like(grid)
    place = lambda grid: s.t_of_log_snr(grid) if variable == "t" else grid
    first, second = float(place(lam[:1])), float(place(lam[1:2]))
    share = lambda grid: (place(grid) - first) / (second - first)
    x0 = data.x0_hat(x, times[0])
    kept, whole, z = move(x, 0, unit)
    ahead = data.x0_hat(kept + whole * x0 + z, times[1])
    _, part, _ = move(x, 0, share)
    corrected = kept + (whole - part) * x0 + part * ahead + z
    kept, whole, z = move(corrected, 1, unit)
    torch.testing.assert_close(ours, kept + whole * ahead + z, rtol=1e-6, atol=1e-6)


def test_a_level_of_noise_that_is_a_function_of_log_snr():
    """Constant over an interval, taken in its middle; zero in places is no noise there."""
    process = gaussian("vp")
    grid = make_grid("log_snr", 8, process, final=False)
    lam = process.schedule.log_snr(torch.tensor(grid.times, dtype=F64))
    solver = Multistep(2, corrector="exact", eta=lambda value: 0.8 if -2 < value < 2 else 0.0)
    quiet, loud = (Multistep(2, corrector="exact", eta=eta).plan(process, grid).steps for eta in (0.0, 0.8))
    steps = solver.plan(process, grid).steps
    assert solver.stochastic
    for k, step in enumerate(steps):
        active = -2 < float(lam[k] + lam[k + 1]) / 2 < 2
        assert (step.scale, step.noise) == pytest.approx(((loud if active else quiet)[k].scale, loud[k].noise * active))
    assert any(step.noise for step in steps) and not all(step.noise for step in steps)


@pytest.mark.parametrize("level", [math.nan, -0.1, math.inf])
def test_a_level_of_noise_that_is_no_number_is_refused(level):
    solver = Multistep(1, eta=lambda log_snr: level if log_snr > 0 else 0.5)
    with pytest.raises(ConfigError, match=r"eta at log-SNR .* = "):
        solver.plan(gaussian("vp"), make_grid("log_snr", 8, gaussian("vp")))


@pytest.mark.parametrize("schedule", ["cosine", "rectified_flow"])
@pytest.mark.parametrize("predict", COORDINATES)
def test_the_ends_stay_at_first_order_and_uncorrected(schedule, predict):
    """From alpha = 0 to sigma = 0: constant predictions are kept exactly, whatever the corrector and the start."""
    process = gaussian(schedule)
    x0, eps = torch.tensor([[0.4, -1.0]], dtype=F64), torch.tensor([[1.3, 0.2]], dtype=F64)
    for startup, variable in itertools.product(("low", "full"), ("t", "log_snr")):
        solver = Multistep(3, predict, variable, corrector="exact", startup=startup)
        grid = Grid((1.0, 0.8, 0.6, 0.5, 0.3, 0.1), final=True)
        plan = solver.plan(process, grid)
        scale, weight = float(process.schedule.sigma(torch.tensor(0.8, dtype=F64))), plan.steps[0].weights
        assert plan.steps[0].scale == pytest.approx(scale) and len(weight) == 1
        assert (plan.steps[-1].scale, plan.steps[-1].weights) == (0.0, (1.0,))
        out = sample(lambda *_: x0, process, eps, solver, grid=grid)
        torch.testing.assert_close(out, x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predict", COORDINATES)
@pytest.mark.parametrize("tableau,order", [("dpm2", 2), ("dpm3", 3), ("pseudo-rk4", 2)])
def test_single_step_methods_have_their_order_in_every_form(tableau, order, predict):
    solver = RungeKutta(tableau, predict)
    assert solver.order == order
    assert _measured(solver, n=8, high=1e-2) >= order - 0.15
