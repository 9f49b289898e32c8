"""Solvers, likelihoods, encoding and guides on one CUDA device give what they give on the CPU, in float64 to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polydiff.core.denoiser import Prediction
from polydiff.core.guidance import Replacement, cfg, classifier_guidance
from polydiff.core.inverse import DPS, MMPS, AverageBlocks, PiGDM, Select
from polydiff.core.likelihood import elbo, log_prob
from polydiff.core.noise import Noise
from polydiff.core.processes import gaussian
from polydiff.core.sampling import encode, sample
from polydiff.core.solvers import NAMES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ("cpu", "cuda")
PROCESS = gaussian("vp")


def denoise(x_t: Tensor, t: Tensor) -> Prediction:
    """Exact for data N(0.2, 0.5^2), with the fraction that one solver asks for."""
    alpha, sigma = PROCESS.schedule.alpha(t), PROCESS.schedule.sigma(t)
    gain = (alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)).to(x_t)
    shape = (-1, *[1] * (x_t.ndim - 1)) if t.ndim else ()
    x0 = 0.2 + gain.reshape(shape) * (x_t - alpha.to(x_t).reshape(shape) * 0.2)
    return Prediction(PROCESS, x_t, t, x0=x0, fraction=torch.full_like(x_t, 0.5))


def states(device: str) -> Tensor:
    """The same numbers on any device."""
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)


def same(found: list[Any]) -> None:
    """Both results are alike, each where its states are or on the host."""
    torch.testing.assert_close(found[0].cpu(), found[1].cpu(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("brownian", [False, True])
@pytest.mark.parametrize("name", [name for name, entry in NAMES.items() if entry.solver.needs == "gaussian"])
def test_every_solver(name: str, brownian: bool) -> None:
    noise = lambda: Noise(1, range(3), brownian=brownian)
    grid = "karras" if name == "restart" else "log_snr"
    found = [sample(denoise, PROCESS, states(d), name, steps=18, grid=grid, generator=noise()) for d in DEVICES]
    assert found[1].device.type == "cuda"
    same(found)


def test_encoding_and_likelihoods() -> None:
    same([encode(denoise, PROCESS, states(d)) for d in DEVICES])
    for options in ({"exact": True}, {"probes": 2, "generator": 3}):
        same([log_prob(denoise, PROCESS, states(d), **options) for d in DEVICES])
    same([elbo(denoise, PROCESS, states(d), steps=20, generator=4) for d in DEVICES])


GUIDES = {
    "mmps": lambda d: MMPS(states(d)[:, :, ::2, ::2], AverageBlocks((2, 2)), sigma_y=0.1)(denoise),
    "pigdm": lambda d: PiGDM(states(d)[0] * (states(d)[1] > 0), Select(states(d)[1] > 0), sigma_y=0.1)(denoise),
    "dps": lambda d: DPS(states(d)[:, :, ::2, ::2], AverageBlocks((2, 2)))(denoise),
    "replacement": lambda d: Replacement(states("cpu")[0], states("cpu")[1] > 0)(denoise),
    "classifier": lambda d: classifier_guidance(denoise, lambda x, t: -x.square().flatten(1).sum(1), 0.3),
    "interval": lambda d: cfg(denoise, lambda x, t: denoise(0.9 * x, t), 1.5, (-1.0, 1.0)),
}


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("solver", ["dpmpp-2m", "dpmpp-2m-sde", "rk45"])
def test_guides(name: str, solver: str) -> None:
    same([sample(GUIDES[name](d), PROCESS, states(d), solver, steps=8, generator=5) for d in DEVICES])
