"""The same configuration on one CUDA device: training, resuming, sampling, and agreement with the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import polydiff
from polydiff.core.adapter import Condition, Item
from polydiff.core.cli import main
from polydiff.core.denoiser import Denoiser
from polydiff.core.grids import make_grid
from polydiff.core.guidance import cfg
from polydiff.core.noise import Noise
from polydiff.core.objectives import TIMES, WEIGHTS, Objective
from polydiff.core.processes import gaussian
from polydiff.core.solvers import NAMES
from polydiff.core.training.ema import EMA

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _train(run: Path, *words: str) -> list[dict]:
    options = ["trainer.log_every=10", "trainer.save_every=20", "trainer.preview_every=1000", "trainer.device=cuda"]
    assert main(["train", "experiment=image-digits", f"run={run}", *options, *words]) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision,compiled", [("fp32", "false"), ("bf16", "false"), ("bf16", "true")])
def test_training_lowers_the_loss_and_samples(tmp_path, precision, compiled):
    lines = _train(
        tmp_path / "run", "trainer.steps=120", f"trainer.precision={precision}", f"trainer.compile={compiled}"
    )
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"] and lines[-1]["skipped"] == 0
    items = polydiff.load(tmp_path / "run", device="cuda").sample(8, cond={"label": [0, 1]}, steps=5)
    assert all(item.x.device.type == "cpu" and item.x.shape == (1, 8, 8) for item in items)


class _Linear(torch.nn.Linear):
    def forward(self, x_t, *_):
        return super().forward(x_t)


def _batch(device):
    process = gaussian("vp")
    x0 = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).to(device)
    denoiser = Denoiser(_Linear(8, 8), process, conditions={"label": Condition()}).to(device)
    return denoiser, Item(x0, cond={"label": torch.zeros(16, dtype=torch.int64, device=device)})


@pytest.fixture
def no_waiting():
    """Any wait of the host for the device, transfers of coefficients included, is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_loss_and_the_average_never_wait_for_the_device(no_waiting, time, weight):
    denoiser, item = _batch("cuda")
    objective, average = Objective(denoiser.process, weight, time), EMA(denoiser, 100.0)
    generator, skip = torch.Generator("cuda").manual_seed(0), torch.zeros((), device="cuda")
    no_waiting()
    out = objective(denoiser, item, generator)
    out["loss"].mean().backward()
    average.update(16, skip)
    assert out["t"].is_cuda and out["t"].dtype == torch.float64


@pytest.mark.parametrize("solver", ["dpmpp-2m", "heun", "heun-v"])
def test_steps_of_a_solver_never_wait_for_the_device(no_waiting, solver):
    denoiser, item = _batch("cuda")
    method, denoise = NAMES[solver].solver, cfg(denoiser.bind(cond=item.cond), denoiser.bind(), 2.0, (-3.0, 3.0))
    plan = method.plan(denoiser.process, make_grid("karras", 6, denoiser.process))
    state = method.init(item.x, plan)
    no_waiting()
    with torch.no_grad():
        for k in range(len(plan)):
            state = method.step(state, k, plan, denoise, None)
    assert state.x.is_cuda


def test_the_average_on_cuda_is_the_one_on_the_cpu():
    averages = []
    for device in ("cpu", "cuda"):
        denoiser, _ = _batch("cpu")
        average = EMA(denoiser.to(device), 100.0)
        with torch.no_grad():
            for step in range(1, 6):
                for p in denoiser.parameters():
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
                average.update(16, torch.tensor(float(step == 3), device=device))
        averages.append([p.cpu() for p in average.module.parameters()])
    for one, other in zip(*averages, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_resumed_run_follows_the_uninterrupted_one(tmp_path):
    whole = _train(tmp_path / "whole", "trainer.steps=60", "optim.decay=constant")
    _train(tmp_path / "parts", "trainer.steps=40", "optim.decay=constant")
    parts = _train(tmp_path / "parts", "trainer.steps=60", "optim.decay=constant")
    assert [line["step"] for line in parts] == [line["step"] for line in whole]
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)  # kernels on a GPU may add in another order


def test_cpu_and_cuda_draw_the_same_noise_and_nearly_the_same_samples(tmp_path):
    _train(tmp_path / "run", "trainer.steps=60")
    like = torch.zeros(3, 1, 8, 8)
    noise = Noise(0, range(3))
    assert torch.equal(noise.draw(2, "step", like), noise.draw(2, "step", like.cuda()).cpu())
    allow = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        drawn = [
            polydiff.load(tmp_path / "run", device=device).sample(4, cond={"label": 1}, steps=10, seed=2)
            for device in ("cpu", "cuda")
        ]
    finally:
        torch.backends.cudnn.allow_tf32 = allow
    for one, other in zip(*drawn, strict=True):
        torch.testing.assert_close(one.x, other.x, rtol=0, atol=2e-3)
