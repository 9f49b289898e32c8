"""Solvers: orders of accuracy by their slopes, closed forms, marginals of the stochastic ones."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from polydiff.core.denoiser import Prediction
from polydiff.core.errors import ConfigError, ScheduleError
from polydiff.core.grids import Grid, make_grid
from polydiff.core.noise import Noise
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.sampling import count, sample
from polydiff.core.schedules import SCHEDULES, VP
from polydiff.core.solvers import NAMES, Churn, Multistep, RungeKutta
from polydiff.core.solvers.base import COORDINATES
from tests.numerics.exact import Gaussian, Mixture, as_field, slope

F64 = torch.float64
# rk45 chooses its own steps: tests/numerics/test_adaptive.py
DETERMINISTIC = [  # each method once; one that chooses its own steps has no order in those of the grid
    name
    for k, (name, entry) in enumerate(NAMES.items())
    if not entry.stochastic and entry.stages is not None and entry not in list(NAMES.values())[:k]
]
SMOOTH = [name for name in SCHEDULES if name != "discrete"]  # a schedule read off a table has kinks
# away from the infinite ends, so that the asymptotic regime starts at few steps
RANGE = {"vp": (0.6, 0.05), "sub_vp": (0.6, 0.05), "ve": (0.75, 0.3), "edm": (0.6, 0.35)}


def nominal_order(solver):
    """The order that a solver approaches while the steps are long, where its start or a shortcut then lowers it."""
    return solver.terms + (solver.corrector is not None) if isinstance(solver, Multistep) else solver.order


def _rms(x):
    return float(x.pow(2).mean().sqrt())


def _error(data, solver, name, start, end, x):
    process = data.process
    if isinstance(data, Gaussian):
        truth = data.flow(x, start, end)
    else:
        fine = make_grid(name, 400, process, start, end, final=False)
        truth = sample(data.x0_hat, process, x, RungeKutta("rk4", "v"), grid=fine)

    def error(n):
        grid = make_grid(name, n, process, start, end, final=False)
        return _rms(sample(data.x0_hat, process, x, solver, grid=grid) - truth)

    return error


@pytest.mark.parametrize("schedule", SMOOTH)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_named_solvers_on_gaussian_data(name, schedule):
    data = Gaussian(gaussian(schedule), std=(0.7, 1.0, 1.3), mean=(0.1, -0.2, 0.3))
    start, end = RANGE.get(schedule, (0.7, 0.2))
    solver = NAMES[name].solver
    error = _error(data, solver, "uniform", start, end, data.draw(start, 8))
    # On Gaussian data y' = tau y / (s^2 + tau^2), and the h^3 terms of the midpoint rule cancel: it measures order 3. A low
    # start lowers the order by errors that are small next to the others until the steps are.
    excess = 1.1 if name == "midpoint" else 0.5 + nominal_order(solver) - solver.order
    n = {1: 64, 2: 32}.get(solver.order, 16) if nominal_order(solver) == solver.order else 64
    n = 512 if name in ("dpmpp-3m", "unipc-eps", "ab4-x0-log_snr") else n  # whose two kinds of error first cancel
    assert -0.15 <= slope(error, n, low=1e-12) - solver.order <= excess


@pytest.mark.parametrize("predict,variable", list(itertools.product(COORDINATES, ["log_snr", "t", "angle", "index"])))
def test_order_of_every_multistep_form_on_a_mixture(predict, variable):
    """Order 2 in each form and variable; the first step is of first order, which does not lower the global order."""
    data = Mixture(gaussian("cosine"), std=0.7)
    error = _error(data, Multistep(2, predict, variable), "uniform", 0.6, 0.3, data.draw(0.6, 4))
    assert -0.15 <= slope(error, 16, high=1e-4, low=1e-9) - 2 <= 0.5


@pytest.mark.parametrize("predict", COORDINATES)
@pytest.mark.parametrize(
    "tableau,order", [("euler", 1), ("heun", 2), ("midpoint", 2), ("ralston", 2), ("heun3", 3), ("rk4", 4)]
)
def test_order_of_every_runge_kutta_form_on_a_mixture(tableau, order, predict):
    data = Mixture(gaussian("vp"), std=0.7)
    solver = RungeKutta(tableau, predict)
    error = _error(data, solver, "uniform", 0.5, 0.2, data.draw(0.5, 4))
    assert solver.order == order and -0.15 <= slope(error, 4 if order > 1 else 64) - order <= 0.5


def test_the_order_asked_for_is_an_argument_and_the_order_reached_an_attribute():
    solver = Multistep(order=3, predict="eps")
    assert solver == Multistep(3, "eps") and hash(solver) == hash(Multistep(3, "eps")) and solver != Multistep(4, "eps")
    assert (solver.terms, solver.order, Multistep(order=3, startup="full").order) == (3, 2, 3)
    assert repr(solver).startswith("Multistep(order=3, predict='eps'")


def test_third_order_multistep_is_capped_at_two_by_its_start():
    data = Gaussian(gaussian("vp"))
    error = _error(data, Multistep(3), "log_snr", 0.8, 0.1, data.draw(0.8, 8))
    assert 1.85 <= slope(error, 64) <= 3.2


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", COORDINATES)
def test_constant_predictions_are_integrated_exactly(schedule, predict):
    """Where the predicted field is constant along the flow, one step of any order and size is exact."""
    process = gaussian(schedule)
    start, end = RANGE.get(schedule, (0.9, 0.1))
    s = process.schedule
    x0, eps = torch.tensor([[0.4, -1.0]], dtype=F64), torch.tensor([[1.3, 0.2]], dtype=F64)

    def state(t):
        t = torch.tensor(t, dtype=F64)
        return s.alpha(t) * x0 + s.sigma(t) * eps

    # a single trajectory has constant x0 and eps, hence constant flow; v turns and velocity scales with t
    if predict in ("x0", "eps", "flow"):
        for solver in (Multistep(1, predict), Multistep(3, predict), RungeKutta("heun", predict)):
            out = sample(lambda x, t: x0, process, state(start), solver, grid=[start, 0.5 * (start + end), end])
            torch.testing.assert_close(out, state(end), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predict", ["x0", "eps", "flow"])
def test_the_first_interval_leaves_the_right_field_behind(predict):
    """From alpha = 0 a step is taken in x0, but the next ones continue with the method's own field: still exact."""
    process = gaussian("rectified_flow")
    x0, eps = torch.tensor([[0.4, -1.0]], dtype=F64), torch.tensor([[1.3, 0.2]], dtype=F64)
    out = sample(lambda *_: x0, process, eps, Multistep(3, predict, "t"), grid=[1.0, 0.8, 0.5, 0.3])
    torch.testing.assert_close(out, 0.7 * x0 + 0.3 * eps, rtol=1e-12, atol=1e-12)


def test_churn_scales_the_state_on_paths_that_shrink_the_data():
    """Raised noise is the forward process: the state is scaled by alpha as well, and never past t_max."""
    process, noise = gaussian("cosine"), Noise(0, [0])
    x, x0 = torch.full((1, 3), 0.7, dtype=F64), torch.full((1, 3), -0.2, dtype=F64)
    seen = []

    def denoise(x_t, t):
        seen.append((x_t, t))
        return x0

    for start, churn in ((0.5, Churn(40.0, 0.0, 1e9, 1.0)), (0.9988, Churn(40.0, 0.0, 1e9, 1.0))):
        seen.clear()
        sample(denoise, process, x, RungeKutta("euler", "eps", churn), grid=[start, 0.1], generator=noise)
        before, (x_t, t) = torch.tensor(start, dtype=F64), seen[0]
        level = torch.exp(-process.schedule.log_snr(t)) / torch.exp(-process.schedule.log_snr(before))
        assert float(t) == 0.999 if start == 0.9988 else float(level) == pytest.approx(math.sqrt(2))
        expected = process.renoise(x, before, t, noise.draw(0, "churn", x))
        torch.testing.assert_close(x_t, expected, rtol=1e-9, atol=1e-9)


def test_churn_acts_from_low_to_high_with_both():
    process, grid = gaussian("ve"), Grid((0.5, 0.4, 0.3))
    log_snr = [point.log_snr for point in Multistep(1).plan(process, grid).points]
    for k in (0, 1):
        level = float(np.exp(-log_snr[k]))
        steps = RungeKutta("heun", "eps", Churn(40.0, level, level)).plan(process, grid).steps
        assert [step.lift is not None for step in steps] == [k == 0, k == 1]


def test_a_log_snr_of_a_schedule_s_own_is_taken():
    class Known(VP):
        def log_snr(self, t):
            return -0.5 * torch.log(torch.expm1(self.integral(t))) + 1e-3  # to be told from alpha and sigma

    grid = Grid((0.9, 0.5, 0.1), final=True)
    points = Multistep(2).plan(GaussianProcess(Known()), grid).points
    assert [point.log_snr for point in points[:-1]] == Known().log_snr(torch.tensor(grid.times, dtype=F64)).tolist()
    plain = Multistep(2).plan(gaussian("vp"), grid).points
    assert [point.log_snr for point in plain[:-1]] == VP().log_snr(torch.tensor(grid.times, dtype=F64)).tolist()


def test_lower_final_lowers_the_order_towards_the_end():
    """The last intervals use as many predictions as there are intervals left; the others are those of the method."""
    process = gaussian("vp")
    grid = make_grid("log_snr", 6, process, final=False)
    plain, lowered = (Multistep(3, lower_final=low).plan(process, grid).steps for low in (False, True))
    assert [sum(map(bool, step.weights)) for step in plain] == [1, 2, 3, 3, 3, 3]
    assert [sum(map(bool, step.weights)) for step in lowered] == [1, 2, 3, 3, 2, 1]
    assert lowered[:4] == plain[:4]
    assert lowered[5].weights[:1] == pytest.approx(Multistep(1).plan(process, grid).steps[5].weights, rel=1e-13)


@pytest.mark.parametrize("predict", ["x0", "eps", "v", "flow", "velocity"])
@pytest.mark.parametrize("variable", ["log_snr", "t", "sigma_over_alpha", "angle", "flow"])
def test_weights_integrate_polynomials_exactly(predict, variable):
    """sum_j w_j q(u_j) is the integral of q(u) over tau for polynomials q below the order, by fine quadrature."""
    process = gaussian("cosine")
    s, times = process.schedule, [0.7, 0.62, 0.55, 0.5]
    eta = 0.4 if predict == "x0" else 0.0
    step = Multistep(3, predict, variable, eta=eta).plan(process, Grid(tuple(times))).steps[2]

    def quantities(t):
        alpha, sigma = s.alpha(t), s.sigma(t)
        c, tau = {
            "x0": (sigma * (sigma / alpha) ** eta**2, (alpha / sigma) ** (1 + eta**2)),
            "eps": (alpha, sigma / alpha),
            "v": (torch.hypot(alpha, sigma), torch.atan2(sigma, alpha)),
            "flow": (alpha + sigma, sigma / (alpha + sigma)),
            "velocity": (torch.ones_like(t), t),
        }[predict]
        u = {
            "log_snr": torch.log(alpha / sigma),
            "t": t,
            "sigma_over_alpha": sigma / alpha,
            "angle": torch.atan2(sigma, alpha),
            "flow": sigma / (alpha + sigma),
        }[variable]
        return c, tau, u

    c, tau, u = quantities(torch.linspace(times[2], times[3], 20001, dtype=F64))
    _, _, nodes = quantities(torch.tensor(times[2::-1], dtype=F64))
    assert step.scale == pytest.approx(float(c[-1] / c[0]), rel=1e-12)
    for power in range(3):
        integral = float(c[-1] * ((u[1:] ** power + u[:-1] ** power) / 2 * tau.diff()).sum())
        summed = sum(w * float(node) ** power for w, node in zip(step.weights, nodes, strict=True))
        assert summed == pytest.approx(integral, rel=1e-6)


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp-2m-sde", "dpmpp-3m-sde", "sa-solver", "edm"])
@pytest.mark.parametrize("schedule", ["vp", "edm", "rectified_flow"])
def test_stochastic_solvers_keep_the_marginals(solver, schedule):
    data = Gaussian(gaussian(schedule))
    start, end, n = (1.0, 0.3, 300) if schedule != "rectified_flow" else (0.99, 0.1, 300)
    grid = make_grid("log_snr", n, data.process, start, end, final=False)
    x = data.draw(start, 6000)[None]  # one item of many points: one stream of noise
    out = sample(data.x0_hat, data.process, x, solver, grid=grid, generator=1)[0]
    alpha, _, total = data._marginal(end)
    assert float(((out.mean(0) - alpha * data.mean) / total).abs().max()) < 4.2 / math.sqrt(6000) + 0.02
    assert float((out.var(0) / total**2 - 1).abs().max()) < 4.2 * math.sqrt(2 / 6000) + 0.02


def test_ancestral_and_sde_noise_agree_at_eta_0_and_1_only():
    data = Mixture(gaussian("vp"))
    x = data.draw(1.0, 3)

    def run(form, eta):
        return sample(data.x0_hat, data.process, x, Multistep(1, "x0", eta=eta, noise_form=form), steps=6, generator=0)

    for eta in (0.0, 1.0):
        torch.testing.assert_close(run("sde", eta), run("ancestral", eta), rtol=1e-9, atol=1e-9)
    assert _rms(run("sde", 0.5) - run("ancestral", 0.5)) > 1e-3


@pytest.mark.parametrize("schedule", ["cosine", "rectified_flow"])
@pytest.mark.parametrize("solver", ["ddim", "heun", "heun-v", "dpmpp-2m", "rk4", "ab2-v", "ddpm"])
def test_starting_without_any_signal_is_finite(schedule, solver):
    """From t = 1 with alpha = 0 the first interval is taken in x0_hat; eps cannot be used there and says so."""
    data = Mixture(gaussian(schedule))
    x = data.draw(1.0, 4)
    grid = make_grid("uniform", 12, data.process, t_start=1.0)
    out = sample(as_field(data, "v"), data.process, x, solver, grid=grid, generator=0)
    assert _rms(out) < 5
    with pytest.raises(ScheduleError, match="alpha"):
        sample(as_field(data, "eps"), data.process, x, solver, grid=grid, generator=0)


@pytest.mark.parametrize("solver", [Multistep(2, "eps"), RungeKutta("heun", "eps")])
def test_eps_is_used_from_alpha_of_one_millionth(solver):
    """Below it an interval is taken in x0_hat at first order, and a predicted eps is refused; above it eps is used."""
    data = Mixture(gaussian("cosine"))
    for alpha, usable in ((1e-7, False), (1e-5, True)):
        start = 1 - 2 / math.pi * math.asin(alpha)
        step = solver.plan(data.process, Grid((start, 0.5, 0.2))).steps[0]
        assert (step.field if isinstance(solver, Multistep) else step.weights[1:]) == (
            ("eps" if usable else "x0") if isinstance(solver, Multistep) else step.weights[1 : 2 if usable else 1]
        )
        run = lambda field, start=start: sample(
            as_field(data, field), data.process, data.draw(start, 2), solver, grid=[start, 0.5, 0.2]
        )
        for field in ("eps", "score"):
            if usable:
                assert bool(run(field).isfinite().all())
            else:
                with pytest.raises(ScheduleError, match=field):
                    run(field)


@pytest.mark.parametrize("solver", ["ddim", "heun", "edm"])
def test_a_step_cannot_start_from_the_data(solver):
    with pytest.raises(ScheduleError, match="sigma = 0"):
        NAMES[solver].solver.plan(gaussian("vp"), Grid((0.0,), final=True))


@pytest.mark.parametrize("solver", NAMES)
def test_final_interval_returns_x0_hat_and_calls_are_as_declared(solver):
    data = Mixture(gaussian("vp"))

    def with_variance(x0_hat):  # which all but one solver ignore
        return lambda x, t: Prediction(data.process, x, t, x0=x0_hat(x, t), fraction=torch.full_like(x, 0.5))

    denoise = count(with_variance(data.x0_hat))
    x = data.draw(1.0, 3)
    out = sample(denoise, data.process, x, solver, steps=6, generator=0)
    plan = NAMES[solver].solver.plan(data.process, make_grid("karras", 6, data.process))
    assert NAMES[solver].solver.calls(plan) in (denoise.calls, None)
    assert denoise.calls >= 5 * (NAMES[solver].stages or 1) + 1
    one = sample(with_variance(lambda *_: torch.full_like(x, 0.25)), data.process, x, solver, steps=4, generator=0)
    torch.testing.assert_close(one, torch.full_like(x, 0.25))
    assert out.shape == x.shape and out.dtype == F64


@pytest.mark.parametrize("field", ["eps", "score", "v", "velocity", "x0"])
def test_the_predicted_field_does_not_change_the_sample(field):
    data = Mixture(gaussian("vp"))
    x = data.draw(1.0, 3)
    for solver in ("dpmpp-2m", "heun-v"):
        base = sample(data.x0_hat, data.process, x, solver, steps=8)
        other = sample(as_field(data, field), data.process, x, solver, steps=8)
        torch.testing.assert_close(other, base, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Multistep(0),
        lambda: Multistep(2, "x1"),
        lambda: Multistep(2, variable="snr"),
        lambda: Multistep(1, "eps", eta=1.0),
        lambda: Multistep(2, eta=1.0, noise_form="ancestral"),
        lambda: Multistep(2, eta=math.nan),
        lambda: Multistep(5),
        lambda: Multistep(2, eta=-0.5),
        lambda: Multistep(2, eta=math.inf),
        lambda: Multistep(2, corrector="bh3"),
        lambda: Multistep(2, "v", corrector="bh1"),
        lambda: Multistep(2, "eps", "t", corrector="bh2"),
        lambda: Multistep(2, rule="midpoint", corrector="bh2"),
        lambda: Multistep(2, rule="midpoint", variable="index"),
        lambda: Multistep(2, rule="trapezium"),
        lambda: Multistep(2, blend=0.5),
        lambda: Multistep(3, blend=1.5),
        lambda: Multistep(3, blend=math.nan),
        lambda: Multistep(3, blend=0.5, corrector="exact"),
        lambda: Multistep(1, eta=0.5, noise_form="ancestral", corrector="exact"),
        lambda: Multistep(3, eta=0.5, startup="full"),
        lambda: Multistep(3, startup="high"),
        lambda: RungeKutta("rk5"),
        lambda: RungeKutta("heun", "eps", Churn(math.inf)),
        lambda: RungeKutta("heun", "eps", Churn("a")),
        lambda: RungeKutta("heun", "eps", Churn(40.0, 5.0, 1.0)),
        lambda: RungeKutta("heun", "eps", Churn(40.0, scale=-1.0)),
        lambda: RungeKutta("heun", "eps", 5.0),
        lambda: RungeKutta("heun", "eps", (1, 2, 3)),
        lambda: Multistep(True),
        lambda: Multistep("2"),
        lambda: Multistep(1, eta="1"),
        lambda: Multistep(1, eta=None),
        lambda: Multistep(3, blend="a"),
    ],
)
def test_combinations_without_meaning_are_refused(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize("eta", [3.0, lambda log_snr: 3.0])
def test_ancestral_noise_beyond_what_a_level_holds_is_refused(eta):
    """DDIM's variance is eta^2 times that of the posterior, and no more than sigma_s^2."""
    process, solver = gaussian("vp"), Multistep(1, eta=eta, noise_form="ancestral")
    with pytest.raises(ConfigError, match="noise_form='sde'"):
        solver.plan(process, make_grid("log_snr", 20, process))
    step = solver.plan(process, Grid((0.5, 0.499))).steps[0]
    at = [float(getattr(process.schedule, name)(torch.tensor(0.499))) for name in ("alpha", "sigma")]
    start = [float(getattr(process.schedule, name)(torch.tensor(0.5))) for name in ("alpha", "sigma")]
    assert step.scale * start[0] + step.weights[0] == pytest.approx(at[0])
    assert math.hypot(step.scale * start[1], step.noise) == pytest.approx(at[1])


@pytest.mark.filterwarnings("error")
def test_churn_leaves_the_interval_from_alpha_0_alone():
    process = gaussian("rectified_flow")
    steps = RungeKutta("heun", "eps", Churn(40.0, 0.0, 1e9)).plan(process, make_grid("uniform", 5, process, 1.0)).steps
    assert [step.lift is None for step in steps] == [True, False, False, False, False]
