"""Bar "Exp(Log R)": the round trip in float32 at angles up to pi, as a Frobenius norm, and its gradients.

python tests/bars/rotations.py [n=200000]
"""

from __future__ import annotations

import math

import torch
from _bars import arguments, check, machine

from polydiff.core import rotations
from polydiff.core.noise import Noise

ANGLES = [0.0, 1e-20, 1e-12, 1e-8, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.5, 1.0, 1.5, 2.0, 2.5, 2.9]
ANGLES += [math.pi - gap for gap in (0.1, 0.02, 0.01, 0.009, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-9, 0.0)]


def tangents(angle: float, n: int) -> torch.Tensor:
    """Random axes, and the twelve along coordinates and coordinate planes, times the angle."""
    corner = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 1], [1, -1, 0]], dtype=torch.float64)
    axis = Noise(0, [0]).draw(0, "axis", torch.empty(1, n, 3, dtype=torch.float64))[0]
    axis = torch.cat([*(corner.roll(k, 1) for k in range(3)), axis])
    return angle * axis / axis.norm(dim=-1, keepdim=True)


def gradients_finite(u: torch.Tensor) -> bool:
    """Of the exponential, the logarithm, the angle and the round trip."""
    u = u.clone().requires_grad_()
    r = rotations.exp(u)
    leaf = r.detach().requires_grad_()
    weight = torch.arange(1.0, 10).reshape(3, 3)
    trip, log = rotations.exp(rotations.log(leaf)) * weight, rotations.log(leaf) * weight[0]
    values = ((r * weight, u), (log, leaf), (rotations.angle(leaf), leaf), (trip, leaf))
    return all(bool(torch.autograd.grad(value.sum(), x)[0].isfinite().all()) for value, x in values)


if __name__ == "__main__":
    n = int(arguments().get("n", 200_000))
    largest, entry, bent = 0.0, 0.0, 0
    for angle in ANGLES:
        r = rotations.exp(tangents(angle, n)).float()
        gap = rotations.exp(rotations.log(r)).double() - r.double()
        largest, entry = max(largest, float(gap.norm(dim=(-2, -1)).max())), max(entry, float(gap.abs().max()))
        bent += not gradients_finite(tangents(angle, 1000).float())
    met = [check(f"Exp(Log R), float32, {len(ANGLES)} angles of {n} axes: Frobenius error", largest, 1e-6)]
    met.append(check("the same, largest entry", entry, 1e-6))
    met.append(check("angles with a gradient that is not finite", bent, 0))
    print(machine())
    raise SystemExit(0 if all(met) else 1)
