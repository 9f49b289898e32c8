"""A coordinate of a point, given the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch

from polydiff.core import given
from polydiff.core.adapter import Item
from polydiff.core.errors import ConfigError
from polydiff.core.given import Known, needed_like
from polydiff.core.noise import Noise
from polydiff.core.tasks import Task

if TYPE_CHECKING:
    from polydiff.core.run import Run


@dataclass(frozen=True)
class Inpaint(Known):
    """Options of ``inpaint``."""

    known: Annotated[list[float | None] | None, "[x, y] with null for the unknown one; null: x of the input"] = None


def inpaint(input: Item | None, options: Inpaint, run: Run, noise: Noise, k: int) -> Task:
    """Draw the coordinate that is not known."""
    if options.known is None:
        return given.inpaint(needed_like(input, "inpaint", run), torch.tensor([True, False]), options, run)
    if input is not None or len(options.known) != 2 or options.known.count(None) != 1:
        raise ConfigError("task.known must be [x,null] or [null,y], without input=: one coordinate is known")
    x0 = torch.tensor([float("nan") if value is None else value for value in options.known])
    return given.inpaint(x0, x0.isfinite(), options, run)
