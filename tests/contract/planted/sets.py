"""Curves as sets of points, with a network that honours masks and order; and the same one with two faults."""

from dataclasses import replace

import torch
from polydiff_curves import ADAPTER as CURVES  # type: ignore[import-not-found]  # installed by the tests
from torch import nn


class Sets(nn.Module):
    """Each point with the mean over its set; leaky: the mean includes padding."""

    def __init__(self, facts, leaky=False, ordered=False, **options):
        super().__init__()
        self.leaky, self.ordered = leaky, ordered
        self.first, self.last = nn.Linear(3, 32), nn.Linear(32, 1)

    def forward(self, x_t, c_noise, mask, cond, present):
        x = x_t[:, 0]
        valid = torch.ones_like(x) if mask is None or self.leaky else mask.to(x.dtype)
        if self.ordered:
            valid = valid * torch.linspace(0, 1, x.shape[1])
        mean = (x * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
        features = [x, mean.expand_as(x), c_noise[:, None].expand_as(x)]
        return self.last(torch.tanh(self.first(torch.stack(features, -1))))[..., 0][:, None]


def leaky(facts, **options):
    return Sets(facts, leaky=True)


def ordered(facts, **options):
    return Sets(facts, ordered=True)


ADAPTER = replace(
    CURVES,
    name="sets",
    network={"sets": Sets, "leaky": leaky, "ordered": ordered},
    symmetries=("permutation", "reversal", "translation"),
)
