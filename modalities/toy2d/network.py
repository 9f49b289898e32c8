"""The residual perceptron of the core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from polydiff.core.nn.mlp import MLP


def mlp(facts: Mapping[str, Any], **options: Any) -> nn.Module:
    """A perceptron on points, conditional on the class where the data have classes; options: of ``MLP``."""
    return MLP(2, conditions={name: len(classes) for name, classes in facts["classes"].items()}, **options)
