"""Group actions on states, by the names that ``ADAPTER.symmetries`` may hold.

A network F has the symmetry when F(g x) = g F(x). Its output is a difference of states, so that a translation, which
moves states, leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Action(NamedTuple):
    """One group element: what it does to states (b, *dims), to the network's output and to masks (b, n)."""

    state: Callable[[Tensor], Tensor]
    output: Callable[[Tensor], Tensor]
    mask: Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _orthogonal(x: Tensor, generator: torch.Generator, determinant: int) -> Action:
    """x Q for a random orthogonal Q on the last axis, whose elements are the coordinates."""
    d = x.shape[-1]
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    if torch.linalg.det(q) * determinant < 0:
        q[:, 0] = -q[:, 0]
    turn = q.to(x.dtype)
    return Action(lambda y: y @ turn, lambda y: y @ turn, _same)


def rotation(x: Tensor, axis: int, generator: torch.Generator) -> Action:
    """Turn the coordinates, which are the last axis."""
    return _orthogonal(x, generator, 1)


def reflection(x: Tensor, axis: int, generator: torch.Generator) -> Action:
    """Mirror the coordinates, which are the last axis, in a plane."""
    return _orthogonal(x, generator, -1)


def translation(x: Tensor, axis: int, generator: torch.Generator) -> Action:
    """Move all elements of an item by the same vector of the last axis."""
    shift = torch.randn((len(x), *[1] * (x.ndim - 2), x.shape[-1]), generator=generator, dtype=x.dtype)
    return Action(lambda y: y + shift, _same, _same)


def permutation(x: Tensor, axis: int, generator: torch.Generator) -> Action:
    """Reorder the elements along the axis of the mask."""
    order = torch.randperm(x.shape[axis], generator=generator)
    return Action(lambda y: y.index_select(axis, order), lambda y: y.index_select(axis, order), lambda m: m[:, order])


def reversal(x: Tensor, axis: int, generator: torch.Generator) -> Action:
    """Reverse the elements along the axis of the mask."""
    return Action(lambda y: y.flip(axis), lambda y: y.flip(axis), lambda m: m.flip(1))


def negation(x: Tensor, axis: int, generator: torch.Generator) -> Action:
    """Change the sign."""
    return Action(torch.neg, torch.neg, _same)


SYMMETRIES: dict[str, Callable[[Tensor, int, torch.Generator], Action]] = {
    "rotation": rotation,
    "reflection": reflection,
    "translation": translation,
    "permutation": permutation,
    "reversal": reversal,
    "negation": negation,
}
