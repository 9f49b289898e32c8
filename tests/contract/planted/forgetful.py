"""An adapter whose network keeps what it computes with to itself and does not listen."""

from dataclasses import replace

import torch
from torch import nn

from polydiff.modalities.toy2d import ADAPTER as TOY2D


class Forgetful(nn.Module):
    def __init__(self, facts, width=32, **options):
        super().__init__()
        self.directions = torch.randn(2, width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x_t, c_noise, mask, cond, present):
        return self.layers(x_t @ self.directions)


ADAPTER = replace(TOY2D, name="forgetful", network={"mlp": Forgetful})
