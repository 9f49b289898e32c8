"""What a network is told besides its input: the noise level and the conditions, as one vector an item."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polydiff.core.errors import ConfigError, unknown

ConditionSpec = int | tuple[str, int]  # a number of classes, or a kind and a size


class FourierFeatures(nn.Module):
    r"""Cosines and sines of a number at fixed frequencies.

    .. math:: \gamma(c) = \sqrt2 \, [\cos 2\pi f_j c, \sin 2\pi f_j c], \quad f_j = s \, \Phi^{-1}(1/2 + (j + 1/2) / 2m)

    The frequencies are the quantiles of a half-normal distribution: what random Fourier features draw, without the draw.

    Args:
        features: width 2m of the result, even.
        bandwidth: s, cycles per unit of the input. 1 resolves c_noise = ln(sigma/alpha)/4 to a few percent of its range.
    Source:
        Tancik et al. 2020, eq. 4 and section 6.1; Karras et al. 2024 (EDM2), appendix B.3 for the factor sqrt 2.
    """

    frequencies: Tensor

    def __init__(self, features: int, bandwidth: float = 1.0) -> None:
        super().__init__()
        if features < 2 or features % 2:
            raise ConfigError(f"Fourier features come in pairs: {features} is not an even number >= 2")
        count = features // 2
        quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        frequencies = 2 * math.pi * bandwidth * math.sqrt(2) * torch.erfinv(quantiles)
        self.register_buffer("frequencies", frequencies.float())

    def forward(self, c: Tensor) -> Tensor:
        """Map (b,) to (b, features)."""
        angle = c[:, None] * self.frequencies
        return math.sqrt(2) * torch.cat([angle.cos(), angle.sin()], dim=1)


def condition_specs(facts: Mapping[str, Any]) -> dict[str, ConditionSpec]:
    """What a network is told by the conditions of a data set: their ``conditions`` argument.

    Args:
        facts: of the data set: ``classes``, names by condition, and ``conditions``, kind and shape by condition; see
            ``polydiff.core.adapter.Condition``.
    """
    specs: dict[str, ConditionSpec] = {name: len(classes) for name, classes in facts["classes"].items()}
    for name, described in (facts.get("conditions") or {}).items():
        kind, shape = described["kind"], described["shape"]
        specs[name] = kind, shape[0] if kind == "field" else math.prod(shape)
    return specs


def parse_condition(spec: object, name: str) -> tuple[str, int]:
    """Read the declaration of a condition: ``("class", number)``, ``("tensor" | "setting", size)`` or ``("field", channels)``.

    A bare number means a class. Raises ConfigError for anything else.
    """
    match spec:
        case bool():
            pass
        case int(size) if size >= 1:
            return "class", size
        case [("class" | "tensor" | "field" | "setting") as kind, int(size)] if size >= 1:
            return kind, size
    raise ConfigError(
        f"condition {name!r}: {spec!r} is none of a number of classes, ('tensor', size), ('setting', size) and ('field', channels)"
    )


class ConditionEmbedding(nn.Module):
    """One condition as a vector, with a learned vector for its absence.

    A setting is never absent, and zero adds nothing: it has neither that vector nor a bias.

    Args:
        kind: ``"class"``, ``"tensor"`` or ``"setting"``.
        size: number of classes, or of numbers in the value (its axes are flattened).
        width: width of the vector.
    """

    def __init__(self, kind: str, size: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "setting":
            self.embed: nn.Module = nn.Linear(size, width, bias=False)
            return
        self.null = nn.Parameter(torch.zeros(width))
        perceptron = (nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))
        self.embed = nn.Embedding(size, width) if kind == "class" else nn.Sequential(*perceptron)

    def forward(self, value: Tensor, present: Tensor) -> Tensor:
        """Embed ``value``, (b,) int64 for a class, else (b, ...) float; where ``present`` (b,) is False it is not read."""
        if isinstance(self.embed, nn.Linear):
            return self.embed(value.flatten(1).to(self.embed.weight.dtype))
        # Cleared before it is embedded, not after: a NaN in an absent value would reach the weights' gradient.
        if self.kind == "class":
            value = torch.where(present, value, 0)
        else:
            value = torch.where(present[:, None], value.flatten(1), 0).to(self.null.dtype)
        return torch.where(present[:, None], self.embed(value), self.null)


class FieldEmbedding(nn.Module):
    """A condition that is itself a field, as further input channels; a learned constant in each where it is absent.

    Args:
        channels: channels of the field.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.zeros(channels))

    def forward(self, like: Tensor, value: Tensor | None, present: Tensor | None) -> Tensor:
        """The channels (b, channels, *axes) to join to ``like`` (b, c, *axes); None for ``present``: all of them are."""
        ones = (1,) * (like.ndim - 2)
        null = self.null.to(like.dtype).view(1, -1, *ones).expand(len(like), -1, *like.shape[2:])
        if value is None:
            return null
        if present is None:
            return value
        return torch.where(present.view(-1, 1, *ones), value, null)


class FieldEmbeddings(nn.ModuleDict):
    """The conditions of a network that are fields, by name.

    Args:
        conditions: of the network; those that are no fields are left aside.
    Attributes:
        channels: of all fields together.
    """

    def __init__(self, conditions: Mapping[str, ConditionSpec]) -> None:
        specs = {name: parse_condition(spec, name) for name, spec in conditions.items()}
        fields = {name: size for name, (kind, size) in specs.items() if kind == "field"}
        super().__init__({name: FieldEmbedding(size) for name, size in fields.items()})
        self.channels = sum(fields.values())

    def forward(
        self, x: Tensor, cond: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Join the fields to x (b, c, *axes); returns (b, c + channels, *axes) and the conditions that are no fields."""
        parts = [field(x, cond.get(name), present.get(name)) for name, field in self.items()]
        rest = {name: value for name, value in cond.items() if name not in self}
        return torch.cat([x, *parts], dim=1) if parts else x, rest


class Embedding(nn.Module):
    r"""Noise level and conditions as one vector: a two-layer perceptron on the sum of their embeddings.

    .. math:: e = \mathrm{silu}(W_2 \, \mathrm{silu}(W_1 \gamma(c_{noise}) + \sum_k E_k(y_k)))

    Args:
        width: width of the vector.
        conditions: by name, a number of classes, ``("tensor", size)`` or ``("setting", size)``.
        features: number of Fourier features of the noise level.
    Source:
        Karras et al. 2022 (EDM), DDPM++ column of table 7: conditions are added before the perceptron.
    """

    def __init__(self, width: int, conditions: Mapping[str, ConditionSpec] | None = None, features: int = 64) -> None:
        super().__init__()
        self.width = width
        self.noise = nn.Sequential(FourierFeatures(features), nn.Linear(features, width))
        specs = {name: parse_condition(spec, name) for name, spec in (conditions or {}).items()}
        if fields := [name for name, (kind, _) in specs.items() if kind == "field"]:
            raise ConfigError(f"condition {fields[0]!r}: this network cannot take a field as condition")
        self.conditions = nn.ModuleDict({name: ConditionEmbedding(*spec, width) for name, spec in specs.items()})
        self.mix = nn.Linear(width, width)

    def forward(
        self, c_noise: Tensor, cond: Mapping[str, Tensor] | None = None, present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Embed a batch.

        Args:
            c_noise: (b,), dimensionless.
            cond: values by name; a declared condition that is missing counts as absent.
            present: by name, bool (b,); a condition that is missing here is present for the whole batch.
        Returns:
            (b, width).
        Raises:
            ConfigError: a condition that was not declared.
        """
        cond, present = cond or {}, present or {}
        for name in cond:
            if name not in self.conditions:
                raise unknown("condition", name, self.conditions)
        vector = self.noise(c_noise.to(self.mix.weight.dtype))
        for name, embed in self.conditions.items():
            if name in cond:
                everywhere = torch.ones_like(c_noise, dtype=torch.bool)
                vector = vector + embed(cond[name], present.get(name, everywhere))
            elif embed.kind != "setting":
                vector = vector + embed.null
        return F.silu(self.mix(F.silu(vector)))
