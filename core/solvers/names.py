"""The published methods by name: each is one class with parameters."""

from __future__ import annotations

from typing import NamedTuple

from polydiff.core.errors import ConfigError, unknown
from polydiff.core.solvers.adaptive import Adaptive
from polydiff.core.solvers.base import Solver
from polydiff.core.solvers.multistep import Multistep
from polydiff.core.solvers.runge_kutta import Churn, RungeKutta


class Entry(NamedTuple):
    """A named solver and where it was published."""

    solver: Solver
    source: str

    @property
    def order(self) -> int:
        """Order of accuracy."""
        return self.solver.order

    @property
    def stages(self) -> int | None:
        """Calls of the denoiser per interval; None where the solver chooses."""
        return self.solver.stages

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise."""
        return self.solver.stochastic


_ddim = Entry(
    Multistep(1, "x0"), "Song 2020 (DDIM), eq. 12 with eta = 0; Karras 2022, algorithm 1 without its correction"
)

NAMES: dict[str, Entry] = {
    "ddpm": Entry(
        Multistep(1, "x0", eta=1.0, noise_form="ancestral"), "Ho 2020, algorithm 2, with the posterior variance"
    ),
    "ddpm-learned": Entry(
        Multistep(1, "x0", eta=1.0, noise_form="learned"), "Nichol 2021, eq. 15: ddpm with the network's own variance"
    ),
    "ddim": _ddim,
    "euler": _ddim,
    "euler-v": Entry(
        RungeKutta("euler", "v"),
        "Euler in the angle of Salimans 2022, appendix D (whose DDIM turns by it exactly); ours",
    ),
    "heun": Entry(RungeKutta("heun", "eps"), "Karras 2022, algorithm 1"),
    "heun-v": Entry(RungeKutta("heun", "v"), "Heun in the angle; ours"),
    "edm": Entry(RungeKutta("heun", "eps", Churn()), "Karras 2022, algorithm 2"),
    "midpoint": Entry(RungeKutta("midpoint", "eps"), "Karras 2022, algorithm 3 (appendix D.2) with alpha = 1/2"),
    "rk4": Entry(RungeKutta("rk4", "v"), "classical fourth order in the angle; ours"),
    "dpmpp-2m": Entry(Multistep(2, "x0", rule="midpoint"), "Lu 2022 (DPM-Solver++), algorithm 2"),
    "dpmpp-2m-sde": Entry(
        Multistep(2, "x0", rule="midpoint", eta=1.0), "Lu 2022 (DPM-Solver++), section 5: SDE-DPM-Solver++(2M)"
    ),
    "rk45": Entry(Adaptive(), "Dormand 1980, table 2, in the angle; the tolerance is Adaptive's"),
    "ab2-v": Entry(Multistep(2, "v", "angle"), "Adams-Bashforth in the angle; ours"),
}


def resolve(solver: str | Solver) -> Solver:
    """A solver from its name, or itself.

    Raises:
        ConfigError: unknown name (the nearest are named), or not a solver.
    """
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str):
        raise ConfigError(f"a solver is a name or a Solver, not {type(solver).__name__}")
    if solver not in NAMES:
        raise unknown("solver", solver, NAMES)
    return NAMES[solver].solver
