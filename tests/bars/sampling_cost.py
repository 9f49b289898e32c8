"""Bar "sampling cost": images/s at 10, 20 and 35 evaluations of the network, beside the Frechet distance at each.

    python tests/bars/sampling_cost.py [run=runs/image-mnist] [n=2000] [solver=dpmpp-2m] [batch=250]

On the processor and, where there is one, on the GPU. The distance is to the training split; it depends on n. A run that is
missing is trained first with the shipped configuration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from _bars import arguments, check, draw, machine, score, trained_run

from polydiff.core.adapter import Metric
from polydiff.core.run import Run
from polydiff.core.solvers import resolve

EVALUATIONS = (10, 20, 35)


def measure(model: Run, n: int, solver: str, evaluations: int, batch: int) -> tuple[float, Metric]:
    """Samples a second, and their Frechet distance."""
    steps = round(evaluations / (resolve(solver).stages or 1))
    options: dict[str, Any] = {"solver": solver, "steps": steps, "guidance": 1.0, "batch": batch}
    draw(model, min(n, batch), **options)  # the first call of a shape is slower
    began = time.perf_counter()
    samples = draw(model, n, **options)
    return n / (time.perf_counter() - began), score(model, samples)["frechet_distance"]


def judge(device: str, distances: Mapping[int, Metric]) -> bool:
    """Print the bars: every distance is a number, and that of most evaluations is no worse than that of fewest."""
    few, many = distances[min(distances)], distances[max(distances)]
    least = float("nan") if few.low is None or few.high is None else few.value + (few.high - few.low) / 2
    are_finite = all(math.isfinite(distance.value) for distance in distances.values())
    name = f"{device}: distance at {max(distances)} evaluations"
    met = check(name, many.value, least, note=f"that at {min(distances)} and its interval")
    return met and are_finite


def main(given: Mapping[str, str]) -> int:
    """Run the bar; 0 if it is met."""
    n, batch, solver = int(given.get("n", 2000)), int(given.get("batch", 250)), given.get("solver", "dpmpp-2m")
    met = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        model = trained_run(given.get("run", "runs/image-mnist"), "image-mnist", device)
        distances = {}
        for evaluations in EVALUATIONS:
            rate, distance = measure(model, n, solver, evaluations, batch)
            distances[evaluations] = distance
            ends = f"{distance.low:.4g} to {distance.high:.4g}, real {distance.real or math.nan:.4g}"
            print(
                f"  {device}: {evaluations} evaluations, {rate:.1f}/s, distance {distance.value:.4g} ({ends})",
                flush=True,
            )
        met.append(judge(device, distances))
        print(f"sampling cost: {solver}, n = {n}, batch {batch}, step {model.step}; {machine(device)}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main(arguments()))
