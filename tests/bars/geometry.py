"""Bar "geometry": solvers on SO(3) and on products from exact scores, by the one loop, against closed forms.

    python tests/bars/geometry.py [samples=20000] [table=false]

Data are IGSO(3) of scale 0.3, whose score the heat kernel gives, from a uniform prior at sigma = 2.5 down to 0.02, uniform
in log sigma. The 1 % critical value of a Kolmogorov-Smirnov distance is 0.0115 at 20,000 samples. ``table=true`` prints
the distances at 10 to 200 steps, too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _bars import arguments, check, machine
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.numerics.exact import Gaussian
from tests.numerics.exact_rotations import F64, Heat, Points, kolmogorov

from polydiff.core import rotations
from polydiff.core.denoiser import Prediction
from polydiff.core.grids import make_grid
from polydiff.core.noise import Noise
from polydiff.core.processes import ProductProcess, SO3Flow, SO3Process, gaussian
from polydiff.core.processes.igso3 import igso3_angle, igso3_cdf
from polydiff.core.sampling import sample
from polydiff.core.schedules import VE
from polydiff.core.solvers import Geodesic

PROCESS = SO3Process(VE(0.02, 2.5))
ITEMS = 200  # of many elements each: the draws are made item by item
CENTRES = rotations.exp(torch.tensor([[0.4, 0, 0], [0.1, 1.8, 1.6]], dtype=F64))
WEIGHTS = (0.3, 0.7)


class Named(Noise):
    """The streams of a product's leaf."""

    def __init__(self, leaf: str) -> None:
        super().__init__(0, range(ITEMS))
        self.leaf = leaf

    def draw(self, k, purpose, like, t=None, s=None, mask=None):
        """As ``Noise.draw``."""
        return super().draw(k, f"{purpose}/{self.leaf}", like, t, s, mask)


def prior(n: int, process=PROCESS, seed: int = 0) -> Tensor:
    """About n uniform rotations."""
    return process.prior(torch.empty(ITEMS, n // ITEMS, 3, 3, dtype=F64), Noise(seed, range(ITEMS)))


def run(data, solver: str, steps: int, n: int, seed: int = 0) -> Tensor:
    """Samples at the process's t_min."""
    grid = make_grid("log_snr", steps, data.process, final=False)
    return sample(data, data.process, prior(n, data.process, seed), solver, grid=grid, generator=seed + 1)


def distance(solver: str, steps: int, n: int, seed: int = 0) -> float:
    """Kolmogorov-Smirnov distance of the angle."""
    data = Heat(PROCESS, torch.eye(3)[None], 0.3)
    return kolmogorov(igso3_cdf(rotations.angle(run(data, solver, steps, n, seed)), data.spread(0.0)))


def order(solver: Geodesic) -> float:
    """Slope of the error between 64 and 256 steps, against the flow in closed form."""
    data = Heat(PROCESS, torch.eye(3)[None], 0.3)
    x = data.draw(0.8, 64)
    truth = data.flow(x, 0.8, 0.2)

    def error(steps: int) -> float:
        grid = make_grid("log_snr", steps, PROCESS, 0.8, 0.2, final=False)
        out = sample(data, PROCESS, x, solver, grid=grid)
        return float(rotations.angle(rotations.relative(out, truth)).square().mean().sqrt())

    return math.log(error(64) / error(256)) / math.log(4)


def modes(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Share of samples nearest to each centre, and the root mean square angle from it."""
    angle = rotations.angle(rotations.relative(centres, x.flatten(0, 1)[:, None]))
    nearest = angle.argmin(1)
    shares = torch.bincount(nearest, minlength=len(centres)).double() / len(nearest)
    spreads = [angle[nearest == k, k].square().mean().sqrt() for k in range(len(centres))]
    return shares, torch.stack(spreads)


def mixture(solver: str, steps: int, n: int) -> tuple[float, float]:
    """Largest error of a mode's weight, and of its spread as a share of the true one."""
    data = Heat(PROCESS, CENTRES, 0.3, WEIGHTS)
    shares, spreads = modes(run(data, solver, steps, n), CENTRES)
    middle = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    truth = igso3_angle(middle, data.spread(0.0)).square().mean().sqrt()
    return float((shares - torch.tensor(WEIGHTS)).abs().max()), float((spreads / truth - 1).abs().max())


def product(solver: str) -> float:
    """Largest difference of a product's leaves from each leaf sampled alone, in a product of either order."""
    flat = gaussian("vp")
    place, frame = Gaussian(flat, (0.5, 1.0, 1.5), (0.3, 0.0, -0.2)), Heat(PROCESS, CENTRES, 0.3, WEIGHTS)
    alone: dict[str, Callable[..., Prediction]] = {
        "place": lambda x, t: Prediction(flat, x, t, x0=place.x0_hat(x, t)),
        "frame": frame,
    }
    worst, grid = 0.0, make_grid("uniform", 20, flat)
    for names in (("place", "frame"), ("frame", "place")):
        process = ProductProcess({name: {"place": flat, "frame": PROCESS}[name] for name in names}, clock="place")
        like = {"place": torch.empty(ITEMS, 2, 3, dtype=F64), "frame": torch.empty(ITEMS, 2, 3, 3, dtype=F64)}
        x = process.prior({name: like[name] for name in names}, Noise(0, range(ITEMS)))

        def both(x_t, t, process=process):
            return Prediction(process, x_t, t, score={name: alone[name](x_t[name], t).score for name in x_t})

        found = sample(both, process, x, solver, grid=grid, generator=Noise(0, range(ITEMS)))
        for name in names:
            own = process.processes[name]
            score = lambda x_t, t, own=own, name=name: Prediction(own, x_t, t, score=alone[name](x_t, t).score)
            expected = sample(score, own, x[name], solver, grid=grid, generator=Named(name))
            worst = max(worst, float((found[name] - expected).abs().max()))
    return worst


def main() -> int:
    """All rows."""
    given = arguments()
    n = int(given.get("samples", 20_000))
    if given.get("table", "false") == "true":
        print("steps | geodesic-sde | geodesic | geodesic-heun")
        for steps in (10, 20, 50, 100, 200):
            row = [f"{distance(name, steps, n):.4f}" for name in ("geodesic-sde", "geodesic", "geodesic-heun")]
            print(" | ".join([str(steps), *row]), flush=True)
    met = [
        check("KS of the angle, geodesic-heun, 50 steps", distance("geodesic-heun", 50, n), 0.0115),
        check("KS of the angle, geodesic-sde, 200 steps", distance("geodesic-sde", 200, n), 0.02),
    ]
    for wanted in (1, 2):
        met.append(check(f"order {wanted}: distance of the measured one", abs(order(Geodesic(wanted)) - wanted), 0.15))
    for solver, steps in (("geodesic-sde", 200), ("geodesic-heun", 50)):
        weight, spread = mixture(solver, steps, n)
        met.append(check(f"two modes, {solver}, {steps} steps: weights, absolute", weight, 0.02))
        met.append(check(f"two modes, {solver}, {steps} steps: spread, relative", spread, 0.03))
    points = Points(SO3Flow(10.0), CENTRES, WEIGHTS)
    shares, spreads = modes(run(points, "geodesic", 200, n), CENTRES)
    met.append(
        check(
            "two points by flow matching, geodesic, 200 steps: weights, absolute", float((shares[0] - 0.3).abs()), 0.02
        )
    )
    met.append(
        check("two points by flow matching, geodesic, 200 steps: distance from them", float(spreads.max()), 0.01)
    )
    for solver in ("geodesic", "geodesic-heun", "geodesic-sde"):
        met.append(check(f"product of independent leaves, {solver}: largest difference", product(solver), 1e-6))
    print(machine())
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
