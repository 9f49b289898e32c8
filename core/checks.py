"""What callers hand in, looked at once: one line says what is wrong with it. The maths trusts what has passed here."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from polydiff.core.errors import ConfigError, DivergenceError, PolydiffError
from polydiff.core.tree import finite, flat, leaves, tree_map

Error = type[PolydiffError]


def shown(value: Any) -> str:
    """A value in a message: short, and a tensor by its shape."""
    if isinstance(value, Tensor) and value.ndim:
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    text = str(value.item()) if isinstance(value, Tensor) and not value.is_meta else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(value: Any) -> float:
    """A finite number of Python or NumPy, or in a tensor of no axes, as it is; NaN for anything else."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta:
        value = value.item()
    return value if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) else math.nan  # type: ignore[return-value]


def number(
    name: str, value: Any, least: float | None = None, above: float | None = None, error: Error = ConfigError
) -> float:
    """A finite number, not under ``least``, beyond ``above``; of Python, NumPy or in a tensor of no axes."""
    plain = _plain(value)
    if not math.isnan(plain) and (least is None or plain >= least) and (above is None or plain > above):
        return float(plain)
    bounds = ("" if least is None else f" of at least {least:g}") + ("" if above is None else f" above {above:g}")
    kind = "finite number" if isinstance(value, Real | Tensor) and not isinstance(value, bool) else "number"
    raise error(f"{name} = {shown(value)} must be a {kind}{bounds}")


def whole(name: str, value: Any, least: int = 1, most: int | None = None, error: Error = ConfigError) -> int:
    """A whole number from ``least`` to ``most``, whatever its type (true and false are none)."""
    plain = _plain(value)
    if plain >= least and (most is None or plain <= most) and int(plain) == plain:
        return int(plain)
    bounds = f"of at least {least}" if most is None else f"from {least} to {most:,}"
    raise error(f"{name} = {shown(value)} must be a whole number {bounds}")


def row(name: str, value: Any, error: Error = ConfigError) -> Tensor:
    """One row of numbers, of whatever holds them, as a float64 tensor (n,)."""
    try:
        numbers = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(0, 0)
    if numbers.ndim != 1 or numbers.is_complex() or numbers.is_meta:
        raise error(f"{name} must be one row of numbers, not {shown(value)}")
    return torch.as_tensor(value, dtype=torch.float64)  # from the value: a list has been rounded to float32


def interval(name: str, value: Any) -> tuple[float, float]:
    """Two numbers (low, high) with low < high; infinite ones, too."""
    ends = list(value) if isinstance(value, tuple | list) else []
    if (
        len(ends) != 2
        or not all(isinstance(end, Real) and not isinstance(end, bool) for end in ends)
        or not ends[0] < ends[1]
    ):
        raise ConfigError(f"{name} {shown(value)} must be (low, high) in log-SNR with low < high")
    return float(ends[0]), float(ends[1])


def check_real(name: str, value: Any) -> None:
    """Refuse what is no tensor of floating-point numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ConfigError(f"{name} must be a floating-point tensor, not {shown(value)}")


def check_bool(name: str, value: Any) -> None:
    """Refuse what is no tensor of true and false."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise ConfigError(f"{name} must be a bool tensor, not {shown(value)}")


def check_process(process: Any, what: str = "", gaussian: bool = False) -> None:
    """Refuse what is no process or, for ``what`` needs one, no Gaussian process."""
    if not hasattr(process, "kind") or isinstance(process, type):
        raise ConfigError(
            f"the process is {shown(process)}: give gaussian('vp'), another name's, or GaussianProcess(schedule)"
        )
    if gaussian and process.kind != "gaussian":
        raise ConfigError(f"{what} needs a Gaussian process, not {type(process).__name__}")


def check_state(x: Any, process: Any, denoise: Callable[..., Any]) -> None:
    """Refuse a state that is not of finite floating-point numbers, (b, *dims), and what cannot denoise it."""
    if not callable(denoise):
        raise ConfigError(f"the denoiser is {shown(denoise)}: a function (x_t, t) -> Prediction or x0_hat is needed")
    check_process(process)
    if isinstance(x, dict) and (not x or process.kind == "gaussian"):
        raise ConfigError(
            f"the state is a dictionary of {[*x]}, which this process does not take: give a tensor (b, *dims)"
        )
    for leaf in leaves(x):
        plain = isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_meta
        if not (plain and leaf.is_floating_point() and leaf.ndim):
            raise ConfigError(f"a state is a floating-point tensor (b, *dims), not {shown(leaf)}")
        if not finite(leaf):
            item = int((~torch.isfinite(flat(leaf)).all(1)).nonzero()[0])
            raise ConfigError(f"the state to start from is not finite: look at item {item} of {len(leaf)}")
    process.check(x)


def check_mask(name: str, mask: Any, like: Any, axis: int) -> None:
    """Refuse a mask that is not a bool tensor (b, n) with n along an axis of every leaf of a state (b, *dims)."""
    if mask is None:
        return
    for leaf in leaves(like):
        needed = (len(leaf), leaf.shape[axis] if leaf.ndim > 1 else "n")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != needed:
            raise ConfigError(
                f"{name} is {shown(mask)}, which does not fit a state {tuple(leaf.shape)}: a bool tensor {needed}, with n "
                f"along axis {axis}, is needed"
            )
        if mask.device != leaf.device:
            raise ConfigError(f"{name} is on {mask.device}, the state on {leaf.device}: move it there")


def check_output(output: Any, x_t: Any, place: str, numbers: bool = True) -> None:
    """Refuse what a Denoise returned unless it is like the state, and finite where ``numbers`` are looked at.

    Raises:
        ConfigError: another type, shape, dtype or device. DivergenceError: not finite.
    """
    value = output.value if hasattr(output, "given") else output  # a Prediction, told by what it was built from
    if isinstance(value, dict) != isinstance(x_t, dict) or not all(isinstance(leaf, Tensor) for leaf in leaves(value)):
        raise ConfigError(f"the denoiser returned a {type(value).__name__} {place}: a Prediction or a tensor is needed")
    if isinstance(x_t, dict) and sorted(value) != sorted(x_t):
        raise ConfigError(f"the denoiser returned the leaves {[*value]} for a state of {[*x_t]} {place}")
    needs = x_t if value is output or output.given == "x0" else output.process.tangent_like(x_t)
    for got, like in zip(leaves(value), leaves(tree_map(lambda _, like: like, value, needs)), strict=True):
        for name in ("shape", "dtype", "device"):
            ours, needed = getattr(got, name), getattr(like, name)
            if ours != needed:
                ours, needed = (tuple(v) if name == "shape" else v for v in (ours, needed))
                raise ConfigError(f"the denoiser returned {name} {ours} for a state of {name} {needed} {place}")
    curved = value is not output and output.given == "x0" and output.process.kind != "gaussian"
    if (numbers or curved) and not finite(value):
        hint = "try more steps, another grid or less guidance, or see whether its training diverged"
        raise DivergenceError(f"the denoiser returned numbers that are not finite {place}: {hint}")
    if curved:
        output.process.check(value, f"x0_hat of the denoiser {place}")
