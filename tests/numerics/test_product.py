"""Products: every leaf as if it were alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from polydiff.core import rotations
from polydiff.core.denoiser import Prediction
from polydiff.core.errors import ConfigError, DataError, ScheduleError
from polydiff.core.grids import Grid, make_grid
from polydiff.core.noise import Noise
from polydiff.core.processes import GaussianProcess, ProductProcess, SO3Flow, SO3Process, gaussian
from polydiff.core.rotation_schedules import LogLinear
from polydiff.core.sampling import count, encode, sample
from polydiff.core.schedules import VP, as_time
from polydiff.core.solvers import NAMES, Geodesic
from tests.numerics.exact import Gaussian
from tests.numerics.exact_rotations import F64, Heat, normal, rotation

FLAT, CURVED = GaussianProcess(VP(), mean_free=True), SO3Process(LogLinear(0.02, 2.5))
PRODUCT = ProductProcess({"place": FLAT, "frame": CURVED}, clock="place")
PLACE = Gaussian(FLAT, std=(0.5, 1.0, 1.5), mean=(0.0, 0.0, 0.0))
FRAME = Heat(CURVED, torch.eye(3)[None], 0.3)


class Named(Noise):
    """The streams of a leaf."""

    leaf = ""

    def draw(self, k, purpose, like, t=None, s=None, mask=None):
        return super().draw(k, f"{purpose}/{self.leaf}", like, t, s, mask)


def place(x_t, t):
    return Prediction(FLAT, x_t, t, score=Prediction(FLAT, x_t, t, x0=FLAT.project(PLACE.x0_hat(x_t, t))).score)


def denoise(x_t, t):
    score = {"place": place(x_t["place"], t).score, "frame": FRAME.score(x_t["frame"], t)}
    return Prediction(PRODUCT, x_t, t, score=score)


def states(n=3):
    like = {"place": torch.empty(4, n, 3, dtype=F64), "frame": torch.empty(4, n, 3, 3, dtype=F64)}
    return PRODUCT.prior(like, Noise(0, range(4)))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["geodesic", "geodesic-heun", "geodesic-sde"])
def test_leaves_are_sampled_as_if_alone(solver):
    x, grid = states(), make_grid("log_snr", 12, PRODUCT, 0.99, final=False)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 1:] = False
    x = PRODUCT.project(x, mask)
    for final in (False, True):
        way = Grid(grid.times, final)
        found = sample(denoise, PRODUCT, x, solver, grid=way, mask=mask, generator=Noise(0, range(4)))
        for name, process, alone in (("place", FLAT, place), ("frame", CURVED, FRAME)):
            noise = Named(0, range(4))
            noise.leaf = name
            close(found[name], sample(alone, process, x[name], solver, grid=way, mask=mask, generator=noise))
    close(found["place"].sum(1), torch.zeros(4, 3, dtype=F64))
    assert torch.equal(found["frame"][1, 1:], torch.eye(3, dtype=F64).expand(2, 3, 3))


def test_the_order_of_leaves_changes_nothing():
    x = states()
    back = {name: x[name] for name in reversed(x)}
    turned = ProductProcess({"frame": CURVED, "place": FLAT}, clock="place")
    other = lambda x_t, t: Prediction(turned, x_t, t, score={n: denoise(x_t, t).score[n] for n in ("frame", "place")})
    expected = sample(denoise, PRODUCT, x, "geodesic-sde", 6, generator=0)
    for process, function, state in (
        (turned, denoise, x),
        (turned, other, back),
        (PRODUCT, other, x),
        (PRODUCT, denoise, back),
    ):
        found = sample(function, process, state, "geodesic-sde", 6, generator=0)
        assert [*found] == [*state] and all(torch.equal(found[name], expected[name]) for name in x)
    assert turned == PRODUCT and hash(turned) == hash(PRODUCT)


def test_functions_map_over_leaves():
    x0 = {"place": FLAT.project(normal(4, 3, 3)), "frame": rotation(4, 3)}
    z, t = (
        {"place": normal(4, 3, 3, seed=1), "frame": normal(4, 3, 3, seed=2)},
        torch.tensor([0.1, 0.2, 0.5, 0.9], dtype=F64),
    )
    fixed = torch.zeros(4, 3, dtype=torch.bool)
    fixed[0, 1] = True
    x_t = PRODUCT.perturb(x0, t, z, None, fixed)
    for name, process in PRODUCT.processes.items():
        assert torch.equal(x_t[name], process.perturb(x0[name], t, z[name], None, fixed))
        assert torch.equal(x_t[name][0, 1], x0[name][0, 1])
        assert torch.equal(
            PRODUCT.renoise(x_t, t, as_time(0.95), z)[name], process.renoise(x_t[name], t, as_time(0.95), z[name])
        )
        u = PRODUCT.tangent(x0, x_t)[name]
        assert torch.equal(u, process.tangent(x0[name], x_t[name])) and u.shape == (4, 3, 3)
        torch.testing.assert_close(PRODUCT.retract(x0, PRODUCT.tangent(x0, x_t))[name], x_t[name])
        assert torch.equal(PRODUCT.project(z, None, fixed)[name], process.project(z[name], None, fixed))
        assert torch.equal(PRODUCT.mean(z)[name], process.mean(z[name]))
        assert PRODUCT.tangent_like(x0)[name].shape == z[name].shape
    assert torch.equal(PRODUCT.log_prior(x_t), FLAT.log_prior(x_t["place"]))
    prediction = Prediction(PRODUCT, x_t, t, x0=x0)
    for field in ("score", "velocity"):
        for name, process in PRODUCT.processes.items():
            alone = Prediction(process, x_t[name], t, x0=x0[name])
            assert torch.equal(getattr(prediction, field)[name], getattr(alone, field))
            assert torch.equal(getattr(prediction[name], field), getattr(alone, field))
            assert torch.equal(PRODUCT.rate(x_t, t, prediction)[name], alone.velocity)
    assert prediction.detach().x0["frame"] is not x0["frame"] and prediction.x0 is x0
    with pytest.raises(ConfigError, match="SO3Process has no eps"):
        _ = prediction.eps
    with pytest.raises(ConfigError, match="unknown leaf 'plaice': did you mean place"):
        prediction["plaice"]
    with pytest.raises(ConfigError, match="unknown leaf 'frame'"):
        prediction["place"]["frame"]


def test_priors_have_streams_of_their_own():
    x = states()
    noise = Named(0, range(4))
    noise.leaf = "frame"
    assert torch.equal(x["frame"], CURVED.prior(torch.empty(4, 3, 3, 3, dtype=F64), noise))


def test_times():
    process = ProductProcess(
        {"place": gaussian("cosine"), "frame": CURVED, "other": gaussian("edm")},
        clock="frame",
        time_map={"frame": lambda t: 0.5 * t, "other": lambda t: t**2},
    )
    assert process.schedule is CURVED.schedule and process.t_max == 0.999
    assert process.t_min == pytest.approx(math.sqrt(gaussian("edm").t_min), rel=1e-12)
    x0 = {"place": normal(2, 1, 3), "frame": rotation(2, 1), "other": normal(2, 1, 3)}
    z = {"place": normal(2, 1, 3), "frame": normal(2, 1, 3), "other": normal(2, 1, 3)}
    x_t = process.perturb(x0, as_time(0.6), z)
    assert torch.equal(x_t["frame"], CURVED.perturb(x0["frame"], as_time(0.3), z["frame"]))
    assert torch.equal(x_t["place"], gaussian("cosine").perturb(x0["place"], as_time(0.6), z["place"]))
    target = {name: x * 0 + x for name, x in x0.items()}
    seen = []

    def known(x_t, t):
        seen.append(float(t))
        return target

    bare = count(known)
    grid = [0.9, 0.5, 0.3]
    out = sample(bare, process, x_t, "geodesic-heun", grid=grid)
    assert seen == [0.9, 0.5, 0.5, 0.3]  # shared time
    alone = sample(lambda x, t: target["frame"], CURVED, x_t["frame"], "geodesic-heun", grid=[0.45, 0.25, 0.15])
    close(out["frame"], alone)
    assert all(torch.equal(x, target[name]) for name, x in sample(bare, process, x_t, "geodesic", 4, "uniform").items())


def test_a_leaf_at_an_end_is_taken_at_first_order_for_itself():
    """VP starts from alpha of 7e-3, but a cosine leaf at t = 1 without any data: only that leaf leaves Heun's rule."""
    process = ProductProcess({"place": gaussian("cosine"), "frame": CURVED}, clock="frame")
    data = Gaussian(gaussian("cosine"))
    x = {"place": data.draw(1.0, 4)[:, None], "frame": states(1)["frame"]}
    both = lambda x_t, t: {"place": data.x0_hat(x_t["place"], t), "frame": FRAME(x_t["frame"], t).x0}
    counted = count(both)
    found = sample(counted, process, x, "geodesic-heun", grid=[1.0, 0.7, 0.4])
    close(found["place"], sample(data.x0_hat, gaussian("cosine"), x["place"], "geodesic-heun", grid=[1.0, 0.7, 0.4]))
    close(
        found["frame"], sample(lambda x, t: FRAME(x, t).x0, CURVED, x["frame"], "geodesic-heun", grid=[1.0, 0.7, 0.4])
    )
    plan = Geodesic(2).plan(process, Grid((1.0, 0.7, 0.4)))
    assert counted.calls == Geodesic(2).calls(plan) == 4


def test_encode_holds_for_products():
    x = sample(denoise, PRODUCT, states(), "geodesic-heun", 30, grid=make_grid("log_snr", 30, PRODUCT, final=False))
    grid = make_grid("log_snr", 100, PRODUCT, 0.5, final=False)
    again = sample(
        denoise, PRODUCT, encode(denoise, PRODUCT, x, "geodesic-heun", grid=grid), "geodesic-heun", grid=grid
    )
    assert float((again["place"] - x["place"]).abs().max()) < 2e-3
    assert float(rotations.angle(rotations.relative(again["frame"], x["frame"])).max()) < 4e-3


def test_fixed_elements_of_all_leaves_stay():
    x, fixed = states(), torch.zeros(4, 3, dtype=torch.bool)
    fixed[2, 0] = True
    seen = []
    out = sample(
        denoise,
        PRODUCT,
        x,
        "geodesic-sde",
        5,
        "log_snr",
        fixed=fixed,
        generator=0,
        callback=lambda *row: seen.append(row),
    )
    for name in x:
        assert torch.equal(out[name][2, 0], x[name][2, 0]) and torch.equal(seen[1][3][name][2, 0], x[name][2, 0])
        assert not torch.equal(out[name][2, 1], x[name][2, 1])


def test_what_does_not_match_is_refused():
    x, grid = states(), "log_snr"
    for state, reason in (
        (
            {"place": x["place"]},
            r"the state must be a dictionary with the leaves \['place', 'frame'\], not the leaves \['place'\]",
        ),
        (x["place"], "the state must be a dictionary with the leaves"),
        ({**x, "more": x["place"]}, "not the leaves"),
        ({**x, "frame": x["place"]}, r"leaf 'frame' of the state must be rotations \(b, n, 3, 3\)"),
    ):
        with pytest.raises(ConfigError, match=reason):
            sample(denoise, PRODUCT, state, "geodesic", 3, grid)
    with pytest.raises(DataError, match=r"leaf 'frame' of the state: matrix \[0, 0\]"):
        sample(denoise, PRODUCT, {**x, "frame": 2 * x["frame"]}, "geodesic", 3, grid)
    with pytest.raises(ConfigError, match=r"returned the leaves \['place'\]"):
        sample(lambda x_t, t: {"place": x_t["place"]}, PRODUCT, x, "geodesic", 3, grid)
    with pytest.raises(ConfigError, match="mask is a tensor"):
        sample(denoise, PRODUCT, x, "geodesic", 3, grid, mask=torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ConfigError, match="needs a Gaussian process, not ProductProcess"):
        sample(denoise, PRODUCT, x, "dpmpp-2m", 3, grid)
    with pytest.raises(ConfigError, match="with the leaves"):
        PRODUCT.perturb({"place": x["place"]}, as_time(0.5), x)
    for arguments, reason in (
        (({}, "place"), "at least one"),
        (({"place": FLAT}, "frame"), "unknown clock 'frame'"),
        (({"place": FLAT}, "place", {"frame": lambda t: t}), "unknown leaf of time_map 'frame'"),
        (({"place": VP()}, "place"), "leaf 'place' is"),
        (({"place": PRODUCT}, "place"), "not a product"),
        (({"place": dataclasses.replace(FLAT, mask_axis=-1)}, "place"), "mask_axis=1"),
    ):
        with pytest.raises(ConfigError, match=reason):
            ProductProcess(*arguments)
    for bad in (lambda t: 1 - t, lambda t: 2 * t):
        with pytest.raises(ScheduleError, match="time_map of 'place' must increase"):
            ProductProcess({"place": FLAT}, "place", {"place": bad})
    with pytest.raises(ConfigError, match="a geodesic flow has no score"):
        process = ProductProcess({"place": FLAT, "frame": SO3Flow()}, "place")
        sample(lambda x_t, t: x_t, process, x, "geodesic-sde", 3, grid)
    assert NAMES["geodesic-sde"].stochastic
