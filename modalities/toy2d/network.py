"""The residual perceptron of the core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from polydiff.core.nn.embeddings import condition_specs
from polydiff.core.nn.mlp import MLP


def mlp(facts: Mapping[str, Any], *, variance: bool = False, **options: Any) -> nn.Module:
    """A perceptron on points, told whatever conditions the data have.

    Args:
        facts: of the data set: ``classes`` and ``conditions``.
        variance: add a second head, for the reverse variance.
        options: of ``MLP``.
    """
    return MLP(2, 4 if variance else 2, conditions=condition_specs(facts), **options)
