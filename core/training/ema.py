"""Exponential moving average of the weights, with a half-life in items and the EDM warm-up rule."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class EMA(Generic[Module]):
    r"""A second copy of a module that trails the first.

    .. math:: \bar\theta \leftarrow \bar\theta + (1 - 2^{-n/h})(\theta - \bar\theta),
              \qquad h = \min(\text{halflife}, \text{warmup} \cdot \text{items seen before})

    After h items of constant weights half of the distance is gone, whatever the batch size. The warm-up lets the average
    forget the random initial weights: the first update copies.

    Args:
        module: the network that is trained; copied at once, the copy is in eval mode and takes no gradient.
        halflife_items: half-life in items (samples seen), > 0.
        warmup: half-life as a fraction of the items seen so far, while that is shorter; None or 0 for none.
    Source:
        NVlabs/edm training_loop.py, ``ema_halflife_nimg`` and ``ema_rampup_ratio``.
    """

    def __init__(self, module: Module, halflife_items: float, warmup: float | None = 0.05) -> None:
        self.module: Module = copy.deepcopy(module).eval().requires_grad_(False)
        self.halflife, self.warmup = float(halflife_items), float(warmup or 0.0)
        self._average: list[Tensor] = list(self.module.parameters())
        self._current: list[Tensor] = list(module.parameters())
        self._copies, self._buffers = list(self.module.buffers()), list(module.buffers())
        device = self._average[0].device
        # Counted on the device: a skipped step is known there first, and asking for it would stall the pipeline.
        self.items = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    @torch.no_grad()
    def update(self, n_items: int, skip: Tensor | None = None) -> None:
        """Take one step towards the current weights; buffers are copied.

        Args:
            n_items: items the last step was trained on.
            skip: () 0 or 1 on the device; 1 leaves the average and its item count as they are.
        """
        halflife = torch.full_like(self.items, self.halflife)
        if self.warmup:
            halflife = torch.minimum(halflife, self.warmup * self.items)
        weight = 1.0 - torch.exp2(-n_items / halflife.clamp_min(1e-8))
        keep = torch.ones_like(weight) if skip is None else 1.0 - skip.to(weight.dtype)
        self.items += n_items * keep
        weight = (weight * keep).to(self._average[0].dtype)
        if weight.device.type == "cpu":
            torch._foreach_lerp_(self._average, self._current, [weight] * len(self._average))
        else:  # one weight for all tensors has no fused lerp; these three are fused
            change = list(torch._foreach_sub(self._current, self._average))
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(self._average, change)
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)

    def state_dict(self) -> dict[str, Any]:
        """Averaged weights and buffers, named as in the module."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; ``items`` is restored separately."""
        self.module.load_state_dict(state)
