"""Networks and blocks that do not know what their axes mean."""

from __future__ import annotations

from torch import nn


def parameter_count(module: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
