"""The sampling loop: fixed elements, masks, callbacks, batches, guidance, bad denoisers."""

from __future__ import annotations

import math

import pytest
import torch

from polydiff.core.adapter import Condition
from polydiff.core.denoiser import Denoiser, Prediction
from polydiff.core.errors import ConfigError, DivergenceError
from polydiff.core.guidance import cfg
from polydiff.core.noise import Noise
from polydiff.core.processes import GaussianProcess, gaussian
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
    class Sphere:
        kind, t_min, t_max, schedule = "sphere", 0.0, 1.0, VP()

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
