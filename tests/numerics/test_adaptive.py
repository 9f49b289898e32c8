"""The adaptive solver and encoding: closed forms, tolerances, items that do not see each other, errors that say where."""

from __future__ import annotations

import math

import pytest
import torch

from polydiff.core.denoiser import Prediction
from polydiff.core.errors import ConfigError, DivergenceError, ScheduleError
from polydiff.core.grids import make_grid
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.sampling import count, encode, sample
from polydiff.core.schedules import VP
from polydiff.core.solvers import NAMES, Adaptive, Multistep, PredictorCorrector, RungeKutta
from tests.numerics.exact import Gaussian, Mixture, as_field, slope

F64 = torch.float64
PATHS = ("vp", "sub_vp", "ve", "edm", "cosine", "rectified_flow")


def _rms(x):
    return float(x.pow(2).mean().sqrt())


@pytest.mark.parametrize("schedule", PATHS)
def test_the_flow_of_gaussian_data_is_met_to_the_tolerance_both_ways(schedule):
    data = Gaussian(gaussian(schedule))
    process = data.process
    times = (process.t_max, process.t_min)
    x = data.draw(times[0], 6)
    truth = data.flow(x, *times)
    for tolerance in (1e-4, 1e-7):
        solver = Adaptive(tolerance, tolerance)
        out = sample(data.x0_hat, process, x, solver, grid=times)
        assert _rms(out - truth) < 5 * tolerance
        scale = max(1.0, float(process.schedule.sigma(torch.tensor(times[0]))))
        assert _rms(encode(data.x0_hat, process, truth, solver, grid=times) - x) / scale < 5 * tolerance


def test_the_error_falls_with_the_fifth_power_of_the_calls():
    data = Mixture(gaussian("vp"), std=0.7)
    x = data.draw(1.0, 1)
    grid = (1.0, 1e-3)
    truth = sample(data.x0_hat, data.process, x, Adaptive(1e-13, 1e-13), grid=grid)
    found = []
    for tolerance in (1e-5, 1e-10):
        denoise = count(data.x0_hat)
        out = sample(denoise, data.process, x, Adaptive(tolerance, tolerance), grid=grid)
        found.append((denoise.calls, _rms(out - truth)))
    (n0, e0), (n1, e1) = found
    assert math.log(e0 / e1) / math.log(n1 / n0) > 4.5


@pytest.mark.parametrize("name", ["ddim", "heun", "midpoint", "rk4", "ab2-v", "dpmpp-2m"])
def test_deterministic_solvers_encode_with_their_order(name):
    """The same numbers serve a grid that runs upward."""
    data = Gaussian(gaussian("vp"), std=(0.7, 1.0, 1.3), mean=(0.1, -0.2, 0.3))
    start, end, solver = 0.6, 0.05, NAMES[name].solver
    x = data.draw(end, 8)
    truth = data.flow(x, end, start)

    def error(n):
        grid = make_grid("uniform", n, data.process, start, end, final=False)
        return _rms(encode(data.x0_hat, data.process, x, solver, grid=grid) - truth)

    assert slope(error, {1: 64, 2: 32}.get(solver.order, 16), low=1e-12) >= solver.order - 0.15


@pytest.mark.parametrize("schedule", PATHS)
def test_encoding_then_decoding_returns_the_state(schedule):
    data = Mixture(gaussian(schedule), d=4)
    process, solver = data.process, Adaptive(1e-8, 1e-8)
    x = data.draw(process.t_min, 3)
    grid = make_grid("karras", 4, process, final=False)
    z = encode(data.x0_hat, process, x, solver, grid=grid)
    assert float((sample(data.x0_hat, process, z, solver, grid=grid) - x).abs().max()) <= 1e-5


def test_a_named_grid_is_encoded_over_as_many_steps_up_to_the_noisiest_time():
    data = Gaussian(gaussian("vp"))
    x = data.draw(1e-3, 4)
    denoise = count(data.x0_hat)
    out = encode(denoise, data.process, x, "ddim", steps=7, grid="log_snr")
    assert denoise.calls == 7
    torch.testing.assert_close(encode(data.x0_hat, data.process, x), data.flow(x, 1e-3, 1.0), rtol=1e-4, atol=1e-4)
    assert _rms(out - data.flow(x, 1e-3, 1.0)) < 0.5


def test_items_do_not_see_their_batch():
    data = Mixture(gaussian("cosine"), d=3)
    x = data.draw(0.999, 5)
    times = (0.999, 0.4, 1e-3)
    together = sample(data.x0_hat, data.process, x, "rk45", grid=times)
    for i in range(5):
        alone = sample(data.x0_hat, data.process, x[i : i + 1], "rk45", grid=times)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-10, atol=1e-10)


def test_padding_does_not_change_an_item_and_mean_free_states_stay_so():
    process = GaussianProcess(VP(), mean_free=True)
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True] * 3 + [False] * 4, [True] * 7])
    x = process.project(torch.randn(2, 7, 3, generator=g, dtype=F64), mask)

    def of(m):
        return lambda x_t, t: process.project(torch.tanh(x_t), m)

    out = sample(of(mask), process, x, "rk45", grid=(1.0, 1e-3), mask=mask)
    alone = sample(of(None), process, x[:1, :3], "rk45", grid=(1.0, 1e-3))
    torch.testing.assert_close(out[:1, :3], alone, rtol=1e-10, atol=1e-10)
    assert float(out[0, 3:].abs().max()) == 0 and float(out.sum(1).abs().max()) < 1e-10
    back = encode(of(mask), process, out, Adaptive(1e-9, 1e-9), grid=(1.0, 1e-3), mask=mask)
    assert float((back - x).abs().max()) < 1e-2


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 1, 4, 2)])
def test_states_have_any_rank(shape):
    process = gaussian("rectified_flow")
    variance = 0.25
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=g, dtype=F64)

    def denoise(x_t, t):
        t = t.reshape(t.shape + (1,) * (x_t.ndim - 1)) if t.ndim else t
        return (1 - t) * variance / ((1 - t) ** 2 * variance + t**2) * x_t

    out = sample(denoise, process, x, Adaptive(1e-9, 1e-9), grid=(0.999, 1e-3))
    total = lambda t: math.sqrt((1 - t) ** 2 * variance + t**2)
    torch.testing.assert_close(out, x * total(1e-3) / total(0.999), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("field", ["x0", "v", "velocity"])
@pytest.mark.parametrize("schedule", ["cosine", "rectified_flow"])
def test_both_infinite_ends_are_taken_at_first_order(schedule, field):
    data = Mixture(gaussian(schedule))
    x = data.draw(1.0, 4)
    denoise = count(as_field(data, field))
    out = sample(denoise, data.process, x, "rk45", grid=make_grid("uniform", 6, data.process, t_start=1.0))
    reference = sample(
        data.x0_hat, data.process, x, RungeKutta("rk4", "v"), grid=make_grid("uniform", 6, data.process, 1.0)
    )
    assert _rms(out - reference) < 0.1 * _rms(reference) and denoise.calls > 7
    with pytest.raises(ScheduleError, match="alpha"):
        sample(as_field(data, "eps"), data.process, x, "rk45", grid=(1.0, 0.5))
    one = sample(lambda *_: torch.full_like(x, 0.25), data.process, x, "rk45", steps=3)
    torch.testing.assert_close(one, torch.full_like(x, 0.25))


def test_intervals_resume_with_the_slope_and_the_step_they_had():
    data = Mixture(gaussian("vp"))
    x = data.draw(1.0, 3)
    calls = []
    for grid in ((1.0, 1e-3), (1.0, 0.3, 1e-3)):
        denoise = count(data.x0_hat)
        sample(denoise, data.process, x, "rk45", grid=grid)
        calls.append(denoise.calls)
    assert all(n % 6 == 1 for n in calls) and calls[1] <= calls[0] + 12


def test_single_precision_is_kept():
    data = Mixture(gaussian("vp"))
    x = data.draw(1.0, 3)
    double = sample(data.x0_hat, data.process, x, "rk45", steps=4)
    seen = []

    def denoise(x_t, t):
        seen.append((x_t.dtype, t.dtype, tuple(t.shape)))
        return data.x0_hat(x_t.double(), t).float()

    single = sample(denoise, data.process, x.float(), "rk45", steps=4)
    assert single.dtype == torch.float32 and {row[:2] for row in seen} == {(torch.float32, F64)}
    assert {row[2] for row in seen} == {(3,)}  # a time for every item, which leaves nothing for the next call
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3)


def test_a_step_that_cannot_reach_the_tolerance_says_where():
    process = gaussian("vp")
    x = torch.tensor([[0.1], [2.0]], dtype=F64)
    g = torch.Generator().manual_seed(0)

    def rough(x_t, t):  # the second item is given noise once its time is small enough
        noise = torch.randn(x_t.shape, generator=g, dtype=F64)
        return torch.where((x_t.abs() > 0) & (torch.arange(2)[:, None] == 1), 50 * noise, 0 * x_t)

    with pytest.raises(DivergenceError, match=r"item 1 .*rtol = 1e-05.* at t = "):
        sample(rough, process, x, Adaptive(max_steps=60), grid=(0.8, 0.2))


def test_a_state_that_was_moved_has_another_slope():
    """Langevin steps between the intervals: integration starts anew, and the tolerance holds as without them."""
    data = Mixture(gaussian("vp"))
    x = data.draw(1.0, 4)
    grid = make_grid("log_snr", 8, data.process)
    found = [
        sample(data.x0_hat, data.process, x, PredictorCorrector(Adaptive(tol, tol), size=0.3), grid=grid, generator=0)
        for tol in (1e-11, 1e-5)
    ]
    assert _rms(found[1] - found[0]) < 1e-4


def test_fixed_elements_do_not_count_in_the_error():
    """What a network says of them may be as rough as it likes."""
    process, g = gaussian("vp"), torch.Generator().manual_seed(0)
    fixed = torch.tensor([[False, True, False]])
    denoise = count(lambda x_t, t: 0.5 * x_t + 50 * fixed * torch.randn(x_t.shape, generator=g, dtype=F64))
    x = torch.tensor([[0.4, 2.0, -1.0]], dtype=F64)
    out = sample(denoise, process, x, Adaptive(max_steps=60), grid=(0.8, 0.2), fixed=fixed)
    alone = sample(lambda x_t, t: 0.5 * x_t, process, x, Adaptive(1e-9, 1e-9), grid=(0.8, 0.2))
    assert float(out[0, 1]) == 2.0
    torch.testing.assert_close(out[~fixed], alone[~fixed], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_is_sampled_of_nothing(shape):
    x = torch.zeros(shape, dtype=F64)
    for run in (sample, encode):
        assert run(lambda x_t, t: x_t, gaussian("vp"), x, "rk45", steps=3).shape == shape


@pytest.mark.parametrize(
    "options",
    [
        *({"rtol": 0.0}, {"atol": math.nan}, {"rtol": -1.0}, {"max_steps": 0}),
        *({"rtol": "1"}, {"atol": None}, {"max_steps": 2.5}, {"max_steps": True}),
    ],
)
def test_impossible_tolerances_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Adaptive(**options)


@pytest.mark.parametrize("solver", ["ddpm", "edm", Multistep(2, eta=0.5)])
def test_encoding_refuses_solvers_with_noise(solver):
    with pytest.raises(ConfigError, match="without noise"):
        encode(lambda x, t: x, gaussian("vp"), torch.ones(1, 2), solver)


def test_encoding_cannot_start_where_nothing_is_left_to_denoise():
    process = gaussian("vp")
    for solver in ("rk45", "ddim", "heun"):
        with pytest.raises(ScheduleError, match="sigma = 0"):
            encode(lambda x, t: Prediction(process, x, t, x0=x), process, torch.ones(1, 2), solver, grid=[0.5, 0.0])
