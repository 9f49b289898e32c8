"""What a caller may ask of a run: how to sample, and under which conditions. Checked here, trusted after."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from polydiff.core.adapter import Condition, Item
from polydiff.core.errors import ConfigError, PolydiffError, unknown
from polydiff.core.grids import GRIDS, MOST_STEPS
from polydiff.core.objectives import RESERVED
from polydiff.core.solvers import NAMES, Solver
from polydiff.core.tree import State, leaves

SHOWN = 64  # samples that tell what a model does
TINY = 16  # numbers in a state; so small ones show nothing by themselves, only many of them together do


@dataclass(frozen=True)
class Settings:
    """How to sample: what a run's ``sampling`` section holds, with a caller's own choices put over it."""

    solver: str | Solver
    grid: str
    steps: int
    guidance: float = 1.0
    interval: tuple[float, float] | None = None


def sampling_settings(
    section: Mapping[str, Any],
    solver: str | Solver | None = None,
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
    scale = section.get("guidance", 1.0) if guidance is None else guidance
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise ConfigError(f"guidance={scale} must be a finite number")
    chosen = Settings(
        solver=section["solver"] if solver is None else solver,
        grid=section["grid"] if grid is None else grid,
        steps=section["steps"] if steps is None else steps,
        guidance=float(scale),
        interval=None if interval is None else (float(interval[0]), float(interval[1])),
    )
    if not isinstance(chosen.solver, Solver) and chosen.solver not in [*NAMES]:
        raise unknown("solver", chosen.solver, NAMES)
    if chosen.grid not in [*GRIDS]:
        raise unknown("grid", chosen.grid, GRIDS)
    positive(steps=chosen.steps)
    if chosen.steps > MOST_STEPS:
        raise ConfigError(f"steps={chosen.steps} must be at most {MOST_STEPS}")
    return chosen


@dataclass(frozen=True)
class Asked:
    """What a caller asks of one item.

    Args:
        cond: values by name.
        files: by name, the files that values were read from.
    """

    cond: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def asked(
    declared: Mapping[str, Condition],
    cond: Mapping[str, Any],
    n: int,
    facts: Mapping[str, Any],
    size: Mapping[str, Any] | None = None,
) -> list[Asked]:
    """Conditions of n items.

    Args:
        declared: the conditions there are.
        cond: by name: one value for all, a list that cycles over the items, None for without. A class is its index or
            name; a condition that can be read from files also takes a path, and a folder for all that it holds.
        n: number of items.
        facts: of the data set: names of the classes, and whatever readers of files look at.
        size: of the items, for readers of files.

    Raises:
        ConfigError: an unknown condition, or a value it does not have; the message lists the valid ones.
        DataError: a file that cannot be read.
    """
    if not isinstance(cond, Mapping):
        raise ConfigError(f"cond={cond!r} must be a mapping of values by name: one of {', '.join(declared) or 'none'}")
    items = [Asked() for _ in range(n)]
    for name, value in cond.items():
        if name not in declared:
            raise unknown("condition", name, declared)
        condition = declared[name]
        choices = _as_list(value, condition)
        if not choices:
            raise ConfigError(f"cond.{name}=[] is empty: give at least one value")
        if condition.read is not None:
            choices = [entry for choice in choices for entry in _read(name, condition, choice, facts, size or {})]
        names = (facts.get("classes") or {}).get(name, ())
        files = [choice.path if isinstance(choice, File) else "" for choice in choices]
        values = [choice.value if isinstance(choice, File) else choice for choice in choices]
        tensors = [_condition(name, condition, names, entry) for entry in values]
        for i, item in enumerate(items):
            k = i % len(tensors)
            if (tensor := tensors[k]) is not None:
                item.cond[name] = tensor
            if files[k]:
                item.files[name] = files[k]
    return items


class File(NamedTuple):
    """A value and the file that it was read from."""

    value: Any
    path: str


def read_files(key: str, choice: Any, read: Callable[[Path], Any]) -> list[File]:
    """What a file holds, or the files of a folder: those that cannot be read are skipped, counted and named.

    Args:
        key: what the user calls it, for messages.
        choice: the path.
        read: raises a PolydiffError for a file that it cannot use.
    """
    if not isinstance(choice, str | Path):
        raise ConfigError(f"{key} must be a file or a folder, not {type(choice).__name__}")
    path = Path(choice).expanduser()
    if path.is_file():
        return [File(read(path), str(path))]
    if not path.is_dir() or not str(choice):  # an empty path would be the current folder
        raise ConfigError(f"{key}={choice}: no such file or folder")
    found, skipped = [], []
    for file in sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith(".")):
        try:
            found.append(File(read(file), str(file)))
        except PolydiffError as error:
            skipped.append(f"{file.name} ({str(error).removeprefix(f'{file}: ')})")
    if not found:
        why = f"; for one, {skipped[0]}" if skipped else ": it is empty"
        raise ConfigError(f"{key}={choice}: no file in this folder can be used{why}")
    if skipped:
        text = f"{key}={choice}: skipped {len(skipped)} of {len(found) + len(skipped)} files: {'; '.join(skipped)}"
        warnings.warn(text, UserWarning, stacklevel=5)
    return found


def _read(
    name: str, condition: Condition, choice: Any, facts: Mapping[str, Any], size: Mapping[str, Any]
) -> list[File] | list[Any]:
    """The values of a condition that a path stands for; anything else is a value itself."""
    if not isinstance(choice, str | Path):
        return [choice]
    read = cast("Callable[..., Tensor]", condition.read)
    return read_files(f"cond.{name}", choice, lambda path: read(path, facts, size))


def check_fields(declared: Mapping[str, Condition], cond: Mapping[str, Tensor], like: State) -> None:
    """Refuse fields that have not the axes of the state they are joined to.

    Raises:
        ConfigError: naming the condition and both sizes.
    """
    state = leaves(like)[0].shape
    for name, value in cond.items():
        condition = declared[name]
        if condition.kind != "class" and tuple(value.shape) != condition.shape_in(state):
            wanted, got = (" x ".join(map(str, shape)) for shape in (condition.shape_in(state), value.shape))
            raise ConfigError(f"cond.{name} is {got}, samples of this size need {wanted}: change it, or size.<key>")


def _condition(name: str, condition: Condition, names: Sequence[object], value: Any) -> Tensor | None:
    if value is None:
        return None
    if condition.kind != "class":
        try:
            tensor = torch.as_tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            tensor = None
        if tensor is None or not _fits(tensor, condition.shape or ()) or not tensor.isfinite().all():
            shape = " x ".join("any" if size is None else str(size) for size in condition.shape or ()) or "one"
            file = "a file, a folder, or " if condition.read is not None else ""
            raise ConfigError(f"cond.{name}={_shown(value)} must be {file}{shape} finite number(s), or a list of such")
        return tensor
    classes = [str(entry) for entry in names]
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else _shown(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(classes):
        return torch.tensor(value)
    if isinstance(value, str) and value in classes:
        return torch.tensor(classes.index(value))
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    raise ConfigError(
        f"cond.{name}={_shown(value)}: valid are the indices 0 to {len(classes) - 1} and the names {shown}"
    )


def lent(declared: Mapping[str, Condition], item: Item) -> bool:
    """Whether a real item has conditions that nobody can make up, so that samples had better be given all of its."""
    return any(
        name in item.cond and condition.kind in ("tensor", "field") and name not in RESERVED
        for name, condition in declared.items()
    )


def lend(declared: Mapping[str, Condition], items: Sequence[Item]) -> dict[str, Any]:
    """The conditions of real items, for samples that are given them in turn; settings are left out."""
    known = [name for name, condition in declared.items() if condition.kind != "setting" and name not in RESERVED]
    return {name: [item.cond.get(name) for item in items] for name in known if any(name in item.cond for item in items)}


def enough(like: State, many: int, numbers: int) -> int:
    """How many samples to draw for somebody who wants to see what a model does: 64, or as many as states of a size allow.

    Args:
        like: a state of one item.
        many: how many of tiny states.
        numbers: about as many numbers in all samples together, so that large states get fewer of them, but at least 4.
    """
    size = sum(leaf.numel() for leaf in leaves(like))
    return many if size <= TINY else max(4, min(SHOWN, numbers // size))


def whole(**numbers: Any) -> None:
    """Raise ConfigError for the first that is no whole number."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise ConfigError(f"{name}={number!r} must be a whole number")


def positive(**numbers: Any) -> None:
    """Raise ConfigError for the first that is no whole number of at least 1."""
    whole(**numbers)
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name}={number} must be at least 1")


def _is_interval(value: Any) -> bool:
    numbers = isinstance(value, list | tuple) and all(type(end) in (int, float) for end in value)
    return numbers and len(value) == 2 and value[0] < value[1]


def _fits(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    return tensor.ndim == len(shape) and all(n in (None, own) for n, own in zip(shape, tensor.shape, strict=True))


def _shown(value: Any) -> str:
    text = f"a tensor of {' x '.join(map(str, value.shape))}" if isinstance(value, Tensor) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _as_list(value: Any, condition: Condition) -> list[Any]:
    if condition.kind == "class":
        return list(value) if isinstance(value, list | tuple | range) or getattr(value, "ndim", 0) == 1 else [value]
    if isinstance(value, list | tuple) and (
        not value or any(isinstance(entry, str | Path | Tensor | None) for entry in value)
    ):
        return list(value)
    try:
        is_list = value is not None and torch.as_tensor(value).ndim == len(condition.shape or ()) + 1
    except (TypeError, ValueError, RuntimeError):  # no numbers, or rows of different lengths: _condition says so
        is_list = False
    return list(value) if is_list else [value]
