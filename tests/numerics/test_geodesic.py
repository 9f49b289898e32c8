"""Geodesic solvers: orders, marginals, and what they become in flat space."""

from __future__ import annotations

import math

import pytest
import torch

from polydiff.core import rotations
from polydiff.core.denoiser import Prediction
from polydiff.core.errors import ConfigError, DivergenceError, ScheduleError
from polydiff.core.grids import Grid, make_grid
from polydiff.core.guidance import Replacement, cfg, cfg_pp, classifier_guidance
from polydiff.core.noise import Noise
from polydiff.core.processes import ProductProcess, SO3Flow, SO3Process, gaussian
from polydiff.core.processes.igso3 import igso3_cdf
from polydiff.core.rotation_schedules import LogLinear, Quadratic
from polydiff.core.sampling import count, encode, sample
from polydiff.core.schedules import EDM, VE, as_time
from polydiff.core.solvers import NAMES, Geodesic, Multistep, Resample
from tests.numerics.exact import Gaussian, Mixture, as_field, slope
from tests.numerics.exact_rotations import F64, Heat, Points, kolmogorov, normal, rotation

SCHEDULES = [VE(0.02, 2.5), EDM(0.02, 2.5), LogLinear(0.02, 2.5), Quadratic(0.02, 2.5)]
ONE = [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]


def heat(schedule=SCHEDULES[0], scale=0.3):
    return Heat(SO3Process(schedule), torch.tensor([ONE], dtype=F64), scale)


def angle_between(first, second):
    return rotations.angle(rotations.relative(first, second))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("order", [1, 2])
def test_orders_on_one_centre(order, schedule):
    data = heat(schedule)
    x, start, end = data.draw(0.8, 16), 0.8, 0.3
    truth = data.flow(x, start, end)

    def error(n):
        grid = make_grid("log_snr", n, data.process, start, end, final=False)
        out = sample(data, data.process, x, Geodesic(order), grid=grid)
        return float(angle_between(out, truth).square().mean().sqrt())

    assert -0.15 <= slope(error, 32, low=1e-12, high=0.1) - order <= 0.3


@pytest.mark.parametrize("order", [1, 2])
def test_orders_where_directions_turn(order):
    """Between two centres tangents at both ends of a step do not commute; errors against a fine run of the same."""
    centres = rotations.exp(torch.tensor([[0.0, 0, 0], [1.2, 0.5, -0.4]], dtype=F64))
    data = Heat(SO3Process(VE(0.02, 2.5)), centres, 0.3, (0.3, 0.7))
    x, start, end = data.draw(0.8, 8), 0.8, 0.4
    run = lambda n, order: sample(
        data, data.process, x, Geodesic(order), grid=make_grid("log_snr", n, data.process, start, end, final=False)
    )
    truth = run(400, 2)
    bent = run(64, 2)
    u = rotations.tangent(x, bent)
    assert float(torch.linalg.cross(u, data.score(bent, end)).norm(dim=-1).max()) > 0.1  # they do turn
    error = lambda n: float(angle_between(run(n, order), truth).square().mean().sqrt())
    assert -0.15 <= slope(error, 32, low=1e-12, high=0.1) - order <= 0.3


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 10.0])
def test_orders_on_a_flow(order, decay):
    data = Points(SO3Flow(decay), rotations.exp(torch.tensor([[0.3, 0, 0], [0.1, 0.2, 0.1]], dtype=F64)), (0.3, 0.7))
    start = float(data.process.schedule.t_of_log_snr(as_time(0.0)))
    end = float(data.process.schedule.t_of_log_snr(as_time(1.0)))
    x = rotations.retract(data.points[:1].expand(8, 1, 3, 3), 0.2 * normal(8, 1, 3))
    run = lambda n, order: sample(
        data, data.process, x, Geodesic(order), grid=make_grid("log_snr", n, data.process, start, end, final=False)
    )
    truth = run(400, 2)
    error = lambda n: float(angle_between(run(n, order), truth).square().mean().sqrt())
    assert -0.15 <= slope(error, 32, low=1e-12, high=0.1) - order <= 0.3


@pytest.mark.parametrize("decay", [0.0, 10.0])
@pytest.mark.parametrize("solver", ["geodesic", "geodesic-heun"])
def test_a_flow_splits_uniform_rotations_by_weight(decay, solver):
    points = rotations.exp(torch.tensor([[0.3, 0, 0], [0, 2.0, 1.4]], dtype=F64))
    data = Points(SO3Flow(decay), points, (0.25, 0.75))
    x = data.process.prior(torch.empty(3000, 1, 3, 3, dtype=F64), Noise(0, range(3000)))
    out = sample(data, data.process, x, solver, 40, "log_snr")
    gaps = angle_between(points, out)
    assert float(gaps.amin(1).max()) < 1e-2
    assert float((gaps[:, 0] < gaps[:, 1]).double().mean()) == pytest.approx(0.25, abs=0.025)


@pytest.mark.parametrize("process", [heat().process, SO3Flow(), SO3Flow(10.0)], ids=repr)
@pytest.mark.parametrize("solver", ["geodesic", "geodesic-heun"])
def test_final_interval_returns_x0_hat_and_calls_are_as_declared(process, solver):
    target = rotation(4, 2)
    denoise = count(lambda x_t, t: target)
    x = process.prior(target, Noise(0, range(4)))
    for grid in ("uniform", "log_snr", "karras"):
        denoise.calls = 0
        seen: list[tuple] = []
        out = sample(denoise, process, x, solver, 5, grid, callback=lambda *row, seen=seen: seen.append(row))
        assert torch.equal(out, target) and len(seen) == 5 and torch.equal(seen[2][3], target)
        plan = NAMES[solver].solver.plan(process, make_grid(grid, 5, process))
        assert denoise.calls == NAMES[solver].solver.calls(plan) == 4 * NAMES[solver].stages + 1
        rotations.check_rotations(seen[2][2])


def test_a_flow_goes_straight_in_any_steps():
    process, target = SO3Flow(10.0), rotation(4, 2)
    x = process.prior(target, Noise(0, range(4)))
    out = sample(lambda x_t, t: target, process, x, "geodesic", grid=[0.99, 0.9, 0.6, 0.2])
    share = float(process.schedule.sigma(as_time(0.2)) / process.schedule.sigma(as_time(0.99)))
    torch.testing.assert_close(process.tangent(target, out), share * process.tangent(target, x))


@pytest.mark.parametrize("schedule", ["vp", "edm", "rectified_flow"])
def test_on_a_gaussian_process_they_are_the_named_solvers(schedule):
    data = Mixture(gaussian(schedule))
    x = data.draw(data.process.t_max, 5)
    for solver, known in (
        ("geodesic", "ddim"),
        ("geodesic-heun", "heun-v"),
        ("geodesic-sde", Multistep(1, eta=1.0)),
        (Geodesic(1, 0.6), Multistep(1, eta=0.6)),
    ):
        found, expected = (
            sample(
                as_field(data, "v"), data.process, x, s, 6, "log_snr" if schedule != "vp" else "uniform", generator=1
            )
            for s in (solver, known)
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["geodesic", "geodesic-heun", "geodesic-sde"])
def test_small_rotations_are_flat(solver):
    """At angles of 1e-6 SO(3) is space: the samples are those of the Gaussian process with the same schedule."""
    schedule, start, end = VE(1e-7, 1e-6), 1.0, 0.0
    flat, curved = gaussian("ve", sigma_min=1e-7, sigma_max=1e-6), SO3Process(schedule)
    data, u = Gaussian(flat, std=(3e-7,) * 3, mean=(0, 0, 0)), 1e-6 * normal(6, 1, 3)
    grid = make_grid("log_snr", 7, flat, start, end, final=False)
    expected = sample(as_field(data, "score"), flat, u, solver.replace("geodesic-heun", "heun"), grid=grid, generator=3)
    found = sample(heat(schedule, 3e-7), curved, rotations.exp(u), solver, grid=grid, generator=3)
    assert float((rotations.log(found) - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("solver,steps,bound", [("geodesic-heun", 40, 0.042), ("geodesic-sde", 60, 0.06)])
def test_samples_follow_the_data(solver, steps, bound):
    data, n = heat(), 1500
    x = data.process.prior(torch.empty(n, 1, 3, 3, dtype=F64), Noise(0, range(n)))
    grid = make_grid("log_snr", steps, data.process, final=False)
    out = sample(data, data.process, x, solver, grid=grid, generator=1)
    assert kolmogorov(igso3_cdf(rotations.angle(out), data.spread(0.0))) < bound  # 0.042: 1 % critical at n = 1,500
    plain = sample(data, data.process, x, "geodesic", grid=make_grid("log_snr", 5, data.process, final=False))
    assert kolmogorov(igso3_cdf(rotations.angle(plain), data.spread(0.0))) > 0.1


def test_encode_and_sample_are_inverse():
    data = heat()
    x0 = data.draw(0.1, 16)
    grid = make_grid("log_snr", 200, data.process, 0.9, 0.1, final=False)
    there = encode(data, data.process, x0, "geodesic-heun", grid=grid)
    assert float(angle_between(there, data.flow(x0, 0.1, 0.9)).max()) < 1e-3
    assert float(angle_between(sample(data, data.process, there, "geodesic-heun", grid=grid), x0).max()) < 1e-3


def test_masks_fixed_elements_and_float32():
    data = heat()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    fixed = torch.tensor([[True, False, False], [False, False, False]])
    x = data.process.prior(torch.empty(2, 3, 3, 3), Noise(0, [0, 1]), mask)
    denoise = lambda x_t, t: Prediction(data.process, x_t, t, score=data.score(x_t.double(), t).float())
    out = sample(denoise, data.process, x, "geodesic-sde", 30, "log_snr", mask, fixed, generator=0)
    assert out.dtype == torch.float32 and torch.equal(out[fixed], x[fixed])
    torch.testing.assert_close(out[0, 2], torch.eye(3))
    rotations.check_rotations(out, tolerance=1e-6)
    alone = sample(
        denoise, data.process, x[:1, :2], "geodesic-sde", 30, "log_snr", None, fixed[:1, :2], generator=Noise(0, [0])
    )
    again = sample(denoise, data.process, x, "geodesic-sde", 30, "log_snr", mask, fixed, generator=Noise(0, [0, 1]))
    torch.testing.assert_close(again[:1, :2], alone, rtol=0, atol=1e-5)


def test_brownian_noise_converges_to_one_sample():
    data = heat()
    x = data.process.prior(torch.empty(4, 1, 3, 3, dtype=F64), Noise(0, range(4)))
    run = lambda n: sample(
        data,
        data.process,
        x,
        "geodesic-sde",
        grid=make_grid("log_snr", n, data.process, final=False),
        generator=Noise(0, range(4), brownian=True),
    )
    fine = run(128)
    near, far = (float(angle_between(run(n), fine).mean()) for n in (64, 8))
    assert near < 0.35 * far


def test_bad_arguments_are_refused():
    for arguments, reason in (
        ((3,), "order = 3 must be a whole number from 1 to 2"),
        ((2, 1.0), "order 2 has no noise"),
        ((1, -1.0), "level"),
        ((1, math.nan), "level"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Geodesic(*arguments)
    x, data = rotation(2, 1), heat()
    with pytest.raises(ConfigError, match="takes no noise: level = 1 must be 0"):
        sample(lambda x_t, t: x_t, SO3Flow(), x, "geodesic-sde", 3)
    with pytest.raises(ConfigError, match="without noise"):
        encode(data, data.process, x, "geodesic-sde", 3)
    with pytest.raises(ConfigError, match=r"level at log-SNR .* = -1"):
        Geodesic(1, lambda log_snr: -1.0).plan(data.process, Grid((1.0, 0.5)))
    with pytest.raises(ScheduleError, match="sigma"):
        encode(lambda x_t, t: x_t, SO3Process(EDM(0.02, 2.5)), x, "geodesic", grid=[0.5, 0.0])
    with pytest.raises(ConfigError, match=r"shape \(2, 1, 3, 3\) for a state of shape \(2, 1, 3\)"):
        sample(lambda x_t, t: Prediction(data.process, x_t, t, score=x_t), data.process, x, "geodesic", 3)
    with pytest.raises(DivergenceError, match="at step 1 of 3"):
        sample(lambda x_t, t: x_t * math.nan, data.process, x, "geodesic", 3)


def test_restarts_keep_the_distribution():
    """Brownian motion up and the reverse walk down again: with ever more passes the angles stay those of the data."""
    data, n = heat(), 1500
    grid = make_grid("log_snr", 40, data.process, 0.6, final=False)
    x = data.draw(0.6, n)
    solver = Resample(Geodesic(2), repeats=3, jump=12, low=0.1, high=0.4)
    out = sample(data, data.process, x, solver, grid=grid, generator=4)
    assert kolmogorov(igso3_cdf(rotations.angle(out), data.spread(0.0))) < 0.042
    once = sample(data, data.process, x, Geodesic(2), grid=grid)
    assert float(angle_between(out, once).median()) > 0.2


@pytest.mark.parametrize("given", ["score", "x0", "velocity"])
def test_guidance_extrapolates_tangents(given):
    """Of two points: scores of products of densities add; an item's own weight; 0 and 1 are the two themselves."""
    process, x, t = heat().process, rotation(2, 3), as_time(0.5)
    point = lambda r: lambda x_t, t: Prediction(process, x_t, t, x0=r)
    first, second = point(rotation(2, 3, seed=4)), point(rotation(2, 3, seed=5))
    as_given = lambda f: lambda x_t, t: f(x_t, t).replace(f(x_t, t).field(given), given)
    a, b = first(x, t).score, second(x, t).score
    for scale in (0.0, 0.4, 1.0, 3.0):
        guided = cfg(as_given(first), as_given(second), scale)(x, t)
        torch.testing.assert_close(guided.score, b + scale * (a - b), rtol=1e-9, atol=1e-12)
    inside = cfg(first, second, 3.0, (-9.0, 9.0))(x, t)
    torch.testing.assert_close(inside.score, b + 3 * (a - b))
    assert torch.equal(cfg(first, second, 3.0, (5.0, 9.0))(x, t).x0, first(x, t).x0)
    product = ProductProcess({"one": process, "two": gaussian("edm")}, "one")
    state = {"one": x, "two": normal(2, 3)}
    both = lambda f, shift: (
        lambda x_t, t: Prediction(product, x_t, t, x0={"one": f(x_t["one"], t).x0, "two": 0.5 * x_t["two"] + shift})
    )
    guided = cfg(both(first, 0.0), both(second, 1.0), 3.0)(state, t)
    torch.testing.assert_close(guided.score["one"], b + 3 * (a - b))
    torch.testing.assert_close(guided.x0["two"], 0.5 * state["two"] - 2)


def test_known_rotations_replace_and_other_guides_are_refused():
    data, known = heat(), rotation(3)
    where = torch.tensor([True, False, True])[:, None, None]
    x = data.process.prior(torch.empty(2, 3, 3, 3, dtype=F64), Noise(0, [0, 1]))
    out = sample(Replacement(known, where)(data), data.process, x, "geodesic-sde", 10, "log_snr", generator=0)
    assert torch.equal(out[:, [0, 2]], known[[0, 2]].expand(2, 2, 3, 3))
    rotations.check_rotations(out)
    for guided in (
        classifier_guidance(data, lambda x_t, t: x_t.sum((1, 2, 3))),
        cfg_pp(data, data, 0.5, [1.0, 0.5]),
    ):
        with pytest.raises(ConfigError, match="needs a Gaussian process, not SO3Process"):
            guided(x, as_time(1.0))
