"""The sampling loop: fixed elements, masks, callbacks, batches, guidance, bad denoisers."""

from __future__ import annotations

import math

import pytest
import torch

from polydiff.core.adapter import Condition
from polydiff.core.denoiser import Denoiser, Prediction
from polydiff.core.errors import ConfigError, DivergenceError, ScheduleError
from polydiff.core.grids import Grid
from polydiff.core.guidance import cfg
from polydiff.core.noise import Noise
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.processes.base import Process
from polydiff.core.sampling import encode, sample
from polydiff.core.schedules import VP
from polydiff.core.solvers import RungeKutta
from tests.numerics.exact import Gaussian, Mixture, as_field


@pytest.mark.parametrize("solver", ["ddpm", "edm", "dpmpp-2m", "heun"])
def test_fixed_elements_keep_their_value_and_are_shown_to_the_denoiser(solver):
    process = gaussian("vp")
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fixed = torch.tensor([[True, False, False, True], [False, False, True, False]])
    seen = []

    def denoise(x_t, t):
        seen.append(torch.equal(x_t[fixed], x[fixed]))
        return 0.5 * x_t

    out = sample(denoise, process, x, solver, steps=5, fixed=fixed, generator=0)
    assert all(seen) and torch.equal(out[fixed], x[fixed])
    assert not torch.isclose(out[~fixed], x[~fixed]).any()


def test_padding_stays_zero_and_items_do_not_see_their_batch():
    process = GaussianProcess(VP(), mean_free=True)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    noise = Noise(0, [4, 9])
    like = torch.zeros(2, 5, 3, dtype=torch.float64)
    x = process.prior(like, noise, mask)

    def denoise(x_t, t):
        return 0.3 * x_t

    both = sample(denoise, process, x, "ddpm", steps=6, mask=mask, generator=noise)
    assert float(both[0, 3:].abs().max()) == 0
    torch.testing.assert_close(both.sum(1), torch.zeros(2, 3, dtype=torch.float64), atol=1e-10, rtol=0)
    short = Noise(0, [4])
    alone = sample(denoise, process, process.prior(like[:1, :3], short), "ddpm", steps=6, generator=short)
    torch.testing.assert_close(both[:1, :3], alone, rtol=1e-12, atol=1e-12)


def test_masks_along_the_last_axis_and_fixed_elements_reach_the_callback():
    process = gaussian("vp", mask_axis=-1)
    mask = torch.tensor([[True, True, True, False]])
    fixed = torch.tensor([[True, False, False, False]])
    x = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * mask[:, None]
    rows = []
    out = sample(
        lambda x_t, t: 0.3 * x_t,
        process,
        x,
        "ddpm",
        3,
        mask=mask,
        fixed=fixed,
        generator=0,
        callback=lambda *r: rows.append(r),
    )
    assert torch.equal(out[..., 0], x[..., 0]) and float(out[..., 3].abs().max()) == 0
    for _, _, state, x0_hat in rows:
        assert torch.equal(state[..., 0], x[..., 0]) and torch.equal(x0_hat[..., 0], x[..., 0])
    # noise is drawn at the item's own length, along the last axis
    alone = sample(lambda x_t, t: 0.3 * x_t, process, x[..., :3], "ddpm", 3, fixed=fixed[:, :3], generator=0)
    torch.testing.assert_close(out[..., :3], alone)


def test_dictionaries_of_states_draw_by_leaf():
    like = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    z = Noise(0, range(2)).draw(0, "step", like)
    assert torch.equal(z["a"], Noise(0, range(2)).draw(0, "step/a", like["a"])) and not torch.equal(z["a"], z["b"])


def test_callback_sees_every_interval():
    data = Mixture(gaussian("vp"))
    rows = []
    out = sample(data.x0_hat, data.process, data.draw(1.0, 2), "heun", steps=4, callback=lambda *row: rows.append(row))
    assert [row[0] for row in rows] == [0, 1, 2, 3]
    assert float(rows[0][1]) == 1.0
    torch.testing.assert_close(rows[-1][2], out)
    torch.testing.assert_close(rows[-1][3], out)  # the last interval returns x0_hat


def test_state_keeps_its_dtype():
    data = Mixture(gaussian("vp"))
    x = data.draw(1.0, 2)
    double = sample(data.x0_hat, data.process, x, steps=6)
    single = sample(lambda x_t, t: data.x0_hat(x_t.double(), t).float(), data.process, x.float(), steps=6)
    assert double.dtype == torch.float64 and single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_guidance_scales_linearly_in_every_field():
    strong, weak = Gaussian(gaussian("vp"), std=(0.5, 0.5, 0.5)), Gaussian(gaussian("vp"), std=(1.0, 1.0, 1.0))
    x, t = strong.draw(0.5, 4), torch.tensor(0.5, dtype=torch.float64)
    expected = weak.x0_hat(x, t) + 2.5 * (strong.x0_hat(x, t) - weak.x0_hat(x, t))
    for field in ("x0", "eps", "v", "velocity", "score"):
        guided = cfg(as_field(strong, field), as_field(weak, "x0"), 2.5)(x, t)
        torch.testing.assert_close(guided.x0, expected, rtol=1e-9, atol=1e-9)


def test_guidance_takes_bare_states_too():
    strong, weak = Gaussian(gaussian("vp"), std=(0.5, 0.5, 0.5)), Gaussian(gaussian("vp"), std=(1.0, 1.0, 1.0))
    x, t = strong.draw(0.5, 4), torch.tensor(0.5, dtype=torch.float64)
    expected = cfg(as_field(strong, "v"), as_field(weak, "v"), 2.5)(x, t).x0
    torch.testing.assert_close(cfg(strong.x0_hat, weak.x0_hat, 2.5)(x, t), expected)
    torch.testing.assert_close(cfg(strong.x0_hat, as_field(weak, "v"), 2.5)(x, t), expected)
    torch.testing.assert_close(cfg(as_field(strong, "v"), weak.x0_hat, 2.5)(x, t).x0, expected)
    with pytest.raises(ConfigError, match="Prediction"):
        cfg(strong.x0_hat, weak.x0_hat, 2.5, (-1.0, 1.0))(x, t)


def test_guidance_calls_only_what_it_needs():
    data = Mixture(gaussian("vp"))
    calls = []

    def named(name):
        def denoise(x_t, t):
            calls.append(name)
            return Prediction(data.process, x_t, t, x0=data.x0_hat(x_t, t))

        return denoise

    x = data.draw(1.0, 1)
    for scale, expected in ((1.0, ["c"]), (0.0, ["u"]), (2.0, ["c", "u"])):
        calls.clear()
        cfg(named("c"), named("u"), scale)(x, torch.tensor(0.5, dtype=torch.float64))
        assert calls == expected
    calls.clear()
    window = cfg(named("c"), named("u"), 2.0, (-1.0, 1.0))
    for time in (0.9, 0.3, 0.01):  # log-SNR of VP: -4.0, about 0, 5.8 at these
        window(x, torch.tensor(time, dtype=torch.float64))
    assert calls == ["c", "c", "u", "c"]
    # scale 0 is no condition inside of the window, and the condition as it is outside
    other = lambda x_t, t: Prediction(data.process, x_t, t, x0=torch.full_like(x_t, 7.0))
    window = cfg(named("c"), other, 0.0, (-1.0, 1.0))
    assert float((window(x, torch.tensor(0.3, dtype=torch.float64)).x0 - 7).abs().max()) == 0
    assert float((window(x, torch.tensor(0.9, dtype=torch.float64)).x0 - 7).abs().max()) > 1


def test_guidance_on_gaussians_samples_the_tilted_density():
    """Score of N(0, s_c^2)^w N(0, s_u^2)^(1-w) at sigma -> 0 has the precision w/s_c^2 + (1-w)/s_u^2."""
    process = gaussian("vp")
    strong, weak = (Gaussian(process, std=(s,), mean=(0.0,)) for s in (0.5, 1.0))
    t, x, w = torch.tensor(1e-4, dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64), 2.0
    score = cfg(as_field(strong, "score"), as_field(weak, "score"), w)(x, t).score
    torch.testing.assert_close(score, -x * (w / 0.25 + (1 - w) / 1.0), rtol=1e-3, atol=0)


def test_bad_guidance_is_refused():
    for scale, interval in ((math.nan, None), (math.inf, None), (2.0, (1.0, -1.0))):
        with pytest.raises(ConfigError, match="guidance"):
            cfg(None, None, scale, interval)


KINDS = [
    "ddim",
    "ddpm",
    "dpmpp-2m",
    "dpmpp-2m-sde",
    "edm",
    "heun-v",
    "rk4",
    "rk45",
]  # every class, with and without noise
FAULTS = {
    "shape": lambda x: x[:, :1],
    "dtype": lambda x: x.double(),
    "device": lambda x: x.to("meta"),
    "str": lambda x: "x0",
}


@pytest.mark.parametrize("solver", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_denoiser_returns_must_be_like_the_state(solver, fault):
    with pytest.raises(ConfigError, match=f"returned .*{fault}.* at step 1 of 4, t = 1"):
        sample(lambda x_t, t: FAULTS[fault](x_t), gaussian("vp"), torch.ones(2, 3), solver, steps=4, generator=0)
    with pytest.raises(ConfigError, match=fault):
        process = gaussian("vp")
        sample(
            lambda x, t: Prediction(process, x, t, v=FAULTS[fault](x)), process, torch.ones(2, 3), solver, generator=0
        )


@pytest.mark.parametrize("solver", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_traced_to_their_step(solver, bad):
    """The run is repeated with the same noise, so the step is the one at which it happened; callbacks are not repeated."""
    process, rows = gaussian("vp"), []
    grid = [1.0, 0.7, 0.5, 0.3, 0.1]

    def denoise(x_t, t):
        return torch.where(torch.as_tensor(t).max() <= 0.5, bad * x_t, 0.3 * x_t)

    with pytest.raises(DivergenceError, match=r"not finite at step [23] of 4, t = 0\.(5|3\d*|4\d*)"):
        sample(
            denoise, process, torch.ones(2, 3), solver, grid=grid, generator=0, callback=lambda *r: rows.append(r[0])
        )
    assert rows == list(range(len(rows)))


def test_a_shape_that_changes_on_the_way_is_traced_to_its_step():
    def denoise(x_t, t):
        return x_t[:, :2] if t < 0.4 else x_t

    with pytest.raises(ConfigError, match=r"shape \(2, 2\) .*\(2, 3\) at step 3 of 3"):
        sample(denoise, gaussian("vp"), torch.ones(2, 3), "ddim", grid=[1.0, 0.5, 0.3, 0.1])


def test_a_result_that_overflows_although_all_predictions_are_finite_is_said_so():
    process = gaussian("rectified_flow")
    large = torch.full((1, 2), 3e38)
    with pytest.raises(DivergenceError, match="the sample is not finite after 1 steps"):
        solver = RungeKutta("euler", "velocity")
        sample(lambda x, t: Prediction(process, x, t, velocity=large), process, -large, solver, grid=[0.9, 0.1])


@pytest.mark.parametrize("run", [sample, encode])
def test_states_to_start_from_are_finite_floating_point_numbers(run):
    x = torch.ones(3, 2)
    x[1, 1] = math.nan
    with pytest.raises(ConfigError, match="item 1 of 3"):
        run(lambda x_t, t: x_t, gaussian("vp"), x, "ddim")
    for wrong in (torch.ones(3, 2, dtype=torch.long), torch.tensor(1.0), [1.0]):
        with pytest.raises(ConfigError, match="floating-point"):
            run(lambda x_t, t: x_t, gaussian("vp"), wrong, "ddim")


def test_solvers_refuse_a_process_they_do_not_support():
    class Sphere(Process):
        kind, schedule = "sphere", VP()

    with pytest.raises(ConfigError, match="Gaussian process"):
        sample(lambda x_t, t: x_t, Sphere(), torch.ones(1, 2), "dpmpp-2m", grid=[1.0, 0.5])


def test_unknown_solver_names_the_nearest():
    with pytest.raises(ConfigError, match="dpmpp-2m"):
        sample(lambda x_t, t: x_t, gaussian("vp"), torch.ones(1, 2), "dpm++2m")


def test_refining_converges_to_the_data_distribution():
    """End to end: 50 steps from the prior reproduce mean and deviation of the data."""
    data = Gaussian(gaussian("vp"))
    noise = Noise(0, [0])
    x = data.process.prior(torch.zeros(1, 4000, 3, dtype=torch.float64), noise)
    out = sample(data.x0_hat, data.process, x, "dpmpp-2m", steps=50, grid="log_snr", generator=noise)[0]
    assert float((out.mean(0) - data.mean).abs().max()) < 0.08
    assert float((out.std(0) / data.std - 1).abs().max()) < 0.05


@pytest.mark.parametrize("solver", ["ddim", "heun", "unipc"])
def test_encoding_uses_no_memory_of_earlier_calls(solver):
    """A network that is given its last prediction would make the way up another flow than the way down."""
    given = []

    class Remembers(torch.nn.Module):
        def forward(self, x_t, c_noise, mask, cond, present):
            given.append(bool(present["x0_hat"].any()) or bool(cond["x0_hat"].any()))
            return 0.1 * x_t + cond["x0_hat"]

    denoiser = Denoiser(Remembers(), gaussian("vp"), conditions={"x0_hat": Condition("tensor")})
    encode(denoiser.bind(), denoiser.process, torch.ones(2, 3), solver, steps=4)
    assert len(given) >= 4 and not any(given)
    given.clear()
    sample(denoiser.bind(), denoiser.process, torch.ones(2, 3), solver, steps=4)
    assert given == [False] + [True] * (len(given) - 1)


WRONG = (
    (lambda x: x[:1], r"shape \(1, 3\) for a state of shape \(4, 3\)"),
    (lambda x: x.float(), "dtype torch.float32 for a state of dtype torch.float64"),
    (lambda x: x.to("meta"), "device meta for a state of device cpu"),
    (lambda x: None, "a NoneType"),
    (lambda x: (x, x), "a tuple"),
    (lambda x: x.numpy(), "a ndarray"),
    (lambda x: {"a": x}, "a dict"),
)


@pytest.mark.parametrize("solver", ["euler", "ddpm", "dpmpp-2m", "heun", "unipc", "rk45"])
@pytest.mark.parametrize(("wrong", "reason"), WRONG)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_a_denoiser_returns_late_is_looked_at(solver, wrong, reason, wrapped):
    process = gaussian("vp")
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoise(x_t, t):
        value = 0.3 * x_t if float(t.amax()) > 0.3 else wrong(0.3 * x_t)
        return Prediction(process, x_t, t, x0=value) if wrapped else value

    with pytest.raises(ConfigError, match=f"{reason} at step [4-9] of 10, t = 0.[0-2]" if not wrapped else reason):
        sample(denoise, process, x, solver, 10, "uniform", generator=0)


def test_what_a_denoiser_or_a_callback_raises_comes_through_and_nothing_is_repeated():
    data, calls = Mixture(gaussian("vp")), []

    def denoise(x_t, t):
        calls.append(float(t))
        return data.x0_hat(x_t, t)

    def stop(k, t, x, x0_hat):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        sample(denoise, data.process, data.draw(1.0, 2), "ddim", 5, callback=stop)
    assert len(calls) == 1
    with pytest.raises(KeyError):
        sample(
            lambda x_t, t: denoise(x_t, t) if float(t) > 0.5 else {}["x"], data.process, data.draw(1.0, 2), "ddim", 5
        )


class _SelfConditioned(torch.nn.Module):
    """Says what it was given as x0_hat, shrunk; NaN after a number of calls."""

    def __init__(self, most=100):
        super().__init__()
        self.seen, self.most = [], most

    def forward(self, x, c_noise, mask, cond, present):
        self.seen.append((bool(present["x0_hat"].all()), cond["x0_hat"].clone()))
        return x * (math.nan if len(self.seen) % self.most == 0 else 0.5)


def test_self_conditioning_remembers_its_own_run_alone():
    network, process = _SelfConditioned(), gaussian("vp")
    bound = Denoiser(network, process, "x0", conditions={"x0_hat": Condition("x0_hat", "given", (3,))}).bind()
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    first, second = (sample(bound, process, x, "ddim", 3) for _ in range(2))
    assert [given for given, _ in network.seen] == [False, True, True] * 2
    assert torch.equal(first, second)
    sample(bound, process, x[:1], "ddim", 2)  # of another size
    network.seen.clear()
    for _ in range(2):  # a loop of one's own
        bound(x, torch.tensor(0.5, dtype=torch.float64))
    assert [given for given, _ in network.seen] == [False, True]


def test_the_run_that_looks_for_a_fault_starts_with_an_empty_memory():
    network, process = _SelfConditioned(most=3), gaussian("vp")
    bound = Denoiser(network, process, "x0", conditions={"x0_hat": Condition("x0_hat", "given", (3,))}).bind()
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DivergenceError, match="at step 3 of 3"):
        sample(bound, process, x, "ddim", 3)
    assert [given for given, _ in network.seen] == [False, True, True] * 2
    assert all(bool(torch.isfinite(x0_hat).all()) for _, x0_hat in network.seen)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "rk45", "unipc"])
@pytest.mark.parametrize("name", ["mask", "fixed"])
def test_masks_are_looked_at_whatever_the_solver_does_with_them(solver, name):
    data = Mixture(gaussian("vp"))
    x = torch.ones(4, 3, dtype=torch.float64)
    for bad in (
        "a",
        [[True] * 3] * 4,
        torch.ones(4, 3),
        torch.ones(4, 2).bool(),
        torch.ones(3, 3).bool(),
        torch.ones(4).bool(),
    ):
        with pytest.raises(ConfigError, match=f"{name} is "):
            sample(data.x0_hat, data.process, x, solver, 2, generator=0, **{name: bad})
    if name == "mask" and solver != "ddpm":
        with pytest.raises(ConfigError, match="mask is "):
            encode(data.x0_hat, data.process, x, solver, 2, mask=torch.ones(4, 2).bool())


def test_grids_that_run_the_wrong_way_are_refused():
    data = Mixture(gaussian("vp"))
    x, up = data.draw(0.5, 2), Grid((0.1, 0.9), upward=True)
    with pytest.raises(ScheduleError, match="this grid runs up"):
        sample(data.x0_hat, data.process, x, "ddim", grid=up)
    with pytest.raises(ScheduleError, match="downward"):
        encode(data.x0_hat, data.process, x, "ddim", grid=up)


@pytest.mark.parametrize("solver", ["rk45", "ddim", "ddpm", "restart", "pc"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_states_of_no_numbers_come_back(solver, shape):
    process = gaussian("vp")
    assert sample(lambda x_t, t: x_t, process, torch.zeros(shape), solver, 20, generator=0).shape == shape
    if solver in ("rk45", "ddim"):
        assert encode(lambda x_t, t: x_t, process, torch.zeros(shape), solver).shape == shape


@pytest.mark.parametrize("process", [None, "vp", VP()])
def test_what_is_no_process_is_named(process):
    for run in (sample, encode):
        with pytest.raises(ConfigError, match=r"the process is .*gaussian\('vp'\)"):
            run(lambda x_t, t: x_t, process, torch.zeros(2, 3), "ddim")
