"""A residual perceptron for vectors, told noise level and conditions in the same way as the U-Net."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polydiff.core.errors import ConfigError
from polydiff.core.nn.embeddings import ConditionSpec, Embedding


class _Block(nn.Module):
    """x + W2 silu(W1 norm(x) modulated); starts as the identity."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.inner = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = torch.addcmul(shift, self.norm(x), 1 + scale)
        return x + self.outer(self.dropout(F.silu(self.inner(h))))


class MLP(nn.Module):
    """A network on vectors: linear map in, residual blocks with adaptive layer norm, zero-initialised linear map out.

    Args:
        in_features: d of the input vectors (b, d).
        out_features: of the output; default the same.
        width: width of the blocks.
        blocks: number of them.
        dropout: probability of dropping an activation inside a block.
        embedding: width of the vector of noise level and conditions; default ``width``.
        conditions: by name, a number of classes or ``("tensor", size)``; see :class:`Embedding`.
    Raises:
        ConfigError: no width or no block.
    Source:
        Perez et al. 2018 (FiLM) for the modulation; Peebles and Xie 2023, section 3.2 for its place after the norm.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        width: int = 128,
        blocks: int = 4,
        dropout: float = 0.0,
        embedding: int | None = None,
        conditions: Mapping[str, ConditionSpec] | None = None,
    ) -> None:
        super().__init__()
        if width < 1 or blocks < 1:
            raise ConfigError(f"MLP: width={width} and blocks={blocks} must be at least 1")
        self.embedding = Embedding(embedding or width, conditions)
        self.first = nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(blocks))
        self.modulation = nn.Linear(self.embedding.width, 2 * width * blocks)
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, out_features or in_features)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self,
        x_t: Tensor,
        c_noise: Tensor,
        mask: Tensor | None = None,
        cond: Mapping[str, Tensor] | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Map vectors (b, d) to (b, out_features).

        Args:
            x_t: (b, d).
            c_noise: (b,).
            mask: (b, d), True where valid: the input is zeroed elsewhere, and the output where its width is d too.
            cond: values by name.
            present: by name, bool (b,).
        """
        if mask is not None:
            x_t = x_t * mask
        modulations = self.modulation(self.embedding(c_noise, cond, present)).chunk(2 * len(self.blocks), dim=1)
        x = self.first(x_t)
        for block, scale, shift in zip(self.blocks, modulations[::2], modulations[1::2], strict=True):
            x = block(x, scale, shift)
        x = self.last(F.silu(self.norm(x)))
        return x if mask is None or x.shape != mask.shape else x * mask
