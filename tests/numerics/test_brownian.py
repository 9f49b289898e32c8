"""Noise along Brownian paths: moments, consistency over any cutting of an interval, and what it is for."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
import torch

from polydiff.core.grids import make_grid
from polydiff.core.noise import Noise, Projected
from polydiff.core.processes import gaussian
from polydiff.core.sampling import sample
from polydiff.core.schedules import as_time
from polydiff.core.solvers import EulerMaruyama, Multistep, PredictorCorrector, Resample
from tests.numerics.exact import Gaussian, Mixture

F64 = torch.float64


def _rms(x):
    return float(x.pow(2).mean().sqrt())


def test_plain_draws_are_the_streams_they_always_were():
    """Item, purpose and number of the draw give the seed of a generator of its own; so too with the option, but for steps."""
    like = torch.zeros(2, 3, 4, dtype=F64)

    def expected(item, k, purpose):
        digest = hashlib.blake2b(f"11/{item}/{purpose}/{k}".encode(), digest_size=8).digest()
        return torch.randn(3, 4, generator=torch.Generator().manual_seed(int.from_bytes(digest, "little")))

    for noise in (Noise(11, [4, 9]), Noise(11, [4, 9], brownian=True)):
        z = noise.draw(5, "langevin/0", like)
        assert torch.equal(z, torch.stack([expected(4, 5, "langevin/0"), expected(9, 5, "langevin/0")]).to(F64))
    assert torch.equal(Noise(11, [4, 9]).draw(2, "step", like, -1.0, 3.0)[1], expected(9, 2, "step").to(F64))
    # up again, as churn goes, is a draw of its own and not the path walked backwards
    up = Noise(11, [4, 9], brownian=True).draw(2, "churn", like, 3.0, -1.0)
    assert torch.equal(up[0], expected(4, 2, "churn").to(F64))


def test_increments_over_any_cutting_add_up():
    noise, like = Noise(0, [0, 1], brownian=True), torch.zeros(2, 5, dtype=F64)

    def total(cuts):
        parts = [
            math.sqrt(b - a) * noise.draw(k, "step", like, a, b) for k, (a, b) in enumerate(itertools.pairwise(cuts))
        ]
        return sum(parts)

    whole = total([-7.0, 6.5])
    generator = torch.Generator().manual_seed(0)
    for n in (2, 7, 40):
        inside = (-7.0 + 13.5 * torch.rand(n, generator=generator, dtype=F64)).sort().values.tolist()
        # paths are known on a lattice of 2^-20, which moves the ends of an interval by up to half of that
        torch.testing.assert_close(total([-7.0, *inside, 6.5]), whole, rtol=0, atol=1e-4)
        on_lattice = [round(value * 2**20) / 2**20 for value in inside]
        torch.testing.assert_close(total([-7.0, *on_lattice, 6.5]), whole, rtol=0, atol=1e-5)


def test_unit_variance_and_the_correlation_of_the_overlap():
    """corr of two increments is the length they share over the root of the product of their lengths."""
    n = 40_000
    noise, like = Noise(2, [0], brownian=True), torch.zeros(1, n, dtype=F64)
    spans = [(-5.0, -4.2), (-4.2, -4.1), (-4.5, 3.3), (3.3, 9.0), (0.001, 0.0011), (-math.inf, math.inf)]
    z = [noise.draw(k, "step", like, *span)[0] for k, span in enumerate(spans)]
    bounded = [tuple(min(max(end, -64.0), 64.0) for end in span) for span in spans]
    for (i, (a, b)), (j, (c, d)) in itertools.combinations_with_replacement(enumerate(bounded), 2):
        wanted = max(0.0, min(b, d) - max(a, c)) / math.sqrt((b - a) * (d - c))
        assert float((z[i] * z[j]).mean()) == pytest.approx(
            wanted, abs=4.2 * math.sqrt((1 + wanted**2) / n) + 1e-2 * (i == 4)
        )
    assert abs(float(z[0].mean())) < 4.2 / math.sqrt(n)
    assert float((z[0] ** 4).mean()) == pytest.approx(3, abs=4.2 * math.sqrt(96 / n))


def test_paths_belong_to_items_purposes_and_leaves():
    like = torch.zeros(3, 6, 2)
    z = Noise(1, [5, 6, 7], brownian=True).draw(0, "step", like, -1.0, 0.5)
    assert torch.equal(z[1:2], Noise(1, [6], brownian=True).draw(9, "step", like[:1], -1.0, 0.5))
    assert not torch.equal(z[0], z[1])
    assert not torch.equal(z, Noise(1, [5, 6, 7], brownian=True).draw(0, "step/pass-1", like, -1.0, 0.5))
    mask = torch.arange(6) < torch.tensor([[6], [4], [1]])
    masked = Noise(1, [5, 6, 7], brownian=True).draw(0, "step", like, -1.0, 0.5, mask)
    assert torch.equal(masked[1, :4], Noise(1, [6], brownian=True).draw(0, "step", like[:1, :4], -1.0, 0.5)[0])
    assert float(masked[1, 4:].abs().max()) == 0
    tree = Noise(1, [5], brownian=True).draw(0, "step", {"a": like[:1], "b": like[:1]}, -1.0, 0.5)
    assert torch.equal(tree["a"], Noise(1, [5], brownian=True).draw(0, "step/a", like[:1], -1.0, 0.5))
    assert not torch.equal(tree["a"], tree["b"])


def test_the_loop_gives_solvers_log_snr_as_the_clock():
    process, like = gaussian("cosine"), torch.zeros(1, 4, dtype=F64)
    noise = Noise(0, [0], brownian=True)
    z = Projected(noise, process, None, None).draw(3, "step", like, as_time(0.7), as_time(0.4))
    ends = [float(process.schedule.log_snr(as_time(t))) for t in (0.7, 0.4)]
    assert torch.equal(z, noise.draw(3, "step", like, *ends))


@pytest.mark.parametrize(
    "solver",
    [
        EulerMaruyama(),
        EulerMaruyama(0.5),
        Multistep(1, eta=1.0),
        Multistep(2, eta=0.7),
        Multistep(2, eta=1.0, corrector="exact"),
    ],
)
def test_samples_converge_as_the_steps_are_made_smaller(solver):
    """Strong order 1, for the noise is additive; with independent draws there is no limit to converge to."""
    data = Mixture(gaussian("vp"), std=0.9)
    x = data.draw(0.9, 48)[None]
    denoise = lambda x_t, t: data.x0_hat(x_t[0], t)[None]

    def run(n, brownian):
        grid = make_grid("log_snr", n, data.process, 0.9, 0.05, final=False)
        return sample(denoise, data.process, x, solver, grid=grid, generator=Noise(4, [0], brownian=brownian))

    outs = [run(n, True) for n in (16, 32, 64, 128, 256)]
    gaps = [_rms(fine - coarse) for coarse, fine in itertools.pairwise(outs)]
    assert math.log2(gaps[0] / gaps[-1]) / 3 > 0.8
    assert gaps[-1] < 0.03
    assert _rms(run(32, False) - run(16, False)) > 0.3


def test_restarts_and_corrections_draw_beside_the_path():
    """A repeated interval has a path of its own, so it does not undo itself; corrections have independent draws."""
    data = Gaussian(gaussian("edm"))
    x = data.draw(1.0, 3)
    seen = []

    class Spy(Noise):
        def draw(self, k, purpose, like, t=None, s=None, mask=None):
            seen.append((k, purpose, t is None))
            return super().draw(k, purpose, like, t, s, mask)

    solver = Resample(PredictorCorrector(Multistep(1, eta=1.0), 2, snr=0.1), 1, 3)
    sample(data.x0_hat, data.process, x, solver, steps=5, generator=Spy(0, range(3), brownian=True))
    assert len({(k, purpose) for k, purpose, _ in seen}) == len(seen)
    assert {purpose.split("/pass-")[0] for _, purpose, timeless in seen if timeless} == {
        "langevin/0",
        "langevin/1",
        "renoise",
    }
    assert {purpose.split("/pass-")[0] for _, purpose, timeless in seen if not timeless} == {"step"}
