"""The one loop that every solver, process and modality goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polydiff.core.denoiser import Denoise, as_prediction, finite
from polydiff.core.errors import DivergenceError
from polydiff.core.grids import Grid, as_grid
from polydiff.core.noise import Noise, Projected, as_noise
from polydiff.core.solvers import Solver, resolve
from polydiff.core.tree import batch_size, tree_map

Callback = Callable[[int, Tensor, Any, Any], None]


class Counter:
    """A Denoise that counts: ``calls`` is the number of batched calls made so far."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.calls = denoise, 0

    def __call__(self, x_t: Any, t: Tensor) -> Any:
        """Count and pass on."""
        self.calls += 1
        return self.denoise(x_t, t)


def count(denoise: Denoise) -> Counter:
    """Wrap a Denoise so that its ``calls`` tell how many function evaluations a solver made."""
    return Counter(denoise)


@torch.no_grad()
def sample(
    denoise: Denoise,
    process: Any,
    x_T: Any,  # noqa: N803  (the field's symbol)
    solver: str | Solver = "dpmpp-2m",
    steps: int = 10,
    grid: str | Grid | Tensor | Sequence[float] = "karras",
    mask: Tensor | None = None,
    fixed: Tensor | None = None,
    generator: Noise | torch.Generator | Sequence[torch.Generator] | int | None = None,
    callback: Callback | None = None,
) -> Any:
    """Integrate from noise to data.

    Args:
        denoise: ``(x_t, t) -> Prediction`` or x0_hat, conditions and mask already bound.
        process: the process the denoiser was trained for.
        x_T: state at the first time of the grid, (b, *dims); its dtype is kept.
        solver: a name in ``NAMES`` or a Solver.
        steps: number of intervals of a named grid.
        grid: a name in ``GRIDS``, a Grid, or explicit decreasing times (then the state at the last one is returned).
        mask: valid elements, bool (b, n).
        fixed: elements that keep the value they have in ``x_T``, bool (b, n).
        generator: where noise comes from: a Noise, a generator (item seeds are drawn once), one per item, a seed.
        callback: called as ``(k, t, x, x0_hat)`` after interval k with the time it started from and the new state.

    Returns:
        State at the last time, or x0_hat for a grid with a final interval.

    Raises:
        ConfigError: unknown names, or a solver that does not work on this process. ScheduleError: a grid that does not
            decrease or starts where the denoiser says nothing. DivergenceError: the result is not finite.
    """
    method = resolve(solver)
    plan = method.plan(process, as_grid(grid, steps, process))
    noise = Projected(as_noise(generator, batch_size(x_T), getattr(process, "mask_axis", 1)), process, mask, fixed)
    hold = _holder(process, x_T, fixed)
    last: list[Any] = []

    def guarded(x_t: Any, t: Tensor) -> Any:
        prediction = denoise(hold(x_t), t)
        if callback is not None:
            last[:] = [as_prediction(process, x_t, t, prediction).x0]
        return prediction

    call = denoise if fixed is None and callback is None else guarded
    state = method.init(x_T, plan)
    for k in range(len(plan)):
        state = method.step(state, k, plan, call, noise)
        if callback is not None:
            callback(k, plan.points[k].t, hold(state.x), hold(last[0]))
    result = hold(state.x)
    if not finite(result):
        raise DivergenceError(
            f"the sample is not finite after {len(plan)} steps: try more steps, another grid, or less guidance"
        )
    return result


def _holder(process: Any, reference: Any, fixed: Tensor | None) -> Callable[[Any], Any]:
    """A function that puts the fixed elements of a state back to their value in the reference."""
    if fixed is None:
        return lambda x: x

    def hold(leaf: Tensor, original: Tensor) -> Tensor:
        return torch.where(process.valid(leaf, fixed).bool(), original, leaf)

    return lambda x: tree_map(hold, x, reference)
