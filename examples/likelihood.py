"""How probable does a trained model find pictures it has not seen? Bits per dimension, and what the flow makes of them.

python examples/likelihood.py runs/image-mnist [n]
"""

import sys

import polydiff
from polydiff.core.grids import make_grid
from polydiff.core.likelihood import bits_per_dim, dequantise, log_prob
from polydiff.core.sampling import count, encode, sample
from polydiff.core.schedules import as_time

run = polydiff.load(sys.argv[1])
n = int(sys.argv[2]) if len(sys.argv) > 2 else 16
process, held_out = run.process, run.dataset("test")
items = [held_out[i] for i in range(n)]
batch = run.adapter.collate(items)
clean = batch.x
assert not isinstance(clean, dict)
denoise = count(run.denoiser.to("cpu").bind(cond=batch.cond))

# Levels of 8 bits have no density until noise of one level's width is added, and the flow starts at t_min, not at 0.
alpha = float(process.schedule.alpha(as_time(process.t_min)))
x = alpha * dequantise(clean, bins=256, generator=0)
nats = log_prob(denoise, process, x, rtol=1e-3, atol=1e-3, generator=0)
bits = bits_per_dim(nats, clean[0].numel(), bins=256, alpha=alpha)
print(f"bits_per_dim {bits.mean():.3f}")
print(f"standard_error {bits.std() / n**0.5:.3f}")
print(f"evaluations {denoise.calls}")

# The same flow maps pictures to noise and back.
grid = make_grid("karras", 40, process, final=False)
noise = encode(denoise, process, x, solver="heun-v", grid=grid)
back = sample(denoise, process, noise, solver="heun-v", grid=grid)
print(f"std_of_noise {float(noise.std() / process.schedule.sigma(as_time(process.t_max))):.3f}")
print(f"round_trip {float((back - x).pow(2).mean().sqrt()):.4f}")
