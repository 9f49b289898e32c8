"""Forward noising processes, one module per geometry."""

from __future__ import annotations

from polydiff.core.processes.gaussian import GaussianProcess, gaussian
from polydiff.core.processes.product import ProductProcess
from polydiff.core.processes.so3 import SO3Flow, SO3Process

__all__ = ["GaussianProcess", "ProductProcess", "SO3Flow", "SO3Process", "gaussian"]
