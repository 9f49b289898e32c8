"""Multi-head self-attention among all places of a field."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from polydiff.core.errors import ConfigError
from polydiff.core.nn.norms import GroupNorm


class SelfAttention(nn.Module):
    r"""Let every place look at every other: :math:`x + W_o \, \mathrm{softmax}(q k^T / \sqrt d) \, v`.

    The axes are flattened to one; q, k, v come from the normalised input. The output map starts at zero, so a new layer
    is the identity.

    Args:
        channels: c, a multiple of ``head_channels``.
        head_channels: d, channels of one head.
    Raises:
        ConfigError: channels and heads do not fit.
    Source:
        Dhariwal and Nichol 2021 (ADM), section 3: 64 channels a head.
    """

    def __init__(self, channels: int, head_channels: int = 64) -> None:
        super().__init__()
        head_channels = min(head_channels, channels)
        if channels % head_channels:
            raise ConfigError(f"attention: {channels} channels are no multiple of head_channels={head_channels}")
        self.heads = channels // head_channels
        self.norm = GroupNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each item.

        Args:
            x: (b, c, *axes), zero on padding.
            mask: (b, 1, *axes) broadcastable, 1 where valid; padding is neither looked at nor written to.
        """
        tokens = self.norm(x, mask).flatten(2).transpose(1, 2)
        q, k, v = rearrange(self.qkv(tokens), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        keys = None if mask is None else mask.expand(-1, 1, *x.shape[2:]).flatten(2).bool().unsqueeze(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        y = self.out(rearrange(y, "b heads n d -> b n (heads d)")).transpose(1, 2).reshape(x.shape)
        return x + y if mask is None else x + y * mask
