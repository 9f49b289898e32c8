"""The one loop that every solver, process and modality goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polydiff.core.checks import check_mask, check_output, check_state
from polydiff.core.denoiser import Denoise, Prediction, as_prediction, trajectory
from polydiff.core.errors import ConfigError, DivergenceError, ScheduleError
from polydiff.core.grids import Grid, as_grid, make_grid
from polydiff.core.noise import Noise, Projected, as_noise
from polydiff.core.solvers import Solver, resolve
from polydiff.core.tree import batch_size, finite, leaves, tree_map

Callback = Callable[[int, Tensor, Any, Any], None]


class Counter:
    """A Denoise that counts its batched calls, a solver's function evaluations, in ``calls``."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.calls = denoise, 0

    def __call__(self, x_t: Any, t: Tensor) -> Any:
        """Count and pass on."""
        self.calls += 1
        return self.denoise(x_t, t)


count = Counter


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
        denoise, process: ``(x_t, t) -> Prediction`` or x0_hat, conditions and mask bound, and what it was trained for.
        x_T: state at the first time of the grid, (b, *dims); its dtype is kept.
        solver: a name in ``NAMES`` or a Solver.
        steps: number of intervals of a named grid.
        grid: a name in ``GRIDS``, a Grid, or explicit decreasing times (then the state at the last one is returned).
        mask, fixed: valid elements, and those that keep the value they have in ``x_T``, bool (b, n).
        generator: where noise comes from: a Noise, a generator (item seeds are drawn once), one per item, a seed.
        callback: called as ``(k, t, x, x0_hat)`` after interval k with the time it started from and the new state.

    Returns:
        State at the last time, or x0_hat for a grid with a final interval.

    Raises:
        ConfigError: unknown names, a solver that does not work on this process, a state that is not finite, or a denoiser
            that returns anything but a tensor like the state. ScheduleError: a grid that does not decrease or starts
            where the denoiser says nothing. DivergenceError: the denoiser or the result is not finite; such a run is
            repeated, with the same noise, to say at which step.
    """
    check_state(x_T, process, denoise)
    noise = as_noise(generator, batch_size(x_T), getattr(process, "mask_axis", 1))
    way = as_grid(grid, steps, process)
    if way.upward:
        raise ScheduleError(
            "sample runs down from noise to data, and this grid runs up: give grid.reversed(), or encode"
        )
    return _walk(denoise, process, x_T, resolve(solver), way, noise, mask, fixed, callback)


@torch.no_grad()
def encode(
    denoise: Denoise,
    process: Any,
    x0: Any,
    solver: str | Solver = "rk45",
    steps: int = 10,
    grid: str | Grid | Tensor | Sequence[float] = "karras",
    mask: Tensor | None = None,
) -> Any:
    """Integrate the probability flow from data to noise: ``sample`` without noise, the other way.

    Args:
        denoise, process, solver, mask: as in ``sample``; the solver draws no noise.
        x0: state at the last time of the grid, (b, *dims); for a named grid that is the process's t_min.
        steps, grid: as in ``sample``, decreasing and walked from end to start; a named grid has no final interval.

    Returns:
        State at the first time of the grid; ``sample`` on the same times leads back.

    Raises:
        ConfigError: as ``sample``, or a solver that draws noise. ScheduleError, DivergenceError: as ``sample``.
    """
    check_state(x0, process, denoise)
    method = resolve(solver)
    if method.stochastic:
        raise ConfigError(f"encode needs a solver without noise, not {solver}: take rk45, ddim or heun")
    down = make_grid(grid, steps, process, final=False) if isinstance(grid, str) else as_grid(grid, steps, process)
    if down.upward:
        raise ScheduleError(
            "encode takes a grid as sample does, downward, and walks it from its end: give grid.reversed()"
        )
    noise = as_noise(0, batch_size(x0), getattr(process, "mask_axis", 1))
    return _walk(denoise, process, x0, method, down.reversed(), noise, mask)


def _walk(
    denoise: Denoise,
    process: Any,
    x: Any,
    method: Solver,
    grid: Grid,
    source: Noise,
    mask: Tensor | None,
    fixed: Tensor | None = None,
    callback: Callback | None = None,
) -> Any:
    """Take a state from the first time of a grid to the last."""
    for name, marked in {"mask": mask, "fixed": fixed}.items():
        check_mask(name, marked, x, source.mask_axis)
    plan = method.plan(process, grid)
    noise = Projected(source, process, mask, fixed)
    if not all(leaf.numel() for leaf in leaves(x)):
        return tree_map(torch.clone, x)  # of no numbers
    plain = process.kind == "gaussian"  # else every output is looked at in full
    shape, dtype, device = (x.shape, x.dtype, x.device) if plain else (None, None, None)

    def hold(state: Any) -> Any:
        """Put fixed elements back to their value at the start."""
        if fixed is None:
            return state
        return tree_map(lambda new, old, own: torch.where(own.bool(), old, new), state, x, process.valid(state, fixed))

    def run(strict: bool) -> Any:
        """All steps; a strict run looks at every number that the denoiser returns, and calls nobody back."""
        k, last = 0, None

        def checked(x_t: Any, t: Tensor) -> Any:
            output = denoise(x_t, t)
            value = output.value if type(output) is Prediction else output
            # all that check_output looks at besides numbers, at a tenth of its price
            if (
                strict
                or type(value) is not Tensor
                or value.shape != shape
                or value.dtype != dtype
                or value.device != device
            ):
                place = f"at step {k + 1} of {len(plan)}, t = {float(t.flatten()[0]):.6g}"
                check_output(output if plain else as_prediction(process, x_t, t, output), x_t, place, numbers=strict)
            return output

        def guarded(x_t: Any, t: Tensor) -> Any:
            nonlocal last
            prediction = checked(hold(x_t), t)
            if callback is not None:
                last = as_prediction(process, x_t, t, prediction).x0
            return prediction

        use = checked if fixed is None and callback is None else guarded
        state = method.init(x, plan)
        with trajectory(None if grid.upward else object()):
            for k in range(len(plan)):
                try:
                    state = method.step(state, k, plan, use, noise)
                except DivergenceError:
                    if not strict:
                        run(strict=True)  # it names a denoiser that is at fault
                    raise
                if callback is not None and not strict:
                    callback(k, plan.points[k].t, hold(state.x), hold(last))
        return hold(state.x)

    result = run(strict=False)
    if not finite(result):
        run(strict=True)
        hint = "try more steps, another grid, or less guidance"
        raise DivergenceError(f"the sample is not finite after {len(plan)} steps: {hint}")
    return result
