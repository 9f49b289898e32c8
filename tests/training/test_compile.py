"""What makes compiled training fast: one graph for all steps; and that it trains as the plain network does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import toy  # type: ignore[import-not-found]
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from polydiff.core.denoiser import Denoiser
from polydiff.core.nn.dit import DiT
from polydiff.core.nn.unet import UNet
from polydiff.core.training.runtime import channels_last

NETWORKS = {
    "unet": lambda: UNet(
        2, 1, channels=8, multipliers=(1, 2), blocks=1, attention=(-1,), head_channels=8, conditions={"label": 2}
    ),
    "dit": lambda: DiT(2, 1, width=16, depth=1, head_channels=8, conditions={"label": 2}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_times_conditions_and_their_absence_share_one_graph(name: str) -> None:
    """A graph break is an error, and a second graph for another time or another choice of conditions is counted."""
    network = NETWORKS[name]()
    denoiser = Denoiser(network, toy.gaussian(), conditions=toy.ADAPTER.conditions)
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    network.compile(backend=counter, fullgraph=True, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        x_t, t = torch.randn(3, 1, 8, 8, generator=generator), torch.rand(3, generator=generator)
        cond = {"label": torch.randint(2, (3,), generator=generator)}
        present = {"label": torch.rand(3, generator=generator) < 0.5}
        denoiser(x_t, t.double(), None, cond, present).x0.square().mean().backward()
    assert counter.frame_count == 1


def test_only_kernels_over_two_axes_change_their_layout() -> None:
    module = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 3), nn.Linear(4, 4))
    before = [p.clone() for p in module.parameters()]
    assert channels_last(module) is module
    assert module[1].weight.is_contiguous(memory_format=torch.channels_last) and not module[1].weight.is_contiguous()
    assert all(p.is_contiguous() for layer in (module[0], module[2], module[3]) for p in layer.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))


@pytest.mark.slow
def test_a_compiled_network_trains_alike(tmp_path: Path) -> None:
    runs = {}
    for compiled in (False, True):
        toy.run(tmp_path / str(compiled), network__dropout=0.0, trainer__steps=12, trainer__compile=compiled)
        runs[compiled] = [line["loss"] for line in toy.lines(tmp_path / str(compiled))]
    np.testing.assert_allclose(runs[True], runs[False], rtol=1e-3)
