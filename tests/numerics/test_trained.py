"""The fast form of the bar "same model, other solver": a trained network in float32, one x_T."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import torch

import polydiff
from polydiff.core.noise import Noise
from polydiff.core.sampling import sample


def test_solvers_agree_on_a_trained_model(moons_run: Path) -> None:
    run, n = polydiff.load(moons_run, device="cpu"), 64
    noise = Noise(0, range(n))
    x = run.process.prior(torch.zeros(n, 2), noise)
    denoise = run.denoiser.bind(None, {"label": torch.arange(n) % 2})

    def draw(solver: str, steps: int) -> torch.Tensor:
        return sample(denoise, run.process, x, solver, steps=steps, generator=noise).double()

    def gap(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(((one - other).norm(dim=1) / other.norm(dim=1)).median())

    fine = [draw(solver, 200) for solver in ("heun", "heun-v", "dpmpp-2m")]
    assert max(gap(one, other) for one, other in combinations(fine, 2)) <= 1e-3
    for solver in ("euler", "ddim", "euler-v"):
        coarse, finer = gap(draw(solver, 200), fine[1]), gap(draw(solver, 400), fine[1])
        assert coarse <= 2e-2 and 1.8 <= coarse / finer <= 2.2
