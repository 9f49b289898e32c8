"""Whole sampling loops of ours and of peers with a denoiser that costs nothing: what a step costs beyond the denoiser.

``loops(n)`` gives, by method and library, a function that gets everything ready (what a library keeps for the next sample
is not timed) and returns the loop to time. All go through the same n noise levels on a float32 state (1, 3, 32, 32).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from solver_peers import k_diffusion_sampling
from torch import Tensor

from polydiff.core.grids import Grid, make_grid
from polydiff.core.processes import gaussian
from polydiff.core.sampling import sample

Loop = Callable[[], Any]
Ready = Callable[[], Loop]
PROCESS = gaussian("edm")
X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
STORED = 0.1 * X


def _grid(n: int) -> Grid:
    return make_grid("karras", n, PROCESS, final=False)


def _sigmas(n: int) -> Tensor:
    return PROCESS.schedule.sigma(torch.tensor(_grid(n).times, dtype=torch.float64)).float()


def ours(name: str, n: int) -> Ready:
    """``sample`` with its plan cached."""
    grid = _grid(n)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return STORED

    sample(denoise, PROCESS, X, name, grid=grid)
    return lambda: lambda: sample(denoise, PROCESS, X, name, grid=grid)


def bare(n: int) -> Ready:
    """Euler written out, with its numbers made before."""
    sigmas = _sigmas(n).double().tolist()
    numbers = [(end / start, 1 - end / start) for start, end in itertools.pairwise(sigmas)]
    times = [torch.tensor(t, dtype=torch.float64) for t in _grid(n).times]

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return STORED

    @torch.no_grad()
    def run() -> Tensor:
        x = X
        for (scale, weight), t in zip(numbers, times, strict=False):
            x = torch.add(x * scale, denoise(x, t), alpha=weight)
        return x

    return lambda: run


def _diffusers(make: Callable[[], Any], calls: int, n: int) -> Ready:
    """Its loop of a pipeline: scale the input, ask the model, step."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    scheduler = make()

    def ready() -> Loop:
        scheduler.set_timesteps(n)
        return run

    def model(x: Tensor, t: Tensor) -> Tensor:
        return STORED

    @torch.no_grad()
    def run() -> Tensor:
        x = X
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
        return x

    ready()
    assert len(scheduler.timesteps) in (calls * n, calls * n - 1)  # Heun's last step has one stage
    return ready


def _k_diffusion(function: str, n: int) -> Ready:
    method, sigmas = getattr(k_diffusion_sampling(), function), _sigmas(n)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return STORED

    return lambda: lambda: method(model, X, sigmas, disable=True)


def _azula(name: str, n: int, **options: Any) -> Ready:
    import azula.denoise
    import azula.noise
    import azula.sample

    posterior = azula.denoise.DiracPosterior(STORED)

    class Model(azula.denoise.Denoiser):
        schedule = azula.noise.VESchedule(0.002, 80.0)

        def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> azula.denoise.DiracPosterior:
            return posterior

    sampler = getattr(azula.sample, name)(Model(), silent=True, steps=n, **options)
    return lambda: lambda: sampler(X)


def loops(n: int) -> dict[str, dict[str, Ready]]:
    """By method and library; ours is called polydiff."""
    import diffusers as d

    peers: dict[str, dict[str, Ready]] = {
        "ddim": {"diffusers": _diffusers(d.DDIMScheduler, 1, n), "azula": _azula("DDIMSampler", n)},
        "euler": {
            "diffusers": _diffusers(d.EulerDiscreteScheduler, 1, n),
            "k-diffusion": _k_diffusion("sample_euler", n),
            "azula": _azula("EulerSampler", n),
            "bare loop": bare(n),
        },
        "heun": {
            "diffusers": _diffusers(d.HeunDiscreteScheduler, 2, n),
            "k-diffusion": _k_diffusion("sample_heun", n),
            "azula": _azula("HeunSampler", n),
        },
        "dpmpp-2m": {
            "diffusers": _diffusers(d.DPMSolverMultistepScheduler, 1, n),
            "k-diffusion": _k_diffusion("sample_dpmpp_2m", n),
            "azula": _azula("xEABSampler", n, order=2),
        },
        "unipc": {"diffusers": _diffusers(d.UniPCMultistepScheduler, 1, n)},
    }
    return {name: {"polydiff": ours(name, n), **others} for name, others in peers.items()}
