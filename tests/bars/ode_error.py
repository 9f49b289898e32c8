"""Bar "ODE error": distance from the true end of the probability flow at 5 to 100 evaluations, against every peer's solvers.

    python tests/bars/ode_error.py [seed=N] [fixed=true] [fresh=true] [out=runs/ode-error]

Two standardised Gaussian mixtures (2-D, 256 states; 64-D, 128 states) with exact denoisers, on VP (t 1 to 1e-3), EDM (sigma 80
to 0.002) and rectified flow (t 0.999 to 1e-3): with nine budgets, 54 cells. Every solver, ours and each deterministic one of
diffusers, azula and torchdiffeq, takes as many intervals as its calls allow on the grids uniform in t, uniform in log-SNR and
rho 7, up to t_min, in float64; one call on the whole batch is one evaluation. First on mixtures drawn long ago, then on fresh
ones of ``seed`` (default: a number drawn now; it is printed). All errors go to ``out/errors.json``, a table of the cells to
``out/cells.md``. Exit code 1 on a miss, 2 where a peer is not installed. Run it where the peers are, with
PYTHONPATH=src.
"""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _bars import arguments, check, machine
from torch import Tensor

from polydiff.core.grids import make_grid
from polydiff.core.processes import gaussian
from polydiff.core.sampling import count, sample
from polydiff.core.solvers import NAMES, Solver

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from solver_peers import PACKAGES, all_peers, in_double, missing
from solver_problem import Mixture, Problem, make_problem

BUDGETS = (5, 6, 8, 10, 15, 20, 35, 50, 100)
GRIDS = ("uniform", "log_snr", "karras")
PATHS = ("vp", "edm", "rectified_flow")
SIZES = {2: 256, 64: 128}  # dimensions -> states
DEFAULTS = {
    "vp": ("abm4-flow-t", "log_snr"),
    "edm": ("abm4-flow-t", "karras"),
    "rectified_flow": ("abm3-v", "uniform"),
}
Run = Callable[[Problem, Tensor], Tensor]
Method = tuple[str, str]  # name and grid


@dataclass
class Cell:
    """One problem at one budget: the errors of ours and of the peers by method."""

    path: str
    problem: str
    budget: int
    ours: dict[Method, float] = field(default_factory=dict)
    peers: dict[Method, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Our best error over the best peer's."""
        return min(self.ours.values()) / min(self.peers.values())

    def row(self) -> str:
        """A line of the table."""
        cells = [self.problem, str(self.budget)]
        for errors in (self.ours, self.peers):
            (name, grid), error = min(errors.items(), key=lambda item: item[1])
            cells += [f"{name} on {grid}", f"{error:.3g}"]
        return " | ".join([*cells, f"{self.ratio:.3f}"])


def our_solvers() -> dict[str, Solver]:
    """The named solvers of Gaussian processes without noise, of a fixed number of calls per interval; of equal ones the first."""
    found: dict[str, Solver] = {}
    for name, entry in NAMES.items():
        flat = entry.solver.needs == "gaussian"  # the others are slower copies of these there
        if flat and entry.stages and not entry.stochastic and entry.solver not in found.values():
            found[name] = entry.solver
    return found


class Counted(Mixture):
    """A mixture that counts the calls of its denoiser."""

    calls = 0

    def x0_hat(self, y: Tensor, rho: float) -> Tensor:
        """D(y, rho)."""
        self.calls += 1
        return super().x0_hat(y, rho)


def error_of(run: Run, problem: Problem, grid: str, intervals: int, budget: int) -> float:
    """Error of a solver on a grid of that many intervals; infinite where it fails or calls more often than allowed."""
    if intervals < 1:
        return math.inf
    times = torch.tensor(make_grid(grid, intervals, problem.process, final=False).times, dtype=torch.float64)
    mixture = problem.mixture
    assert isinstance(mixture, Counted)
    mixture.calls = 0
    try:
        found = run(problem, times)
    except (ArithmeticError, RuntimeError, ValueError) as error:  # singular systems of few steps, divergence
        print(f"  {problem.name}, {grid}, {intervals} intervals: {type(error).__name__}: {error}", file=sys.stderr)
        return math.inf
    return problem.error(found) if mixture.calls <= budget else math.inf


def _ours(solver: Solver) -> Run:
    return lambda problem, times: sample(problem.denoise, problem.process, problem.x, solver, grid=times)


def extra_calls(solver: Solver) -> int:
    """What the start of a solver takes besides its stages an interval."""
    process, n = gaussian("rectified_flow"), 16
    denoise = count(lambda x, t: x)
    grid = make_grid("uniform", n, process, 0.8, 0.2, final=False)
    sample(denoise, process, torch.zeros(1, 1, dtype=torch.float64), solver, grid=grid)
    return denoise.calls - n * int(solver.stages or 1)


def measure(seed: int, solvers: Mapping[str, Solver]) -> Iterator[Cell]:
    """Every cell of the two mixtures of a seed."""
    peers, extra = all_peers(), {name: extra_calls(solver) for name, solver in solvers.items()}
    for path in PATHS:
        for d, n in SIZES.items():
            problem = make_problem(path, gaussian(path), Counted(d, seed), n, seed + 1)
            for budget in BUDGETS:
                cell = Cell(path, problem.name, budget)
                for grid in GRIDS:
                    for name, solver in solvers.items():
                        intervals = (budget - extra[name]) // int(solver.stages or 1)
                        error = error_of(_ours(solver), problem, grid, intervals, budget)
                        cell.ours[name, grid] = error
                    with in_double():
                        for name, peer in peers.items():
                            error = error_of(peer.run, problem, grid, peer.intervals(budget), budget)
                            cell.peers[name, grid] = error
                yield cell


def geometric_mean(cells: list[Cell], side: str, method: Method) -> float:
    """Of a method's error over some cells."""
    errors = [getattr(cell, side)[method] for cell in cells]
    return math.exp(math.fsum(map(math.log, errors)) / len(errors)) if all(map(math.isfinite, errors)) else math.inf


def judge_cells(cells: list[Cell], kind: str, least: int, worst: float) -> list[bool]:
    """The rows about single cells."""
    ratios = [cell.ratio for cell in cells]
    level = sum(ratio <= 1.02 for ratio in ratios)
    met = [check(f"{kind}: cells of {len(cells)} within 1.02x of the best peer", level, least, at_least=True)]
    if math.isfinite(worst):
        met.append(check(f"{kind}: worst cell, ours over the best peer", max(ratios), worst))
    return met


def judge_defaults(cells: list[Cell], kind: str) -> list[bool]:
    """The rows about one default per path."""
    met = []
    for path, default in DEFAULTS.items():
        own = [cell for cell in cells if cell.path == path]
        ours = geometric_mean(own, "ours", default)
        rivals = {method: geometric_mean(own, "peers", method) for method in own[0].peers}
        best = min(rivals, key=lambda method: rivals[method])
        note = f"the best is {best[0]} on {best[1]}"
        name = f"{kind}: {path}, {default[0]} on {default[1]} over the best single peer, geometric mean"
        met.append(check(name, ours / rivals[best], 1.0, note=note))
    return met


def main() -> int:
    """Run the bar; 0 if it is met."""
    given = {"fixed": "true", "fresh": "true", "out": "runs/ode-error"} | arguments()
    absent = missing()
    if absent:
        print(
            f"not installed: {', '.join(absent)}. Make an environment with {', '.join(PACKAGES)} and polydiff's needs"
        )
        return 2
    torch.set_num_threads(1)
    solvers, met = our_solvers(), []
    met.append(check("names of ours that take part", len(solvers), 40))
    fresh = int(given.get("seed", secrets.randbelow(10**9)))
    sets = [("old mixtures", 0, 50, 1.15)] if given["fixed"] == "true" else []
    sets += [(f"fresh mixtures of seed {fresh}", fresh, 45, math.inf)] if given["fresh"] == "true" else []
    lines, record = [], {}
    for kind, seed, least, worst in sets:
        began, cells = time.perf_counter(), []
        lines += [f"## {kind}", "problem | evaluations | ours | RMS | best peer | RMS | ratio", "|".join(["---"] * 7)]
        for cell in measure(seed, solvers):
            cells.append(cell)
            lines.append(cell.row())
            print(f"  {lines[-1]}", flush=True)
        met += judge_cells(cells, kind, least, worst) + judge_defaults(cells, kind)
        sizes = f"{len(cells)} cells, {len(solvers)} names of ours, {len({name for name, _ in cells[0].peers})} peers"
        print(f"  {kind}: {sizes}, {time.perf_counter() - began:.0f} s", flush=True)
        record[kind] = [
            {"problem": cell.problem, "evaluations": cell.budget}
            | {side: {" on ".join(m): e for m, e in getattr(cell, side).items()} for side in ("ours", "peers")}
            for cell in cells
        ]
    out = Path(given["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "errors.json").write_text(json.dumps(record) + "\n")
    (out / "cells.md").write_text("\n".join(lines) + "\n")
    print(machine())
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
