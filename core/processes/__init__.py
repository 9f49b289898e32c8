"""Forward noising processes, one module per geometry."""

from __future__ import annotations

from polydiff.core.processes.gaussian import GaussianProcess, gaussian

__all__ = ["GaussianProcess", "gaussian"]
