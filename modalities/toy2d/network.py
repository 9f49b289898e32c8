"""The residual perceptron of the core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from polydiff.core.nn.mlp import MLP


def mlp(facts: Mapping[str, Any], *, variance: bool = False, **options: Any) -> nn.Module:
    """A perceptron on points, conditional on the class where the data have classes.

    Args:
        facts: of the data set: ``classes``.
        variance: add a second head, for the reverse variance.
        options: of ``MLP``.
    """
    conditions = {name: len(classes) for name, classes in facts["classes"].items()}
    return MLP(2, 4 if variance else 2, conditions=conditions, **options)
