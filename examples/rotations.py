"""Learn rotations that come in five modes, draw some in 30 steps, and show where their first axis points, on a globe."""

import sys

import torch
from matplotlib import pyplot

from polydiff.core import rotations
from polydiff.core.adapter import Item
from polydiff.core.denoiser import Denoiser
from polydiff.core.objectives import Objective
from polydiff.core.processes import SO3Process
from polydiff.core.sampling import sample
from polydiff.core.schedules import VE


class Network(torch.nn.Sequential):  # noqa: D101  from rotations and ln(sigma)/4 to tangents that lead to clean ones
    def forward(self, x_t, c_noise, *_):  # type: ignore[override]  # noqa: D102
        return super().forward(torch.cat([x_t.flatten(2), (c_noise[:, None, None] * 2.0 ** torch.arange(6)).sin()], -1))


generator, process = torch.manual_seed(0), SO3Process(VE(0.02, 2.5))
centres, mode = rotations.from_quaternion(torch.randn(5, 4)), torch.multinomial(torch.arange(1.0, 6), 20_000, True)
real = rotations.retract(centres[mode], 0.15 * torch.randn(20_000, 3))[:, None]
layers = [m for n in (15, 256, 256) for m in (torch.nn.Linear(n, 256), torch.nn.SiLU())]
denoiser, objective = Denoiser(Network(*layers, torch.nn.Linear(256, 3)), process), Objective(process, time="log_snr")
optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3000):
    optimizer.zero_grad()
    objective(denoiser, Item(real[torch.randint(20_000, (512,))]), generator)["loss"].mean().backward()
    optimizer.step()
noise = rotations.from_quaternion(torch.randn(2000, 1, 4))
drawn = sample(denoiser.bind(), process, noise, "geodesic-sde", 30, "log_snr", generator=1)
axes = pyplot.subplots(1, 2, subplot_kw={"projection": "mollweide"}, figsize=(12, 4))[1]
for axis, name, some in zip(axes, ("real", "drawn"), (real[:2000], drawn), strict=True):
    gaps, (x, y, z) = rotations.angle(rotations.relative(centres, some)), some[:, 0, :, 0].unbind(-1)
    shares = (torch.bincount(gaps.argmin(1), minlength=5) / len(some)).tolist()
    print(f"{name:5}", *(f"{share:.3f}" for share in shares), f"spread {gaps.amin(1).square().mean().sqrt():.3f}")
    axis.scatter(torch.atan2(y, x), torch.asin(z.clamp(-1, 1)), s=2, alpha=0.4)
pyplot.savefig("rotations.png")
