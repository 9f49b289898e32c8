"""Bar "stochastic solvers keep the marginals": from exact states at t_max, what they sample against what it must be.

    python tests/bars/marginals.py [schedule=vp] [samples=20000]

The mean and each covariance entry of a standardised mixture are given in standard errors. The bias of Euler-Maruyama on
Gaussian data is exact: its recursion is found by running the solver itself, and nothing is drawn.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from _bars import arguments, check, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.numerics.affine import moments, start
from tests.numerics.exact import Gaussian, Mixture

from polydiff.core.grids import make_grid
from polydiff.core.processes import gaussian
from polydiff.core.sampling import sample
from polydiff.core.solvers import EulerMaruyama, Multistep, PredictorCorrector, Resample, RungeKutta, Solver

SCHEDULES = ("vp", "ve", "edm", "rectified_flow")
LEVELS = (3.0, 0.3, 0.03)  # sigma/alpha
STANDARD_ERRORS = 4.2


class Standardised(Mixture):
    """A mixture in two dimensions whose mean is 0 and whose covariance is the identity."""

    def __init__(self, process, std: float = 0.35, seed: int = 0):
        super().__init__(process, 2, std, seed)
        weights = self.log_weights.exp()[:, None]
        self.means = self.means - (weights * self.means).sum(0)
        factor = torch.linalg.cholesky((weights * self.means).T @ self.means)
        self.means = torch.linalg.solve_triangular(factor, self.means.T, upper=False).T * math.sqrt(1 - std**2)


def worst(x: torch.Tensor, mean: float, variance: float) -> float:
    """Largest deviation of the mean and of the covariance of samples (n, d), in standard errors."""
    n = len(x)
    offset = x - mean
    products = (offset[:, :, None] * offset[:, None, :]).flatten(1)
    target = variance * torch.eye(x.shape[1], dtype=x.dtype).flatten()
    deviations = [
        (value.mean(0) - wanted).abs() / (value.std(0) / math.sqrt(n))
        for value, wanted in ((offset, 0.0), (products, target))
    ]
    return float(torch.cat(deviations).max())


def deviation(data: Standardised, solver, level: float, n: int, seed: int = 0) -> float:
    """In standard errors, at one sigma/alpha, after 500 intervals uniform in log-SNR."""
    process, schedule = data.process, data.process.schedule
    end = float(schedule.t_of_log_snr(torch.tensor(-math.log(level), dtype=torch.float64)))
    grid = make_grid("log_snr", 500, process, t_end=end, final=False)
    x = data.draw(process.t_max, n, seed)[None]  # one item of many points: one stream of noise
    out = sample(lambda x, t: data.x0_hat(x[0], t)[None], process, x, solver, grid=grid, generator=seed)[0]
    t = torch.tensor(end, dtype=torch.float64)
    return worst(out, 0.0, float(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2))


def biases(data: Gaussian, solver) -> list[float]:
    """Largest relative bias of the variance at t_min after 1,000, 2,000 and 4,000 steps uniform in log-SNR."""
    found = []
    for n in (1000, 2000, 4000):
        grid = make_grid("log_snr", n, data.process, final=False)
        _, variance = moments(solver, data, grid, *start(data, data.process.t_max))
        found.append(float((variance / start(data, grid.times[-1])[1] - 1).abs().max()))
    return found


FORMS = {f"order 2 in x0, eta {eta:g}": Multistep(2, "x0", eta=eta) for eta in (0.0, 0.5, 1.0)}
OTHERS: dict[str, Solver] = {
    "Heun with restarts": Resample(RungeKutta("heun", "eps"), 4, 20, low=0.06, high=1.0),
    "RePaint's resampling around order 2 in x0, eta 1": Resample(Multistep(2, "x0", eta=1.0), 2, 20),
    "order 2 in x0 with Langevin steps of 0.001 sigma^2": PredictorCorrector(Multistep(2, "x0"), 1, size=1e-3),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = arguments()
    n, met = int(given.get("samples", 20_000)), []
    for schedule in [given["schedule"]] if "schedule" in given else SCHEDULES:
        process = gaussian(schedule)
        data = Standardised(process)
        rows = [(level, *form) for level in LEVELS for form in FORMS.items()]
        for level, name, solver in rows + [(LEVELS[-1], *other) for other in OTHERS.items()]:
            error = deviation(data, solver, level, n)
            met.append(check(f"{schedule}, {name}, sigma/alpha {level:g}, standard errors", error, STANDARD_ERRORS))
        for level in (0.5, 1.0, 2.0):
            coarse, middle, fine = biases(Gaussian(process), EulerMaruyama(level))
            label = f"{schedule}, Euler-Maruyama at level {level:g}, variance bias"
            met.append(check(f"{label} at 4,000 steps", fine, 0.015))
            for name, ratio in (("1,000 to 2,000", coarse / middle), ("2,000 to 4,000", middle / fine)):
                if fine < 1e-5:
                    # with alpha = 1 all that is of first order at level 1 is h g2 / 2 at the last time, as good as nothing on VE
                    print(f"  {label}, {name} steps: falls {ratio:.3g}x, mostly of second order")
                    continue
                met.append(check(f"{label}, {name} steps, fall", ratio, 1.7, at_least=True))
                met.append(check(f"{label}, {name} steps, fall", ratio, 2.3))
    print(machine())
    raise SystemExit(0 if all(met) else 1)
