"""Bar "same model, other solver": one trained model, one x_T, 64 samples, float32.

    python tests/bars/same_model.py [run=runs/image-digits]

heun, heun-v and dpmpp-2m agree at 200 steps; euler and ddim come close and their difference falls with the step count.
The relative difference of a sample is the norm of the difference to heun-v over the norm of heun-v's sample; the bar is on
its median over samples, and the largest is printed beside.
"""

from __future__ import annotations

from itertools import combinations

import torch
from _bars import arguments, check, machine, trained_run

from polydiff.core.noise import Noise
from polydiff.core.run import Run
from polydiff.core.sampling import sample

N = 64


def main(run: Run) -> int:
    """Run the bar; 0 if it is met."""
    like, mask = run.adapter.shape(run.facts["size"], {})
    noise = Noise(0, range(N))
    x_t = run.process.prior(torch.zeros(N, *like.shape, device=run.device), noise, mask)
    label = torch.arange(N, device=run.device) % len(run.facts["classes"]["label"])

    def draw(solver: str, steps: int) -> torch.Tensor:
        denoise = run.denoiser.bind(mask, {"label": label})
        return (
            sample(denoise, run.process, x_t, solver, steps=steps, grid="karras", generator=noise).flatten(1).double()
        )

    def difference(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one - other).norm(dim=1) / other.norm(dim=1)

    met = []
    at_200 = {name: draw(name, 200) for name in ("heun", "heun-v", "dpmpp-2m")}
    for one, other in combinations(at_200, 2):
        gap = difference(at_200[one], at_200[other])
        note = f"largest {float(gap.max()):.2g}"
        met.append(check(f"{one} against {other}, 200 steps, median difference", float(gap.median()), 1e-3, note=note))
    truth = at_200["heun-v"]
    for name in ("euler", "ddim"):
        gaps = {steps: difference(draw(name, steps), truth) for steps in (200, 400)}
        at = {steps: float(value.median()) for steps, value in gaps.items()}
        met.append(check(f"{name}, 200 steps, median difference", at[200], 2e-2, note=f"{at[400]:.3g} at 400"))
        fall = at[200] / at[400]
        met.append(check(f"{name}, fall of the difference from 200 to 400 steps", fall, 1.8, at_least=True))
        met.append(check(f"{name}, fall of the difference from 200 to 400 steps", fall, 2.2))
    print(f"same model, other solver: step {run.step}, {N} samples; {machine(run.device)}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main(trained_run(arguments().get("run", "runs/image-digits"))))
