"""Solvers: few classes, many names."""

from polydiff.core.solvers.adaptive import Adaptive
from polydiff.core.solvers.base import Solver
from polydiff.core.solvers.multistep import Multistep
from polydiff.core.solvers.names import NAMES, resolve
from polydiff.core.solvers.runge_kutta import Churn, RungeKutta

__all__ = ["NAMES", "Adaptive", "Churn", "Multistep", "RungeKutta", "Solver", "resolve"]
