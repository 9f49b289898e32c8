"""Products: states with several leaves, each noised by a process of its own, independently of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polydiff.core.checks import shown
from polydiff.core.errors import ConfigError, ScheduleError, unknown
from polydiff.core.noise import Noise
from polydiff.core.processes.base import Process
from polydiff.core.schedule import bisect
from polydiff.core.schedules import Schedule, as_time

Leaves = dict[str, Any]
TimeMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ProductProcess(Process):
    """Independent processes on the leaves of states ``{name: tensor}``.

    Everything here takes and returns dictionaries by leaf, the log density excepted, which is a sum. Masks are shared: n
    runs along axis 1 of every leaf.

    Args:
        processes: the leaves' processes by name.
        clock: the leaf whose schedule grids and noise levels refer to.
        time_map: by leaf, its own time as an increasing function of the shared one, from [0, 1] to [0, 1]; a leaf that is
            not named has the shared time.

    Raises:
        ConfigError: no leaf, a leaf that is no process or a product itself, masks along other axes, unknown names.
        ScheduleError: a time map that decreases or leaves [0, 1].
    """

    processes: Mapping[str, Any]
    clock: str
    time_map: Mapping[str, TimeMap] = field(default_factory=dict)
    kind = "product"

    def __post_init__(self) -> None:
        if not isinstance(self.processes, Mapping) or not self.processes:
            raise ConfigError(f"processes = {shown(self.processes)} must be processes by leaf, at least one")
        for name, process in self.processes.items():
            if not isinstance(process, Process) or process.kind == "product" or process.mask_axis != 1:
                raise ConfigError(
                    f"leaf {name!r} is {shown(process)}: a process with mask_axis=1, not a product, is needed"
                )
        for what, name in (("clock", self.clock), *(("leaf of time_map", name) for name in self.time_map)):
            if name not in [*self.processes]:
                raise unknown(what, name, self.processes)
        for name, mapped in self.time_map.items():
            probe = mapped(torch.linspace(0, 1, 257, dtype=torch.float64))
            if not (bool((torch.diff(probe) > 0).all()) and float(probe[0]) >= 0 and float(probe[-1]) <= 1):
                raise ScheduleError(f"time_map of {name!r} must increase and stay within [0, 1]")

    def __hash__(self) -> int:  # plans are cached by process
        return hash((tuple(sorted(self.processes)), self.clock))

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        """The clock leaf's."""
        return self.processes[self.clock].schedule

    @property
    def t_min(self) -> float:
        """The largest of the leaves', in shared time."""
        return max(self._shared(name, process.t_min) for name, process in self.processes.items())

    @property
    def t_max(self) -> float:
        """The smallest of the leaves', in shared time."""
        return min(self._shared(name, process.t_max) for name, process in self.processes.items())

    def time(self, name: str, t: Tensor | float) -> Tensor:
        """The time of a leaf at a shared one."""
        return as_time(self.time_map[name](as_time(t)) if name in self.time_map else t)

    def _shared(self, name: str, t: float) -> float:
        """The shared time at which a leaf has its own time t; 0 or 1 where it never has."""
        if name not in self.time_map:
            return t
        ends = self.time(name, [0.0, 1.0]).tolist()  # type: ignore[arg-type]
        if not ends[0] < t < ends[1]:
            return float(t >= ends[1])
        return float(bisect(lambda shared: self.time(name, shared) < t, as_time(0.0), 60))

    def check(self, x: Any, what: str = "the state") -> None:
        """Refuse a state whose leaves are not those of the process."""
        if not isinstance(x, dict) or sorted(x) != sorted(self.processes):
            found = f"the leaves {[*x]}" if isinstance(x, dict) else shown(x)
            raise ConfigError(f"{what} must be a dictionary with the leaves {[*self.processes]}, not {found}")
        for name, process in self.processes.items():
            if not isinstance(x[name], Tensor):
                raise ConfigError(f"leaf {name!r} of {what} must be a tensor, not {shown(x[name])}")
            process.check(x[name], f"leaf {name!r} of {what}")

    def prior(self, like: Leaves, noise: Noise, mask: Tensor | None = None) -> Leaves:
        """Draw every leaf from its own prior, by the purpose ``"prior/<leaf>"``."""
        return self._map(lambda name, process, x: process.prior(x, _Leaf(noise, name), mask), like)

    def perturb(
        self, x0: Leaves, t: Tensor, z: Leaves, mask: Tensor | None = None, fixed: Tensor | None = None
    ) -> Leaves:
        """State at t, every leaf at its own time."""
        return self._map(lambda name, process, x, z: process.perturb(x, self.time(name, t), z, mask, fixed), x0, z)

    def renoise(
        self, x_s: Leaves, s: Tensor, t: Tensor, z: Leaves, mask: Tensor | None = None, fixed: Tensor | None = None
    ) -> Leaves:
        """Go from s up to a noisier t."""

        def one(name: str, process: Any, x: Tensor, z: Tensor) -> Tensor:
            return process.renoise(x, self.time(name, s), self.time(name, t), z, mask, fixed)

        return self._map(one, x_s, z)

    def project(self, z: Leaves, mask: Tensor | None = None, fixed: Tensor | None = None) -> Leaves:  # noqa: D102
        return self._map(lambda _, process, z: process.project(z, mask, fixed), z)

    def valid(self, like: Leaves, mask: Tensor | None, fixed: Tensor | None = None) -> Leaves:  # type: ignore[override]  # noqa: D102
        return self._map(lambda _, process, x: process.valid(x, mask, fixed), like)

    def mean(self, values: Leaves, mask: Tensor | None = None, fixed: Tensor | None = None) -> Leaves:  # type: ignore[override]  # noqa: D102
        return self._map(lambda _, process, x: process.mean(x, mask, fixed), values)

    def log_prior(self, x: Leaves, mask: Tensor | None = None) -> Tensor:
        """Log density (b,) of the prior, the sum of the leaves'."""
        return torch.stack([*self._map(lambda _, process, x: process.log_prior(x, mask), x).values()]).sum(0)

    def tangent_like(self, x: Leaves) -> Leaves:  # type: ignore[override]  # noqa: D102
        return self._map(lambda _, process, x: process.tangent_like(x), x)

    def retract(self, x: Leaves, u: Leaves) -> Leaves:  # type: ignore[override]  # noqa: D102
        return self._map(lambda _, process, x, u: process.retract(x, u), x, u)

    def tangent(self, x: Leaves, y: Leaves) -> Leaves:  # type: ignore[override]  # noqa: D102
        return self._map(lambda _, process, x, y: process.tangent(x, y), x, y)

    def convert(self, prediction: Any, wanted: str | Mapping[str, str]) -> Leaves:
        """A field of every leaf, the same for all or by leaf."""
        fields = wanted if isinstance(wanted, Mapping) else dict.fromkeys(self.processes, wanted)
        return {name: prediction[name].field(fields[name]) for name in prediction.x_t}

    def _map(self, function: Callable[..., Any], first: Leaves, *rest: Leaves) -> Leaves:
        if not isinstance(first, dict) or first.keys() != self.processes.keys():
            self.check(first)
        return {name: function(name, self.processes[name], x, *(y[name] for y in rest)) for name, x in first.items()}


class _Leaf:
    """A noise whose purposes name a leaf."""

    def __init__(self, noise: Any, name: str) -> None:
        self.noise, self.name = noise, name

    def draw(self, k: int, purpose: str, like: Tensor, *rest: Any, **further: Any) -> Tensor:
        """As ``Noise.draw``."""
        return self.noise.draw(k, f"{purpose}/{self.name}", like, *rest, **further)
