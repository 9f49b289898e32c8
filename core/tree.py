"""States are tensors or flat dictionaries of tensors by leaf name; these helpers treat both alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = Tensor | dict[str, Tensor]


def tree_map(function: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """Apply ``function`` to a tensor, or leaf by leaf to dictionaries with the same keys."""
    if isinstance(first, dict):
        return {name: function(first[name], *(other[name] for other in rest)) for name in first}
    return function(first, *rest)


def leaves(state: State) -> list[Tensor]:
    """The tensors of a state, in order."""
    return list(state.values()) if isinstance(state, dict) else [state]


def batch_size(state: State) -> int:
    """Length of the leading axis, shared by all leaves."""
    return leaves(state)[0].shape[0]


def finite(state: State) -> bool:
    """Whether every number of a state is finite."""
    # a finite sum has finite terms, and costs a third; finite terms may overflow it
    return all(math.isfinite(leaf.sum().item()) or bool(torch.isfinite(leaf).all()) for leaf in leaves(state))


def flat(x: Tensor) -> Tensor:
    """A tensor (b, *dims) as rows (b, d), whatever of it is empty."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def take(state: State, index: Any) -> State:
    """Index the leading axis of every leaf."""
    return tree_map(lambda x: x[index], state)


def move(value: Any, device: torch.device | str, *, non_blocking: bool = False) -> Any:
    """Move tensors, dictionaries of tensors and None to a device."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: move(item, device, non_blocking=non_blocking) for name, item in value.items()}
    return value.to(device, non_blocking=non_blocking)


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Give a () or (b,) float64 coefficient the rank, dtype and device of ``like`` (b, *dims)."""
    value = value.to(dtype=like.dtype, device=like.device)
    return value.reshape(value.shape + (1,) * (like.ndim - 1)) if value.ndim else value
