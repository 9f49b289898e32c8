"""The one loop that every solver, process and modality goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polydiff.core.denoiser import WITHOUT_MEMORY, Denoise, Prediction, as_prediction
from polydiff.core.errors import ConfigError, DivergenceError
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
            where the denoiser says nothing. DivergenceError: the denoiser or the result is not finite. Only the first
            step's predictions are looked at; a run that fails is repeated, with the same noise, to say where.
    """
    check_state(x_T)
    method = resolve(solver)
    plan = method.plan(process, as_grid(grid, steps, process))
    noise = Projected(as_noise(generator, batch_size(x_T), getattr(process, "mask_axis", 1)), process, mask, fixed)
    k, last = 0, None

    def hold(state: Any) -> Any:
        """Put fixed elements back to their value at the start."""
        if fixed is None:
            return state
        return tree_map(lambda new, old: torch.where(process.valid(new, fixed).bool(), old, new), state, x_T)

    def guarded(x_t: Any, t: Tensor) -> Any:
        nonlocal last
        prediction = denoise(hold(x_t), t)
        if callback is not None:
            last = as_prediction(process, x_t, t, prediction).x0
        return prediction

    call = denoise if fixed is None and callback is None else guarded

    def run(strict: bool) -> Any:
        def checked(x_t: Any, t: Tensor) -> Any:
            output = call(x_t, t)
            place = f"at step {k + 1} of {len(plan)}, t = {float(t.flatten()[0]):.6g}"
            check_output(output, x_t, place, numbers=strict)
            return output

        nonlocal k
        state = method.init(x_T, plan)
        use: Denoise = checked
        for k in range(len(plan)):
            state = method.step(state, k, plan, use, noise)
            if not strict:
                use = call
                if callback is not None:
                    callback(k, plan.points[k].t, hold(state.x), hold(last))
        return hold(state.x)

    try:
        result = run(strict=False)
    except (RuntimeError, DivergenceError):
        run(strict=True)  # it names a denoiser that is at fault
        raise
    if not finite(result) or any(a.shape != b.shape for a, b in zip(leaves(result), leaves(x_T), strict=True)):
        run(strict=True)
        hint = "try more steps, another grid, or less guidance"
        raise DivergenceError(f"the sample is not finite after {len(plan)} steps: {hint}")
    return result


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
    method = resolve(solver)
    if method.stochastic:
        raise ConfigError(f"encode needs a solver without noise, not {solver}: take rk45, ddim or heun")
    down = make_grid(grid, steps, process, final=False) if isinstance(grid, str) else as_grid(grid, steps, process)
    token = WITHOUT_MEMORY.set(True)
    try:
        return sample(denoise, process, x0, method, grid=down.reversed(), mask=mask, generator=0)
    finally:
        WITHOUT_MEMORY.reset(token)


def check_state(x: Any) -> None:
    """Refuse a state that is not of finite floating-point numbers, (b, *dims)."""
    for leaf in leaves(x):
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim):
            raise ConfigError("a state is a floating-point tensor (b, *dims)")
        if not finite(leaf):
            row = int((~torch.isfinite(leaf).reshape(len(leaf), -1).all(1)).nonzero()[0])
            raise ConfigError(f"the state to start from is not finite: look at item {row} of {len(leaf)}")


def check_output(output: Any, x_t: Any, place: str, numbers: bool = True) -> None:
    """Refuse what a Denoise returned unless it is like the state, and finite where ``numbers`` are looked at.

    Raises:
        ConfigError: another type, shape, dtype or device. DivergenceError: not finite.
    """
    value = output.value if isinstance(output, Prediction) else output
    if isinstance(value, dict) != isinstance(x_t, dict) or not all(isinstance(leaf, Tensor) for leaf in leaves(value)):
        raise ConfigError(f"the denoiser returned a {type(value).__name__} {place}: a Prediction or a tensor is needed")
    for got, like in zip(leaves(value), leaves(x_t), strict=True):
        for name in ("shape", "dtype", "device"):
            ours, needed = getattr(got, name), getattr(like, name)
            if ours != needed:
                ours, needed = (tuple(v) if name == "shape" else v for v in (ours, needed))
                raise ConfigError(f"the denoiser returned {name} {ours} for a state of {name} {needed} {place}")
    if numbers and not finite(value):
        hint = "try more steps, another grid or less guidance, or see whether its training diverged"
        raise DivergenceError(f"the denoiser returned numbers that are not finite {place}: {hint}")
