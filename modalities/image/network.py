"""The networks of the core with two axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from polydiff.core.nn.dit import DiT
from polydiff.core.nn.embeddings import condition_specs
from polydiff.core.nn.unet import UNet


def unet(facts: Mapping[str, Any], *, variance: bool = False, **options: Any) -> nn.Module:
    """A U-Net for the images of a data set, told whatever conditions it has.

    Args:
        facts: of the data set: ``size.channels``, ``classes`` and ``conditions``.
        variance: add a second head, for the reverse variance.
        options: of ``polydiff.core.nn.unet.UNet``.
    """
    return UNet(2, *_channels(facts, variance), conditions=condition_specs(facts), **options)


def dit(facts: Mapping[str, Any], *, variance: bool = False, **options: Any) -> nn.Module:
    """A diffusion transformer for the images of a data set, conditional as the U-Net is.

    Args:
        facts: of the data set: ``size.channels``, ``classes`` and ``conditions``.
        variance: add a second head, for the reverse variance.
        options: of ``polydiff.core.nn.dit.DiT``.
    """
    return DiT(2, *_channels(facts, variance), conditions=condition_specs(facts), **options)


def _channels(facts: Mapping[str, Any], variance: bool) -> tuple[int, int]:
    """Channels of a network's input and output."""
    channels = facts["size"]["channels"]
    return channels, 2 * channels if variance else channels
