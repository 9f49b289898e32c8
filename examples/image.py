"""Learn handwritten digits in a few minutes on two cores, then draw ten of each class, guided, as PNG files."""

import sys

import torch

from polydiff import data
from polydiff.core.adapter import Item, conditions_of, load
from polydiff.core.denoiser import Denoiser
from polydiff.core.guidance import cfg
from polydiff.core.noise import Noise
from polydiff.core.objectives import Objective
from polydiff.core.processes import gaussian
from polydiff.core.sampling import sample
from polydiff.core.training.ema import EMA

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
image, generator = load("image"), torch.Generator().manual_seed(0)
digits = image.dataset(data.locate("digits"), "train")

process = gaussian("edm")
network = image.network["unet"](digits.facts, channels=32, multipliers=[1, 2], blocks=1)
sigma_data = digits.facts["sigma_data"]
denoiser = Denoiser(network, process, "edm", sigma_data, conditions_of(image.conditions, digits.facts))
objective = Objective(process, weight="edm", drop=0.1, sigma_data=sigma_data)
optimizer, average = torch.optim.AdamW(denoiser.parameters(), lr=1e-3), EMA(denoiser, halflife_items=20_000)
for step in range(1, steps + 1):
    batch = image.collate([digits[i] for i in torch.randint(len(digits), (128,), generator=generator).tolist()])
    loss = objective(denoiser, batch, generator)["loss"].mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update(128)
    print(f"step {step:5d}  loss {loss.item():.4f}", end="\n" if step % 100 == 0 or step == steps else "\r")

label, noise = torch.arange(100) % 10, process.prior(torch.zeros(100, 1, 8, 8), Noise(0, range(100)))
guided = cfg(average.module.bind(cond={"label": label}), average.module.bind(), scale=1.5)
x0 = sample(guided, process, noise, solver="dpmpp-2m", steps=20)
samples = [Item(x, cond={"label": y}) for x, y in zip(x0, label, strict=True)]
print(*image.codec(digits.facts).write(samples, "digits"), sep="\n")
