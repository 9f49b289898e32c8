"""What a caller may ask of a run: how to sample, and under which conditions. Checked here, trusted after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polydiff.core.adapter import Condition
from polydiff.core.errors import ConfigError, unknown
from polydiff.core.grids import GRIDS
from polydiff.core.solvers.names import NAMES
from polydiff.core.tree import State, leaves

MOST_STEPS = 100_000  # of a solver; a slip such as 1e9 would fill the memory with coefficients
SHOWN = 64  # samples that tell what a model does
TINY = 16  # numbers in a state; so small ones show nothing by themselves, only many of them together do


@dataclass(frozen=True)
class Settings:
    """How to sample: what a run's ``sampling`` section holds, with a caller's own choices put over it."""

    solver: str
    grid: str
    steps: int
    guidance: float = 1.0
    interval: tuple[float, float] | None = None


def sampling_settings(
    section: Mapping[str, Any],
    solver: str | None = None,
    grid: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
) -> Settings:
    """A ``sampling`` section with what is not None put over it.

    Raises:
        ConfigError: an unknown solver or grid, too few or too many steps, guidance that is no number, no interval
            [low, high].
    """
    interval = section.get("interval")
    if interval is not None and not _is_interval(interval):
        raise ConfigError(f"sampling.interval={interval} must be [low, high] in log-SNR with low < high, or null")
    chosen = Settings(
        solver=section["solver"] if solver is None else solver,
        grid=section["grid"] if grid is None else grid,
        steps=section["steps"] if steps is None else steps,
        guidance=float(section.get("guidance", 1.0) if guidance is None else guidance),
        interval=None if interval is None else (float(interval[0]), float(interval[1])),
    )
    if chosen.solver not in NAMES:
        raise unknown("solver", chosen.solver, NAMES)
    if chosen.grid not in GRIDS:
        raise unknown("grid", chosen.grid, GRIDS)
    if not math.isfinite(chosen.guidance):
        raise ConfigError(f"guidance={chosen.guidance} must be a finite number")
    positive(steps=chosen.steps)
    if chosen.steps > MOST_STEPS:
        raise ConfigError(f"steps={chosen.steps} must be at most {MOST_STEPS}")
    return chosen


def conditions(
    declared: Mapping[str, Condition], classes: Mapping[str, Sequence[object]], cond: Mapping[str, Any], n: int
) -> list[dict[str, Tensor]]:
    """Conditions of n items.

    Args:
        declared: the conditions there are.
        classes: names of the classes of each class condition.
        cond: by name: one value for all, a list that cycles over the items, None for without. A class is its index or name.
        n: number of items.

    Raises:
        ConfigError: an unknown condition, or a value it does not have; the message lists the valid ones.
    """
    values: list[dict[str, Tensor]] = [{} for _ in range(n)]
    for name, value in cond.items():
        if name not in declared:
            raise unknown("condition", name, declared)
        condition = declared[name]
        choices = _as_list(value, condition)
        if not choices:
            raise ConfigError(f"cond.{name}=[] is empty: give at least one value")
        tensors = [_condition(name, condition, classes.get(name, ()), choice) for choice in choices]
        for i, item in enumerate(values):
            tensor = tensors[i % len(tensors)]
            if tensor is not None:
                item[name] = tensor
    return values


def _condition(name: str, condition: Condition, names: Sequence[object], value: Any) -> Tensor | None:
    if value is None:
        return None
    if condition.kind != "class":
        try:
            tensor = torch.as_tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            tensor = None
        if tensor is None or tuple(tensor.shape) != condition.shape or not tensor.isfinite().all():
            shape = " x ".join(map(str, condition.shape)) or "one"
            raise ConfigError(f"cond.{name}={value} must be {shape} finite number(s), or a list of such")
        return tensor
    classes = [str(entry) for entry in names]
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(classes):
        return torch.tensor(value)
    if isinstance(value, str) and value in classes:
        return torch.tensor(classes.index(value))
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    raise ConfigError(f"cond.{name}={value}: valid are the indices 0 to {len(classes) - 1} and the names {shown}")


def enough(like: State, many: int, numbers: int) -> int:
    """How many samples to draw for somebody who wants to see what a model does: 64, or as many as states of a size allow.

    Args:
        like: a state of one item.
        many: how many of tiny states.
        numbers: about as many numbers in all samples together, so that large states get fewer of them, but at least 4.
    """
    size = sum(leaf.numel() for leaf in leaves(like))
    return many if size <= TINY else max(4, min(SHOWN, numbers // size))


def positive(**numbers: int) -> None:
    """Raise ConfigError for the first number below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name}={number} must be at least 1")


def _is_interval(value: Any) -> bool:
    numbers = isinstance(value, list | tuple) and all(type(end) in (int, float) for end in value)
    return numbers and len(value) == 2 and value[0] < value[1]


def _as_list(value: Any, condition: Condition) -> list[Any]:
    if condition.kind == "class":
        return list(value) if isinstance(value, list | tuple | range) or getattr(value, "ndim", 0) == 1 else [value]
    try:
        is_list = value is not None and torch.as_tensor(value).ndim == len(condition.shape) + 1
    except (TypeError, ValueError, RuntimeError):  # no numbers, or rows of different lengths: _condition says so
        is_list = False
    return list(value) if is_list else [value]
