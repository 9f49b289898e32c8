"""Training on CUDA: exact resume, skipped steps, bf16 with compiled network."""

from __future__ import annotations

import importlib.util
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polydiff.core.nn.unet import UNet
from polydiff.core.training import checkpoint
from polydiff.core.training.loop import fit
from polydiff.core.training.runtime import Interrupt, Runtime, channels_last
from polydiff.core.training.trainer import Trainer

pytestmark = pytest.mark.gpu

SPEC = importlib.util.spec_from_file_location("toy", Path(__file__).parents[1] / "training/toy.py")
toy: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(toy)
DEVICE = "cuda"


class Watched:
    """An objective that sends a signal before one batch, or spoils the loss of one."""

    def __init__(self, inner: Any, interrupt: int = -1, spoil: int = -1) -> None:
        self.inner, self.interrupt, self.spoil, self.calls = inner, interrupt, spoil, 0
        self.at, self.terms = inner.at, inner.terms

    def __call__(self, *arguments: Any) -> dict[str, torch.Tensor]:
        if self.calls == self.interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
        out = self.inner(*arguments)
        if self.calls == self.spoil:
            out["loss"] = out["loss"] * float("nan")
        self.calls += 1
        return out


def train(folder: Path, interrupt: int = -1, spoil: int = -1, **changes: Any) -> list[dict[str, Any]]:
    config = toy.config(trainer__device=DEVICE, **changes)
    parts = toy.parts(config)
    fit(replace(parts, objective=Watched(parts.objective, interrupt, spoil)), config, folder, quiet=True)
    return toy.lines(folder)


def test_resume_on_the_device_is_exact(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    assert train(tmp_path / "run", interrupt=2 * 17)[-1]["step"] == 18
    resumed = train(tmp_path / "run", trainer__workers=2)
    for key in ("step", "loss", "lr", "grad_norm", "skipped"):
        assert [line[key] for line in resumed] == [line[key] for line in whole]
    left, right = (checkpoint.newest(tmp_path / name / "checkpoints") for name in ("whole", "run"))
    assert all(torch.equal(left.ema[name], right.ema[name]) for name in left.ema)
    assert f"rng/0/{DEVICE}" in left.train


def test_a_run_moves_between_devices(tmp_path: Path) -> None:
    train(tmp_path / "run", interrupt=2 * 9)
    toy.run(tmp_path / "run", trainer__steps=20)  # on the CPU
    assert train(tmp_path / "run", trainer__steps=30)[-1]["step"] == 30


def test_a_skipped_step_is_not_counted(tmp_path: Path) -> None:
    lines = train(tmp_path / "run", spoil=2 * 5, trainer__steps=12)
    assert lines[-1]["skipped"] == 1 and lines[5]["loss"] is None
    state = checkpoint.newest(tmp_path / "run/checkpoints").train
    assert float(state["ema/items"]) == 11 * 8
    assert {float(value) for name, value in state.items() if name.endswith("/step")} == {11.0}


def test_a_step_never_waits_for_the_device(tmp_path: Path) -> None:
    config = toy.config(trainer__device=DEVICE)
    with Interrupt() as interrupt:
        trainer = Trainer(toy.parts(config), config, tmp_path, Runtime(DEVICE), interrupt)
        trainer.restore(None, None)
        batches = trainer._batches()
        try:
            for step in range(6):
                if step == 2:  # the first ones make the state of the optimizer and fill caches
                    torch.cuda.set_sync_debug_mode("error")
                trainer._step(batches)
                trainer.state.step += 1
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.meter.read()["loss"] > 0


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_networks_over_any_number_of_axes_train_with_channels_last(axes: int) -> None:
    network = channels_last(UNet(axes, 2, channels=8, multipliers=(1, 2), blocks=1).to(DEVICE))
    x = torch.randn(2, 2, *(8,) * axes, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        (network(x, torch.zeros(2, device=DEVICE)) - x).square().mean().backward()
    assert float(network.last.bias.grad.abs().sum()) > 0


def test_bf16_and_a_compiled_network_train_alike(tmp_path: Path) -> None:
    changes = {"network__dropout": 0.0}
    plain, fast = (
        train(tmp_path / "plain", **changes),
        train(tmp_path / "fast", **changes, trainer__precision="bf16", trainer__compile=True),
    )
    np.testing.assert_allclose([line["loss"] for line in fast], [line["loss"] for line in plain], rtol=0.05)
