"""Going up again: the way of the published algorithms, its noise, its memory, its calls, and what it does to errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from polydiff.core.errors import ConfigError, ScheduleError
from polydiff.core.grids import Grid, make_grid
from polydiff.core.noise import Noise, Projected
from polydiff.core.processes import gaussian
from polydiff.core.sampling import count, encode, sample
from polydiff.core.schedules import as_time
from polydiff.core.solvers import NAMES, Adaptive, Multistep, PredictorCorrector, Resample, RungeKutta
from tests.numerics.affine import moments, start
from tests.numerics.exact import Gaussian, Mixture

F64 = torch.float64


def _repaint(length, jump, repeats):
    """Lugmayr 2022, the schedule of jumps of section 4.2: numbers of noise levels, the last one (-1) without noise."""
    left = dict.fromkeys(range(0, length - jump, jump), repeats)
    level, visited = length, []
    while level >= 1:
        level -= 1
        visited.append(level)
        if left.get(level, 0) > 0:
            left[level] -= 1
            level += jump
            visited.append(level)
    return [*visited, -1]


@pytest.mark.parametrize("length,jump,repeats", [(20, 3, 2), (20, 1, 1), (21, 10, 3), (7, 6, 2), (9, 4, 0)])
def test_the_way_is_that_of_repaint(length, jump, repeats):
    process = gaussian("vp")
    grid = make_grid("uniform", length, process)
    plan = Resample(Multistep(1), repeats, jump).plan(process, grid)
    levels = [length - 1 - grid.times.index(point.time) if point.time else -1 for point in plan.points]
    walked: list[int] = []  # every level that is come to, by a step or by going up
    for step, here, there in zip(plan.steps, levels, levels[1:], strict=False):
        ends = [length - 1 - grid.times.index(point.time) if point.time else -1 for point in step.inner.points]
        walked += [here] if step.below is not None or not walked else []
        walked.append(ends[step.k + 1])
        assert here == ends[step.k] and (there == walked[-1] or there == walked[-1] + jump)
    assert walked == _repaint(length, jump, repeats)


def test_restart_takes_the_published_number_of_calls():
    """Xu 2023: 18 steps of Heun and two restarts of two intervals each from 0.06 to 0.30 take 43 evaluations."""
    data = Mixture(gaussian("edm"))
    solver, grid = NAMES["restart"].solver, make_grid("karras", 18, data.process)
    denoise = count(data.x0_hat)
    sample(denoise, data.process, data.draw(1.0, 2), solver, grid=grid, generator=0)
    plan = solver.plan(data.process, grid)
    assert denoise.calls == solver.calls(plan) == 43
    sigma = [float(data.process.schedule.sigma(point.t)) for point in plan.points]
    up = [k for k, step in enumerate(plan.steps) if step.below is not None]
    low = min(data.process.schedule.sigma(as_time(grid.times)).tolist(), key=lambda level: abs(math.log(level / 0.06)))
    assert len(up) == 2 and all(sigma[k] == pytest.approx(0.3) for k in up)
    for k in up:
        middle = ((0.3 ** (1 / 7) + low ** (1 / 7)) / 2) ** 7
        assert sigma[k + 1] == pytest.approx(middle) and float(
            data.process.schedule.sigma(plan.steps[k].below.t)
        ) == pytest.approx(low)


@pytest.mark.parametrize("inner", [Multistep(3, "x0"), Multistep(2, "x0", eta=0.6), RungeKutta("heun", "eps")])
@pytest.mark.parametrize("window", [True, False])
def test_passes_are_those_of_the_solver_started_anew(inner, window):
    """The same, pass by pass through ``sample`` and ``renoise``: no memory is carried up, every pass has its own noise."""
    data = Mixture(gaussian("vp"))
    process, noise = data.process, Noise(4, range(3))
    grid = make_grid("log_snr", 8, process)
    x = data.draw(grid.times[0], 3)
    if window:
        levels = torch.exp(-process.schedule.log_snr(as_time(grid.times)))
        low, high = 5, 0.5 * float(levels[3] + levels[2])
        solver = Resample(inner, 2, 4, low=float(levels[5]) * 1.01, high=high)
        top = float(process.schedule.t_of_log_snr(as_time(-math.log(high))))
        again = make_grid("karras", 4, process, top, grid.times[low], final=False).times
        ways = [grid.times[: low + 1], again, again, grid.times[low:]]
    else:
        solver, t = Resample(inner, 1, 3), grid.times
        ways = [t[:5], t[1:5], t[4:8], t[4:8], t[7:]]
    out = sample(data.x0_hat, process, x, solver, grid=grid, generator=noise)

    class Later(Noise):
        """The noise of one pass."""

        def __init__(self, number):
            super().__init__(noise.seed, noise.items)
            self.number = number

        def draw(self, k, purpose, like, t=None, s=None, mask=None):
            return super().draw(k, f"{purpose}/pass-{self.number}" if self.number else purpose, like, t, s, mask)

    before = None
    for number, way in enumerate(ways):
        if before is not None and way[0] > before:
            x = process.renoise(x, before, way[0], Later(number).draw(0, "renoise", x))
        before, last = way[-1], number == len(ways) - 1
        if last and len(way) == 1:
            x = data.x0_hat(x, as_time(way[0]))
            continue
        # a pass is the beginning of the way to the end, which a solver may take into account
        x = sample(data.x0_hat, process, x, inner, grid=Grid(way, final=last), generator=Later(number))
    torch.testing.assert_close(out, x, rtol=1e-9, atol=1e-9)


def test_every_draw_is_fresh_and_the_first_pass_is_the_solver_itself():
    data = Mixture(gaussian("vp"))
    x, drawn = data.draw(1.0, 2), []

    class Spy(Noise):
        def draw(self, k, purpose, like, t=None, s=None, mask=None):
            z = super().draw(k, purpose, like, t, s, mask)
            drawn.append(z)
            return z

    inner = Multistep(1, eta=1.0)
    sample(data.x0_hat, data.process, x, Resample(inner, 3, 2), steps=7, generator=Spy(0, range(2)))
    assert len(drawn) == 6 + 3 * 3 * (2 + 1)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    for none in (Resample(inner, 0, 2), Resample(inner, 0, low=0.1, high=1.0)):
        assert torch.equal(
            sample(data.x0_hat, data.process, x, none, steps=7, generator=5),
            sample(data.x0_hat, data.process, x, inner, steps=7, generator=5),
        )


def test_callbacks_get_the_time_each_step_starts_from():
    data, seen, asked = Mixture(gaussian("vp")), [], []

    def denoise(x_t, t):
        asked.append(float(t))
        return data.x0_hat(x_t, t)

    sample(
        denoise,
        data.process,
        data.draw(1.0, 2),
        Resample(Multistep(2), 2, 2),
        grid=[0.9, 0.7, 0.5, 0.3, 0.1],
        generator=0,
        callback=lambda k, t, x, x0_hat: seen.append(float(t)),
    )
    assert seen == asked == [0.9, 0.7] * 3 + [0.5, 0.3] * 3


@pytest.mark.parametrize("schedule", ["vp", "ve", "edm", "rectified_flow"])
def test_restarts_contract_errors_and_keep_the_marginal(schedule):
    """Xu 2023, theorem 1 on Gaussian data: a wrong variance at the low end shrinks by the share that survives a restart."""
    data = Gaussian(gaussian(schedule), std=(0.3, 0.5, 0.8))
    s = data.process.schedule
    low, high = (float(s.t_of_log_snr(as_time(-math.log(level)))) for level in (0.2, 2.0))
    grid = make_grid("log_snr", 3, data.process, float(s.t_of_log_snr(as_time(-math.log(2.1)))), low, final=False)
    mean, variance = start(data, grid.times[0])
    for repeats in (1, 3):
        solver = Resample(RungeKutta("rk4", "v"), repeats, 60, low=0.2, high=2.0)
        found = moments(solver, data, grid, mean, variance)[1]
        wrong = moments(solver, data, grid, mean, 1.5 * variance)[1]
        ratio = (s.alpha(as_time(high)) / s.alpha(as_time(low))) ** 2
        kept = ratio * start(data, low)[1] / start(data, high)[1]
        exact = start(data, low)[1]
        first = moments(RungeKutta("rk4", "v"), data, grid, mean, 0.5 * variance)[1]
        torch.testing.assert_close(wrong - found, first * kept**repeats, rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(found, exact, rtol=0.03 if repeats == 1 else 1e-3, atol=0)


def test_repeated_stretches_keep_the_marginal():
    """On Gaussian data, repeated stretches of the reverse SDE end in the marginal of the data."""
    data = Gaussian(gaussian("vp"))
    grid = make_grid("log_snr", 200, data.process, t_end=0.1, final=False)
    found = moments(Resample(Multistep(2, eta=1.0), 2, 10), data, grid, *start(data, 1.0))
    wanted = start(data, 0.1)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0.01)
    torch.testing.assert_close(found[1], wanted[1], rtol=0.03, atol=0)


@pytest.mark.parametrize(
    "inner",
    [Adaptive(), PredictorCorrector(Multistep(2, eta=1.0), snr=0.1), Multistep(3, startup="full"), Multistep(1)],
)
def test_any_solver_can_be_repeated(inner):
    data = Mixture(gaussian("cosine"))
    solver, grid = Resample(inner, 1, 3), make_grid("uniform", 7, data.process, t_start=1.0)
    denoise = count(data.x0_hat)
    out = sample(denoise, data.process, data.draw(1.0, 2), solver, grid=grid, generator=0)
    assert float(out.abs().max()) < 10 and (solver.order, solver.stages) == (inner.order, inner.stages)
    declared = solver.calls(solver.plan(data.process, grid))
    assert declared is None if isinstance(inner, Adaptive) else declared == denoise.calls


def test_a_solver_may_be_named_and_alone_it_encodes():
    data = Mixture(gaussian("vp"))
    x = data.draw(data.process.t_min, 2)
    assert Resample("ddim", 2) == Resample(Multistep(1), 2)
    found = [encode(data.x0_hat, data.process, x, solver, steps=5) for solver in (Resample("ddim", 0), "ddim")]
    assert torch.equal(*found)
    with pytest.raises(ScheduleError, match="decrease"):
        Resample("ddim", 1).plan(data.process, Grid((0.1, 0.2, 0.3), upward=True))


def test_going_up_leaves_padding_fixed_elements_and_the_mean_alone():
    process = gaussian("edm", mean_free=True)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    fixed = torch.zeros(2, 5, dtype=torch.bool)
    fixed[0, 1] = True
    x = process.project(torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0), dtype=F64), mask, fixed)
    x[0, 1] = 7.0
    seen = []

    def denoise(x_t, t):
        seen.append(x_t)
        return 0.5 * x_t

    out = sample(
        denoise, process, x, Resample(Multistep(1), 1, 2), grid=[0.5, 0.4, 0.3], mask=mask, fixed=fixed, generator=0
    )
    for state in (*seen, out):
        assert bool((state[0, 1] == 7.0).all()) and float(state[1, 3:].abs().max()) == 0
        torch.testing.assert_close(state[1].sum(0), torch.zeros(2, dtype=F64), rtol=0, atol=1e-12)
    z = Projected(Noise(0, range(2)), process, mask, fixed, "/pass-1").draw(0, "renoise", x)
    assert float(z[0].sum(0).abs().min()) > 1e-3  # items with fixed elements keep the mean of their noise
    high, mid, low = (float(process.schedule.sigma(as_time(t))) for t in (0.5, 0.4, 0.3))
    bottom = seen[0][0] * (0.5 + 0.5 * mid / high) * (0.5 + 0.5 * low / mid)
    raised = bottom + math.sqrt(high**2 - low**2) * z[0]
    torch.testing.assert_close(seen[2][0, [0, 2, 3, 4]], raised[[0, 2, 3, 4]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: Resample(Multistep(1), -1), "repeats"),
        (lambda: Resample(Multistep(1), 1, 0), "jump"),
        (lambda: Resample(Multistep(1), 0.5, 2), "repeats"),
        (lambda: Resample(Multistep(1), 1001), "repeats = 1001 .* from 0 to 1,000"),
        (lambda: Resample(Multistep(1), True), "repeats"),
        (lambda: Resample("dim"), "did you mean ddim"),
        (lambda: Resample(None), "a solver is a name or a Solver"),
        (lambda: Resample(Multistep(1), low="a", high=1.0), "low"),
        (lambda: Resample(Multistep(1), low=0.1), "window"),
        (lambda: Resample(Multistep(1), high=0.1), "window"),
        (lambda: Resample(Multistep(1), low=0.3, high=0.1), "window"),
        (lambda: Resample(Multistep(1), low=0.0, high=0.1), "window"),
        (lambda: Resample(Multistep(1), low=math.nan, high=0.1), "window"),
        (lambda: Resample(Multistep(1), low=0.1, high=math.inf), "window"),
    ],
)
def test_settings_without_meaning_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


@pytest.mark.parametrize(
    "solver,match",
    [
        (Resample(Multistep(1), 1, 3), "jump = 3 is longer than a grid of 2"),
        (Resample(Multistep(1), low=1e-4, high=1e-3), "window"),
        (Resample(Multistep(1), low=1e6, high=1e7), "window .*: take more steps or another window"),
        (Resample(Resample(Multistep(1))), "goes up again"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(solver, match):
    with pytest.raises(ConfigError, match=match):
        solver.plan(gaussian("vp"), Grid((0.5, 0.4, 0.3), final=True))
