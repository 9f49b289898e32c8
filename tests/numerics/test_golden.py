"""Numbers no one here wrote: loops of diffusers' scheduler tests (tests/schedulers, Apache-2.0), reproduced to their tolerance.

Each runs a fake model f(x, t) = x t/(t + 1), t being the index in a chain of 1000 linear betas, from a ramp; sums of absolute
values are told to 1e-2, means to 1e-3. Only loops that step from the sample they were given are here.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polydiff.core.denoiser import Prediction
from polydiff.core.discrete import Discrete
from polydiff.core.grids import make_grid
from polydiff.core.noise import Noise
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.sampling import encode, sample
from polydiff.core.solvers import Multistep, RungeKutta
from polydiff.core.solvers.runge_kutta import TABLEAUS, Tableau

F64 = torch.float64
CHAIN = GaussianProcess(Discrete())
LINSPACE = make_grid("ddpm-linspace", 10, CHAIN, final=False).times  # 11 indices, 999 to 0


def ramp() -> Tensor:
    """0 to 767/768 over (4, 3, 8, 8), the batch running fastest."""
    return (torch.arange(768, dtype=F64) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)


def index(t: Tensor) -> float:
    """Place of a time in the chain."""
    return float(t) * 1000 - 1


def fake(field: str = "eps", clip: bool = False, shift: int = 0):
    """The fake model as any field, x0_hat clipped to [-1, 1] where asked, the index shifted."""

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        i = index(t) + shift
        prediction = Prediction(CHAIN, x, t, **{field: x * (i / (i + 1))})
        return Prediction(CHAIN, x, t, x0=prediction.x0.clamp(-1, 1)) if clip else prediction

    return denoise


class Drawn(Noise):
    """One generator for the whole batch, in the order of the steps."""

    def __init__(self, seed: int):
        super().__init__(seed, range(4))
        self.generator_ = torch.Generator().manual_seed(seed)

    def draw(self, k, purpose, like, t=None, s=None, mask=None):
        return torch.randn(like.shape, generator=self.generator_).to(like.dtype)


@pytest.mark.parametrize("field,total", [("eps", 172.0067), ("v", 52.5302)])
def test_ddim(field, total):
    """10 leading steps, the last to alpha = 1."""
    out = sample(fake(field, clip=True), CHAIN, ramp(), "ddim", steps=10, grid="ddpm-leading")
    assert float(out.abs().sum()) == pytest.approx(total, abs=1e-2)


@pytest.mark.parametrize("field,total", [("eps", 258.9606), ("v", 202.0296)])
def test_ddpm(field, total):
    """All 1000 steps, with the noise of torch's generator seeded by 0."""
    out = sample(fake(field, clip=True), CHAIN, ramp(), "ddpm", steps=1000, grid="ddpm-leading", generator=Drawn(0))
    assert float(out.abs().sum()) == pytest.approx(total, abs=1e-2)


def test_dpmpp_2m():
    """To the sigma of index 0."""
    out = sample(fake(), CHAIN, ramp(), "dpmpp-2m", grid=LINSPACE)
    assert float(out.abs().mean()) == pytest.approx(0.3301, abs=1e-3)


def test_deis():
    """Order 2 in log-SNR, lowered at the end."""
    out = sample(fake(), CHAIN, ramp(), Multistep(2, "eps", "log_snr", lower_final=True), grid=LINSPACE)
    assert float(out.abs().mean()) == pytest.approx(0.23916, abs=1e-3)


def test_unipc():
    """UniPC-2 with B2, lowered at the end."""
    out = sample(fake(), CHAIN, ramp(), Multistep(2, "x0", corrector="bh2", lower_final=True), grid=LINSPACE)
    assert float(out.abs().mean()) == pytest.approx(0.2464, abs=1e-3)


def test_pndm():
    """Three steps of the pseudo Runge-Kutta method, then the linear multistep one."""
    times = make_grid("ddpm-leading", 10, CHAIN).times
    out = sample(fake(), CHAIN, ramp(), "pndm", grid=times)
    assert float(out.abs().sum()) == pytest.approx(198.1318, abs=1e-2)


def test_dpmpp_2s(monkeypatch):
    """Second-order single steps over two intervals of the grid, the stage at the grid's own time between."""
    x, log_snr = ramp(), CHAIN.schedule.log_snr(torch.tensor(LINSPACE, dtype=F64)).tolist()
    for k in range(0, 10, 2):
        r = (log_snr[k + 1] - log_snr[k]) / (log_snr[k + 2] - log_snr[k])
        place = (LINSPACE[k + 1] - LINSPACE[k]) / (LINSPACE[k + 2] - LINSPACE[k])
        monkeypatch.setitem(TABLEAUS, f"2s-{k}", Tableau((place,), ((1.0,), (1 - 0.5 / r, 0.5 / r)), 2, "t"))
        x = sample(fake(), CHAIN, x, RungeKutta(f"2s-{k}", "x0"), grid=[LINSPACE[k], LINSPACE[k + 2]])
    assert float(x.abs().mean()) == pytest.approx(0.2791, abs=1e-3)


def test_ddim_inverse():
    """Up the same grid, each step with the model at the index it goes to; the one from alpha = 1 to index 0 is by hand."""
    times = make_grid("ddpm-leading", 10, CHAIN).times
    x = ramp() * CHAIN.schedule.alpha(torch.tensor(times[-1], dtype=F64))
    out = encode(fake(clip=True, shift=100), CHAIN, x, "ddim", grid=times)
    assert float(out.abs().sum()) == pytest.approx(671.6816, abs=1e-2)


def test_edm_euler():
    """Karras' grid with EDM's preconditioning around the fake model, which is told ln(sigma)/4."""
    process, sigma_data = gaussian("edm"), 0.5

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        sigma = float(process.schedule.sigma(t))
        size, level = math.hypot(sigma, sigma_data), 0.25 * math.log(sigma)
        output = x / size * (level / (level + 1))
        return sigma_data**2 / size**2 * x + sigma * sigma_data / size * output

    out = sample(denoise, process, ramp() * math.hypot(80, 1), "euler", steps=10, grid="karras")
    assert float(out.abs().sum()) == pytest.approx(34.1855, abs=1e-2)
