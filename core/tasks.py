"""Work on something given instead of on nothing: fill in, enlarge, clean, vary. A task belongs to an adapter.

A task is a function ``(input, options, run, noise, k) -> Task``, called once for each design k. The dataclass that annotates
its parameter ``options`` declares what a user may say about it, as ``task.<key>=V``. ``polydiff.core.given`` has what tasks of most
modalities share.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polydiff.core.adapter import Adapter, Item, Lazy
from polydiff.core.commands.options import fill
from polydiff.core.errors import ConfigError, unknown
from polydiff.core.grids import Grid, make_grid
from polydiff.core.noise import Noise
from polydiff.core.request import File, read_files
from polydiff.core.solvers import Solver
from polydiff.core.tree import State, move

if TYPE_CHECKING:
    from polydiff.core.run import Run


@dataclass(frozen=True)
class Task:
    """What a task asks of the sampler for one design; states have no batch axis.

    Args:
        cond: conditions, put over those the user gave.
        mask: valid elements, bool (n,), instead of those that ``shape`` says.
        like: any state of the shape to sample, where what is given decides it; None: as ``x_start``, or the size asked for.
        x_start: where sampling starts: a clean state, which is perturbed to ``t_start``, or with ``noised`` (and always
            without ``t_start``) a state of that time already. None: the prior.
        t_start: time at which the named grid starts; None: the process's t_max.
        noised: x_start is a state at t_start.
        guide: Denoise -> Denoise, around the denoiser with its classifier-free guidance; a ``guidance.Guide``.
        wrap: Solver -> Solver.
        reference: what was given, shown beside the sample and saved with it. Elements that are true in its
            ``meta["kept"]``, shaped like a state, are in the sample as they are in it.
        meta: numbers and words for ``samples.json``.
    """

    cond: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    like: State | None = None
    x_start: State | None = None
    t_start: float | None = None
    noised: bool = False
    guide: Any = None
    wrap: Callable[[Solver], Solver] | None = None
    reference: Item | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """A task with the options and inputs of a user: calling it with k gives the Task of design k.

    Args:
        name: of the task.
        make: the adapter's function.
        options: an instance of what it declares.
        inputs: what it works on, in turns; may be empty.
        run: whose ``facts["size"]`` is the size that is sampled.
        seed: of the noise that it is given.
    """

    name: str
    make: Callable[..., Task]
    options: Any
    inputs: Sequence[Item]
    run: Run
    seed: int = 0

    def __call__(self, k: int) -> Task:
        """The task of design k."""
        given = self.inputs[k % len(self.inputs)] if self.inputs else None
        noise = Noise(self.seed, [k], mask_axis=getattr(self.run.process, "mask_axis", 1))
        return self.make(given, self.options, self.run, noise, k)


def declared_by(make: Callable[..., Task]) -> type[Any]:
    """The dataclass that declares a task's options: the annotation of its parameter ``options``; empty for another."""
    function = make.load() if isinstance(make, Lazy) else getattr(make, "func", make)
    kind = function.__annotations__.get("options")
    if isinstance(kind, str):  # other annotations may name what only type checkers import
        kind = function.__globals__.get(kind)
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else _NoOptions


@dataclass(frozen=True)
class _NoOptions:
    """Of a task that has none."""


def choose(adapter: Adapter, name: str, options: Mapping[str, Any]) -> tuple[Callable[..., Task], Any]:
    """A task of an adapter and its options, checked.

    Raises:
        ConfigError: unknown task or option (the nearest are named), or a value of another type.
    """
    if name not in adapter.tasks:
        raise unknown(f"task of the adapter {adapter.name!r}", name, adapter.tasks)
    make = adapter.tasks[name]
    return make, fill(declared_by(make), options, "task")


def work(run: Run, name: str, given: Any, options: Mapping[str, Any], size: Mapping[str, Any], seed: int) -> Work:
    """A task of a run's adapter on what a user gave.

    Args:
        run: the model.
        name: of the task.
        given: None, an Item, a file, a folder, or a list of Items and files.
        options: of the task by key.
        size: changes to the size that training had.
        seed: of its noise.

    Raises:
        ConfigError: see ``choose``; no such file, or no Item. DataError: a file that cannot be read.
    """
    make, chosen = choose(run.adapter, name, options)
    at = copy.copy(run)
    at.facts = {**run.facts, "size": {**(run.facts.get("size") or {}), **size}}
    codec = run.adapter.codec(at.facts)
    inputs: list[Item] = []
    for choice in given if isinstance(given, list | tuple) else [] if given is None else [given]:
        if isinstance(choice, Item):
            inputs.append(choice)
            continue
        if not isinstance(choice, str | Path):
            raise ConfigError(
                f"input must be an Item (a normalised state), a file or a folder, not {type(choice).__name__}"
            )
        files: list[File] = read_files("input", choice, lambda path: codec.encode(codec.read(path)))
        inputs += [Item(file.value, id=Path(file.path).name, meta={"file": file.path}) for file in files]
    return Work(name, make, chosen, inputs, at, seed)


def grouped(tasks: Sequence[Task], solver: Solver) -> Iterator[list[int]]:
    """Which tasks can be sampled in one batch: those with equal conditions, times, solvers and settings of their guides."""
    groups: dict[Hashable, list[int]] = {}
    for row, task in enumerate(tasks):
        method = solver if task.wrap is None else task.wrap(solver)
        start = None if task.x_start is None else task.noised
        key = (frozenset(task.cond), task.t_start, start, task.mask is None, method, _settings(task.guide))
        groups.setdefault(key, []).append(row)
    yield from groups.values()


def x_start_of(task: Task, process: Any, x: State, noise: Noise, mask: Tensor | None) -> State:
    """The state at which a batch starts.

    Args:
        task: one of the batch; they are alike in this.
        process: of the model.
        x: its x_start, collated; without one, anything of the right shape.
        noise: of the batch's items.
        mask: valid elements, bool (b, n).
    """
    if task.x_start is None:
        return process.prior(x, noise, mask)
    if task.noised or task.t_start is None:
        return x
    t = torch.tensor(task.t_start, dtype=torch.float64)
    return process.perturb(x, t, noise.draw(0, "start", x, mask=mask), mask)


def grid_of(task: Task, name: str, steps: int, process: Any) -> str | Grid:
    """The named grid, from the time at which the task starts."""
    return name if task.t_start is None else make_grid(name, steps, process, t_start=task.t_start)


def guide_of(tasks: Sequence[Task], device: torch.device) -> Callable[[Any], Any]:
    """The guide of a batch."""
    first = tasks[0].guide
    return (lambda denoise: denoise) if first is None else _moved(first.stack([t.guide for t in tasks]), device)


def _settings(part: Any) -> Hashable:
    """Whatever must be equal in guides of one batch: all but the numbers in their tensors."""
    if isinstance(part, Tensor):
        return tuple(part.shape)
    if dataclasses.is_dataclass(part):
        own = tuple(_settings(getattr(part, one.name)) for one in dataclasses.fields(part) if one.init)
        return (type(part), own)
    return part


def _moved(part: Any, device: torch.device) -> Any:
    """A dataclass whose tensors, through all levels, are on a device."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        names = [one.name for one in dataclasses.fields(part) if one.init]
        return dataclasses.replace(part, **{name: _moved(getattr(part, name), device) for name in names})
    return move(part, device) if isinstance(part, Tensor) else part
