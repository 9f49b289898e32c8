"""Bar "likelihood": log p of a standardised mixture along the flow, and encoding followed by decoding, on all paths.

    python tests/bars/likelihood.py [schedule=vp]

The prior of a process is N(0, sigma(t_max)^2), while what it leaves of the data at t_max is a mixture: the difference of the
two log densities belongs to every log-likelihood of this kind. It is measured here without the integrator under test (where
the flow of a tight, fixed-step solver ends) and printed; barred is what ``log_prob`` adds to it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from _bars import arguments, check, machine
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.numerics.exact import Mixture

from polydiff.core.grids import make_grid
from polydiff.core.likelihood import log_prob
from polydiff.core.processes import gaussian
from polydiff.core.sampling import count, encode, sample
from polydiff.core.schedules import SCHEDULES, as_time
from polydiff.core.solvers import Adaptive, RungeKutta

ITEMS, PROBES = 16, 256


class Standard(Mixture):
    """A mixture of zero mean and unit variance along every axis."""

    def __init__(self, process, d: int) -> None:
        super().__init__(process, d, std=0.35)
        weights = self.log_weights.exp()[:, None]
        centred = self.means - (weights * self.means).sum(0)
        self.means = centred * ((1 - self.std**2) / (weights * centred**2).sum(0)).sqrt()


def mismatch(data: Standard, x: Tensor) -> Tensor:
    """log prior minus the true log density where the flow from x at t_min ends."""
    process = data.process
    fine = make_grid("log_snr", 2000, process, final=False)
    x_T = encode(data.x0_hat, process, x, RungeKutta("rk4", "v"), grid=fine)  # noqa: N806
    return process.log_prior(x_T) - data.log_prob(x_T, as_time(process.t_max))


def measure(schedule: str, d: int) -> list[bool]:
    """The rows of one path and dimension."""
    process = gaussian(schedule)
    data = Standard(process, d)
    start = as_time(process.t_min)
    x = data.draw(start, ITEMS)
    truth, inherent = data.log_prob(x, start), mismatch(data, x)
    name = f"{schedule}, d = {d}"
    denoise = count(data.x0_hat)
    exact = log_prob(denoise, process, x, exact=True)
    print(f"{name}: prior mismatch {float(inherent.abs().max()) / d:.2g} nats a dimension at most")
    error = float((exact - truth - inherent).abs().max()) / d
    met = [check(f"{name}: exact, nats a dimension", error, 1e-4, note=f"{denoise.calls} evaluations")]
    # one item many times over: every copy has a probe of its own
    copies = x[:1].repeat(PROBES, 1)
    estimates = log_prob(data.x0_hat, process, copies, generator=0)
    standard = float(estimates.std()) / math.sqrt(PROBES)
    bias = abs(float(estimates.mean() - exact[0]))
    met.append(
        check(f"{name}: Hutchinson, bias in standard errors", bias / (standard + 1e-6), 4.2, note=f"{standard:.2g}")
    )
    tight, times = Adaptive(1e-8, 1e-8), make_grid("karras", 10, process, final=False)
    back = sample(data.x0_hat, process, encode(data.x0_hat, process, x, tight, grid=times), tight, grid=times)
    return [*met, check(f"{name}: encode, then decode", float((back - x).abs().max()), 1e-5)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = arguments()
    rows = [measure(s, d) for s in ([given["schedule"]] if "schedule" in given else SCHEDULES) for d in (2, 8, 64)]
    print(machine())
    raise SystemExit(0 if all(met for row in rows for met in row) else 1)
