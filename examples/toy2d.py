"""Learn two moons in a minute on one core, draw points of each, and measure how far they are from real ones."""

import sys

import torch

from polydiff import data
from polydiff.core.adapter import Item, load
from polydiff.core.denoiser import Denoiser
from polydiff.core.noise import Noise
from polydiff.core.objectives import Objective
from polydiff.core.processes import gaussian
from polydiff.core.sampling import sample
from polydiff.core.training.ema import EMA

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
toy2d, generator = load("toy2d"), torch.Generator().manual_seed(0)
points = toy2d.dataset(data.locate("moons"), "train")
sigma_data = points.facts["sigma_data"]

process = gaussian("rectified_flow")
denoiser = Denoiser(toy2d.network["mlp"](points.facts), process, "velocity", sigma_data, toy2d.conditions)
objective = Objective(process, weight="velocity", time="logit_normal", sigma_data=sigma_data)
optimizer, average = torch.optim.AdamW(denoiser.parameters(), lr=2e-3), EMA(denoiser, halflife_items=20_000)

for step in range(1, steps + 1):
    batch = toy2d.collate([points[i] for i in torch.randint(len(points), (256,), generator=generator).tolist()])
    loss = objective(denoiser, batch, generator)["loss"].mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update(256)
    if step % 200 == 0 or step == steps:
        print(f"step {step:5d}  loss {loss.item():.4f}")

label, noise = torch.arange(1000) % 2, process.prior(torch.zeros(1000, 2), Noise(0, range(1000)))
x0 = sample(average.module.bind(cond={"label": label}), process, noise, solver="heun-v", steps=20, grid="uniform")
samples = [Item(x, cond={"label": y}) for x, y in zip(x0, label, strict=True)]
for name, metric in toy2d.metrics(samples, list(points), {"held_out": None}).items():
    print(f"{name:20} {metric.value:.4f}")
