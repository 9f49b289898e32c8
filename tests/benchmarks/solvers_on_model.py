"""Solvers on a trained network: distance from the end of its probability flow, by evaluations of the network.

    python tests/benchmarks/solvers_on_model.py [run=runs/image-mnist] [n=32] [solvers=dpmpp-2m@karras,unipc@karras]

The truth is a Runge-Kutta solution of order 4 at 200 steps; grids run from t_max to t_min. Root mean square over n samples.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bars"))
from _bars import arguments, machine, trained_run

from polydiff.core.grids import make_grid
from polydiff.core.noise import Noise
from polydiff.core.sampling import count, sample
from polydiff.core.solvers import NAMES, RungeKutta

BUDGETS = (6, 8, 10, 15, 20)
SOLVERS = (
    "ddim@karras,heun@karras,dpmpp-2m@karras,dpmpp-3m@karras,unipc@karras,ipndm@karras,deis@karras,ab4-v-t@karras,"
    "abm4-flow-t@karras,abm3-v@karras"
)


def main() -> None:
    """Print a table of errors."""
    given = {"run": "runs/image-mnist", "n": "32", "solvers": SOLVERS} | arguments()
    run, n = trained_run(given["run"], "image-mnist"), int(given["n"])
    like, mask = run.adapter.shape(run.facts["size"], {})
    classes = len((run.facts.get("classes") or {}).get("label", ()))
    cond = {"label": torch.arange(n, device=run.device) % classes} if classes else {}
    denoise, process = run.denoiser.bind(mask, cond), run.process
    x = process.prior(like.expand(n, *like.shape).to(run.device), Noise(0, range(n)), mask)
    fine = make_grid("karras", 200, process, final=False)
    truth = sample(denoise, process, x, RungeKutta("rk4", "v"), grid=fine)
    print(f"root mean square of the samples {float(truth.pow(2).mean().sqrt()):.3f}; evaluations {BUDGETS}")
    for name, grid in (entry.split("@") for entry in given["solvers"].split(",")):
        stages, errors = NAMES[name].stages or 1, []
        for budget in BUDGETS:
            counted = count(denoise)
            times = make_grid(grid, budget // stages, process, final=False)
            out = sample(counted, process, x, name, grid=times)
            assert counted.calls <= budget
            errors.append(float((out - truth).pow(2).mean().sqrt()))
        print(f"{name} on {grid}: " + "  ".join(f"{error:.4f}" for error in errors), flush=True)
    print(machine(run.device))


if __name__ == "__main__":
    main()
