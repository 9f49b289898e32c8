"""The same configuration on one CUDA device: training, resuming, sampling, and agreement with the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import polydiff
from polydiff.core.cli import main
from polydiff.core.noise import Noise

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
