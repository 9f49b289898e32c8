"""An adapter whose network has a parameter too many, mixes the items of a batch and lacks the symmetries it claims."""

from dataclasses import replace

import torch
from torch import nn

from polydiff.modalities.toy2d import ADAPTER as TOY2D
from polydiff.modalities.toy2d.network import mlp


class Clumsy(nn.Module):
    def __init__(self, facts, **options):
        super().__init__()
        self.inner = mlp(facts, **options)
        self.norm = nn.BatchNorm1d(2)
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, x_t, c_noise, mask, cond, present):
        return self.norm(self.inner(x_t, c_noise, mask, cond, present) + x_t)


ADAPTER = replace(TOY2D, name="clumsy", network={"mlp": Clumsy}, symmetries=("rotation", "mirror"))
