"""Bar "overhead": microseconds a step beyond the denoiser, ours against diffusers, k-diffusion and azula; and making a plan.

    python tests/bars/overhead.py [rounds=300] [steps=20]

Whole loops of ``steps`` steps with a denoiser that returns a stored tensor, state (1, 3, 32, 32) in float32, one thread, plans
cached. Every round times each loop once, in turn and after a loop of its own that is not timed, so that a busy machine slows all; the medians are compared. Exit code 1 on
a miss, 2 where a peer is not installed. Run it where the peers are, with PYTHONPATH=src.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from statistics import median

import torch
from _bars import arguments, check, machine

from polydiff.core.grids import make_grid
from polydiff.core.solvers import base, resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from solver_peers import missing

PACKAGES = ("diffusers", "k_diffusion", "azula")
BOUNDS = {"ddim": 0.5, "euler": 1.0, "heun": 0.5, "dpmpp-2m": 0.5, "unipc": 0.5}


def plan_times(names: list[str], n: int, rounds: int) -> dict[str, float]:
    """Microseconds a step of making a plan that is not cached, by solver; what hangs on its length alone is laid out once."""
    from solver_loops import PROCESS

    grid = make_grid("karras", n, PROCESS)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            base._cached_plan.cache_clear()
            began = time.perf_counter()
            resolve(name).plan(PROCESS, grid)
            taken[name].append(time.perf_counter() - began)
    return {name: 1e6 * median(times) / n for name, times in taken.items()}


def step_times(n: int, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds a step of every loop, by method and library."""
    from solver_loops import loops

    ready = loops(n)
    taken: dict[str, dict[str, list[float]]] = {name: {who: [] for who in row} for name, row in ready.items()}
    for _ in range(rounds):
        for name, row in ready.items():
            for who, prepare in row.items():
                prepare()()  # the loop before has left the processor's caches full of something else
                loop = prepare()
                began = time.perf_counter()
                loop()
                taken[name][who].append(time.perf_counter() - began)
    return {name: {who: 1e6 * median(times) / n for who, times in row.items()} for name, row in taken.items()}


def main() -> int:
    """Run the bar; 0 if it is met."""
    given = {"rounds": "300", "steps": "20"} | arguments()
    absent = missing(PACKAGES)
    if absent:
        print(
            f"not installed: {', '.join(absent)}. Make an environment with {', '.join(PACKAGES)} and polydiff's needs"
        )
        return 2
    torch.set_num_threads(1)
    n, rounds, met = int(given["steps"]), int(given["rounds"]), []
    gc.collect()
    gc.disable()
    steps = step_times(n, rounds)
    for name, row in steps.items():
        print(f"  {name}: {', '.join(f'{who} {value:.1f} us' for who, value in row.items())} a step", flush=True)
        rivals = {who: value for who, value in row.items() if who not in ("polydiff", "bare loop")}
        fastest = min(rivals, key=lambda who: rivals[who])
        ratio = row["polydiff"] / rivals[fastest]
        met.append(check(f"{name}: overhead over the fastest peer's", ratio, BOUNDS[name], note=fastest))
        if "bare loop" in row:
            met.append(check(f"{name}: overhead over a bare loop's", row["polydiff"] / row["bare loop"], 1.6))
    for name, value in plan_times(list(steps), n, rounds).items():
        met.append(check(f"{name}: making a plan of {n} steps, us a step", value, 10.0))
    print(machine())
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
