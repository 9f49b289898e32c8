"""Bar "batch independence": n = 1, 7, 64 at one seed.

    python tests/bars/batch_independence.py [run=runs/image-digits]

The draws of item k are bit-identical for any n and batch size; samples are bit-identical at equal batch size, within 1e-5
otherwise (library kernels differ by batch size), and bit-identical always with ``deterministic_batch``.
"""

from __future__ import annotations

from typing import Any

import torch
from _bars import arguments, check, machine, trained_run

from polydiff.core.noise import Noise
from polydiff.core.run import Run

SOLVERS = ("dpmpp-2m", "ddpm")


def largest(one: list[Any], other: list[Any]) -> float:
    """Largest difference of two lists of items over the shorter of them."""
    return max(float((a.x - b.x).abs().max()) for a, b in zip(one, other, strict=False))


def main(run: Run) -> int:
    """Run the bar; 0 if it is met."""
    like = torch.zeros(64, *run.adapter.shape(run.facts["size"], {})[0].shape)
    whole = Noise(3, range(64)).draw(5, "step", like)
    differ = sum(
        not torch.equal(Noise(3, range(n)).draw(5, "step", like[:n]), whole[:n])
        or not torch.equal(Noise(3, [n - 1]).draw(5, "step", like[:1])[0], whole[n - 1])
        for n in (1, 7, 64)
    )
    met = [check("draws that differ with n", differ, 0)]
    for solver in SOLVERS:
        cond = {"label": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}

        def draw(n: int, solver: str = solver, cond: dict[str, Any] = cond, **options: Any) -> list[Any]:
            return run.sample(n, cond=cond, solver=solver, steps=20, seed=3, **options)

        full = draw(64)
        met.append(check(f"{solver}: the same call twice, largest difference", largest(draw(64), full), 0))
        met.append(check(f"{solver}: n = 14 and 21 in batches of 7", largest(draw(14, batch=7), draw(21, batch=7)), 0))
        for n in (1, 7):
            met.append(check(f"{solver}: n = {n} against 64, largest difference", largest(draw(n), full), 1e-5))
        padded = draw(64, deterministic_batch=16)
        for n in (1, 7):
            gap = largest(draw(n, deterministic_batch=16), padded)
            met.append(check(f"{solver}: n = {n} against 64 with deterministic_batch=16", gap, 0))
    print(f"batch independence: step {run.step}; {machine(run.device)}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main(trained_run(arguments().get("run", "runs/image-digits"))))
