"""Group normalisation whose scale and shift may differ from item to item, with statistics that ignore padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def groups_for(channels: int, most: int = 32, smallest: int = 4) -> int:
    """Number of groups: the largest divisor of ``channels`` up to ``most`` that leaves ``smallest`` channels in each.

    Args:
        channels: channels to divide; any positive number works, a prime one ends in a single group.
        most: upper limit of the number of groups.
        smallest: fewest channels a group may have (a group of one channel would erase its mean).
    """
    limit = max(1, min(most, channels // smallest))
    return next(groups for groups in range(limit, 0, -1) if channels % groups == 0)


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, mask: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    r"""Normalise each group of channels of each item, then scale and shift each channel.

    .. math:: y = w \, (x - \mu_g) / \sqrt{v_g + \epsilon} + b

    Args:
        x: (b, c, *axes).
        groups: divisor of c.
        weight: (c,), or (b, c) for a scale of each item's own.
        bias: like ``weight``.
        mask: (b, 1, *axes) broadcastable, 1 where valid and 0 on padding, in the dtype of ``x``. Mean and variance then run over valid elements alone and the output is zero on padding.
        eps: added to the variance.
    Returns:
        Tensor like ``x``.
    Source:
        Wu and He 2018, eq. 1-5; a scale of each item's own as in Dhariwal and Nichol 2021, section 3.
    """
    b, c, *axes = x.shape
    if mask is not None:
        return _masked(x, groups, weight, bias, mask, eps)
    if weight.ndim == 1:
        return F.group_norm(x, groups, weight, bias, eps)
    if x.is_contiguous():
        # The batch folded into the channels: the affine step of the one kernel is then each item's own.
        y = F.group_norm(x.view(1, b * c, *axes), b * groups, weight.reshape(-1), bias.reshape(-1), eps)
        return y.view(x.shape)
    ones = (1,) * len(axes)
    return torch.addcmul(bias.view(b, c, *ones), F.group_norm(x, groups, eps=eps), weight.view(b, c, *ones))


def _masked(x: Tensor, groups: int, weight: Tensor, bias: Tensor, mask: Tensor, eps: float) -> Tensor:
    b, c, *axes = x.shape
    ones = (1,) * len(axes)
    valid = mask.expand(b, 1, *axes).reshape(b, 1, -1)
    count = (valid.sum(-1, keepdim=True) * (c // groups)).clamp_min(1)
    grouped = (x * mask).reshape(b, groups, c // groups, -1)
    mean = grouped.sum((-2, -1)).unsqueeze(-1) / count
    centred = (grouped - mean.unsqueeze(-1)) * valid.unsqueeze(1)
    variance = centred.square().sum((-2, -1)).unsqueeze(-1) / count
    y = (centred * torch.rsqrt(variance + eps).unsqueeze(-1)).view(x.shape)
    return torch.addcmul(bias.view(-1, c, *ones), y, weight.view(-1, c, *ones)) * mask


class GroupNorm(nn.Module):
    """Group norm with a learned scale and shift of each channel.

    Args:
        channels: c.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = groups_for(channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise ``x`` (b, c, *axes); ``mask`` as in :func:`group_norm`."""
        return group_norm(x, self.groups, self.weight, self.bias, mask)


class AdaptiveGroupNorm(nn.Module):
    """Group norm with the scale and shift that a modulation gives each item.

    Args:
        channels: c.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = groups_for(channels)

    def forward(self, x: Tensor, modulation: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise ``x`` (b, c, *axes); ``modulation`` (b, 2c) holds scale - 1 and shift, ``mask`` as above."""
        scale, shift = modulation.chunk(2, dim=1)
        return group_norm(x, self.groups, 1 + scale, shift, mask)
