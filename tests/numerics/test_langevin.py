"""Langevin steps: the published algorithms written out, their stationary law, masks, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from polydiff.core.errors import ConfigError
from polydiff.core.grids import Grid, make_grid
from polydiff.core.noise import Noise
from polydiff.core.processes import gaussian
from polydiff.core.sampling import count, sample
from polydiff.core.schedules import as_time
from polydiff.core.solvers import NAMES, EulerMaruyama, Multistep, PredictorCorrector, Resample
from tests.numerics.affine import moments, start
from tests.numerics.exact import Gaussian, Mixture, as_field

F64 = torch.float64
PATHS = ["vp", "ve", "edm", "rectified_flow"]


def _score(data, x, t):
    s = data.process.schedule
    return (s.alpha(t) * data.x0_hat(x, t) - x) / s.sigma(t) ** 2


@pytest.mark.parametrize("schedule", ["vp", "ve"])
def test_the_corrector_is_that_of_song(schedule):
    """Song 2021, algorithm 4 (VE) and 5 (VP, with alpha_i = abar_i / abar_(i-1)), after any predictor."""
    data, noise, r = Mixture(gaussian(schedule), d=6), Noise(2, range(3)), 0.16
    grid = make_grid("log_snr", 6, data.process)
    times = [as_time(t) for t in grid.times]
    x = data.draw(grid.times[0], 3)
    out = sample(data.x0_hat, data.process, x, PredictorCorrector(Multistep(1), 2, snr=r), grid=grid, generator=noise)
    abar = [float(data.process.schedule.alpha(t)) ** 2 for t in times] + [1.0]
    for i in range(1, len(times)):
        x = sample(data.x0_hat, data.process, x, Multistep(1), grid=grid.times[i - 1 : i + 1])
        for j in range(2):
            z, g = noise.draw(i - 1, f"langevin/{j}", x), _score(data, x, times[i])
            e = 2 * abar[i] / abar[i + 1] * (r * z.norm(dim=1) / g.norm(dim=1)) ** 2
            x = x + e[:, None] * g + (2 * e[:, None]).sqrt() * z
    torch.testing.assert_close(out, data.x0_hat(x, times[-1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("final", [False, True])
def test_annealed_langevin_is_algorithm_1(final):
    """Song 2019 (NCSN), algorithm 1 with T steps a level, from a draw from the first; denoised at the end or not."""
    data, noise, steps = Mixture(gaussian("ve"), d=3), Noise(6, range(2)), 7
    grid = make_grid("log_snr", 5, data.process, final=final)
    sigmas = [float(data.process.schedule.sigma(as_time(t))) for t in grid.times]
    x = data.draw(grid.times[0], 2)
    epsilon = 2 * 0.3 * sigmas[-1] ** 2
    solver = PredictorCorrector(None, steps, size=epsilon / (2 * sigmas[-1] ** 2))
    out = sample(as_field(data, "score"), data.process, x, solver, grid=grid, generator=noise)
    for i, sigma in enumerate(sigmas[1:]):
        a = epsilon * sigma**2 / sigmas[-1] ** 2
        for j in range(steps):
            t = as_time(grid.times[i + 1])
            x = x + 0.5 * a * _score(data, x, t) + math.sqrt(a) * noise.draw(i, f"langevin/{j}", x)
    x = data.x0_hat(x, as_time(grid.times[-1])) if final else x
    torch.testing.assert_close(out, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", ["vp", "rectified_flow", "edm", "sub_vp"])
def test_annealed_langevin_is_the_same_on_every_path(schedule):
    """In y = x / alpha only sigma / alpha is left, so a path that passes through the same levels gives the same y."""
    levels = torch.linspace(math.log(5.0), math.log(0.05), 9, dtype=F64)
    outs = []
    for name in ("ve", schedule):
        data = Mixture(gaussian(name))
        s = data.process.schedule
        times = s.t_of_log_snr(-levels)
        x = s.alpha(times[0]) * Mixture(gaussian("ve")).draw(gaussian("ve").schedule.t_of_log_snr(-levels[0]), 4)
        out = sample(data.x0_hat, data.process, x, PredictorCorrector(None, 5, size=0.2), grid=times, generator=3)
        outs.append(out / s.alpha(times[-1]))
    torch.testing.assert_close(*outs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("schedule", PATHS)
@pytest.mark.parametrize("size", [0.01, 0.1, 0.5])
def test_the_stationary_variance_is_that_of_the_linear_recursion(schedule, size):
    """On Gaussian data of total variance V the fixed point is V / (1 - q sigma^2 / (2V)), the mean is exact."""
    data = Gaussian(gaussian(schedule))
    t, s = 0.45, 0.4
    mean, total = start(data, s)
    sigma2 = float(data.process.schedule.sigma(as_time(s))) ** 2
    fixed = total / (1 - size * sigma2 / (2 * total))
    solver = PredictorCorrector(Multistep(1), 4, size=size)
    first = data.flow(start(data, t)[0][None], t, s)[0]  # the mean is carried exactly by the predictor as well
    torch.testing.assert_close(first, mean)
    before = sample(data.x0_hat, data.process, torch.stack([mean * 0, mean * 0 + 1]), Multistep(1), grid=[t, s])
    slope = before[1] - before[0]
    found = moments(solver, data, Grid((t, s)), (mean - before[0]) / slope, fixed / slope**2)
    torch.testing.assert_close(found[0], mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], fixed, rtol=1e-9, atol=1e-9)
    off = moments(solver, data, Grid((t, s)), (mean - before[0]) / slope, 3 * fixed / slope**2)[1]
    torch.testing.assert_close(off - fixed, 2 * fixed * (1 - size * sigma2 / total) ** 8, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", ["vp", "rectified_flow"])
def test_corrections_mend_a_coarse_predictor(schedule):
    """Ten steps of DDPM leave the variance of Gaussian data far too small; Langevin steps bring it back."""
    data = Gaussian(gaussian(schedule), std=(0.3, 0.6, 1.0))
    grid = make_grid("log_snr", 10, data.process, t_end=0.3, final=False)
    predictor, wanted = Multistep(1, eta=1.0, noise_form="ancestral"), start(data, 0.3)[1]

    def error(solver):
        return float((moments(solver, data, grid, *start(data, data.process.t_max))[1] / wanted - 1).abs().max())

    assert error(predictor) > 0.15
    assert error(PredictorCorrector(predictor, 20, size=0.1)) < 0.35 * error(predictor)


@pytest.mark.parametrize(
    "solver",
    [
        PredictorCorrector(None, 20, size=0.05),
        PredictorCorrector(Multistep(2, eta=1.0, corrector="exact"), 2, snr=0.05),
    ],
)
def test_the_marginal_of_a_mixture_is_kept(solver):
    data = Mixture(gaussian("vp"), std=0.5)
    grid, n = make_grid("log_snr", 60, data.process, t_end=0.25, final=False), 2000
    x, exact = data.draw(1.0, n)[None], data.draw(0.25, 200_000, seed=9)
    out = sample(lambda x, t: data.x0_hat(x[0], t)[None], data.process, x, solver, grid=grid, generator=1)[0]
    error = (out.mean(0) - exact.mean(0)).abs() / (exact.std(0) / math.sqrt(n))
    spread = out.T.cov() - exact.T.cov()
    assert float(error.max()) < 4.2
    assert float(spread.abs().max()) < (4.2 * math.sqrt(2 / n) + 0.02) * float(exact.var(0).max())


def test_calls_are_as_declared_and_the_ends_have_no_langevin_steps():
    data = Mixture(gaussian("rectified_flow"))
    grid = make_grid("uniform", 6, data.process, t_start=1.0)
    for solver, calls in (
        (PredictorCorrector(EulerMaruyama(), 2, snr=0.1), 5 * 3 + 1),
        (PredictorCorrector(None, 3, size=0.1), 1 + 5 * 3 + 1),
    ):
        denoise = count(as_field(data, "velocity"))
        out = sample(denoise, data.process, data.draw(1.0, 2), solver, grid=grid, generator=0)
        assert denoise.calls == solver.calls(solver.plan(data.process, grid)) == calls and bool(out.isfinite().all())
    assert NAMES["pc"].stages == 2 and NAMES["langevin"].stages == 100 and NAMES["pc"].stochastic


def test_a_predictor_may_be_named():
    named = PredictorCorrector("ddpm", snr=0.16)
    assert named == NAMES["pc"].solver and hash(named) == hash(NAMES["pc"].solver)


def test_norms_are_those_of_an_item_over_its_valid_elements():
    """An item of any length and company moves as it would alone; fixed elements stay where they are."""
    process = gaussian("edm", mean_free=True)
    mask = torch.arange(5) < torch.tensor([[5], [3], [0]])
    fixed = torch.zeros(3, 5, dtype=torch.bool)
    fixed[0, 1] = True
    x = process.project(torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0), dtype=F64), mask, fixed)
    x[0, 1] = 7.0
    solver = PredictorCorrector(Multistep(1), 2, snr=0.2)

    def run(rows, size):
        return sample(
            lambda x_t, t: 0.5 * x_t + 3.0 * ~mask[rows, :size, None],  # a network may say anything of padding
            process,
            x[rows, :size],
            solver,
            grid=[0.5, 0.4, 0.3],
            mask=mask[rows, :size],
            fixed=fixed[rows, :size],
            generator=Noise(5, [10 + row for row in rows]),
        )

    out = run([0, 1, 2], 5)
    assert bool((out[0, 1] == 7.0).all()) and bool(out.isfinite().all())
    torch.testing.assert_close(out[1:2, :3], run([1], 3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[1, :3].sum(0), torch.zeros(2, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: PredictorCorrector(Multistep(1), 0, snr=0.1), "corrections"),
        (lambda: PredictorCorrector(Multistep(1), -1, snr=0.1), "corrections"),
        (lambda: PredictorCorrector(Multistep(1), 1.5, snr=0.1), "corrections"),
        (lambda: PredictorCorrector(Multistep(1)), "exactly one"),
        (lambda: PredictorCorrector(Multistep(1), snr=0.1, size=0.1), "exactly one"),
        (lambda: PredictorCorrector(Multistep(1), snr=0.0), "snr"),
        (lambda: PredictorCorrector(Multistep(1), snr=-0.1), "snr"),
        (lambda: PredictorCorrector(Multistep(1), snr=math.inf), "snr"),
        (lambda: PredictorCorrector(Multistep(1), snr=math.nan), "snr"),
        (lambda: PredictorCorrector(None, size=0.0), "size"),
        (lambda: PredictorCorrector(None, size=2.0), "size"),
        (lambda: PredictorCorrector(None, size=math.nan), "size"),
        (lambda: PredictorCorrector(None, size="a"), "size"),
        (lambda: PredictorCorrector("ddpn", snr=0.1), "did you mean ddpm"),
        (lambda: PredictorCorrector(5, snr=0.1), "a solver is a name or a Solver, not 5"),
        (
            lambda: PredictorCorrector(Resample(Multistep(1)), snr=0.1).plan(gaussian("vp"), Grid((0.5, 0.4, 0.3))),
            "goes up again",
        ),
    ],
)
def test_settings_without_meaning_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
