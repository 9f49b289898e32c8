"""Solvers: few classes, many names."""

from polydiff.core.solvers.adaptive import Adaptive
from polydiff.core.solvers.base import Solver, resolve
from polydiff.core.solvers.euler_maruyama import EulerMaruyama
from polydiff.core.solvers.geodesic import Geodesic
from polydiff.core.solvers.langevin import PredictorCorrector
from polydiff.core.solvers.multistep import Multistep
from polydiff.core.solvers.names import NAMES
from polydiff.core.solvers.resample import Resample
from polydiff.core.solvers.runge_kutta import Churn, RungeKutta

__all__ = [
    "NAMES",
    "Adaptive",
    "Churn",
    "EulerMaruyama",
    "Geodesic",
    "Multistep",
    "PredictorCorrector",
    "Resample",
    "RungeKutta",
    "Solver",
    "resolve",
]
