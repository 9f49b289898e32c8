"""polydiff: one continuous-time diffusion core, any modality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# In a checkout the repository root (two levels up) joins the package path; in a wheel that test is false.
_root = Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "core" / "__init__.py").is_file():
    __path__.insert(0, str(_root))
del _root

if TYPE_CHECKING:
    from polydiff.core.run import Run


def load(path: str | Path, *, device: str = "auto") -> Run:
    """Open a training run: EMA weights of its newest valid checkpoint, ready to sample.

    Args:
        path: a run folder written by ``polydiff train``.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
    Raises:
        CheckpointError: no folder, no valid checkpoint, or one that was altered.
    """
    from polydiff.core.run import Run

    return Run.load(path, device=device)
