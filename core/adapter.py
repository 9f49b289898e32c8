"""The protocol a modality fulfils, the records it exchanges with the core, and the lookup by name.

An adapter is one folder ``modalities/<name>/`` (or an entry point in the group ``polydiff.modalities``) whose
``__init__.py`` holds one ``ADAPTER``. Every part of it is lazy: nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from polydiff.core.errors import ConfigError, unknown
from polydiff.core.tree import State, tree_map

if TYPE_CHECKING:
    from polydiff.core.tasks import Task

GROUP = "polydiff.modalities"


@dataclass(frozen=True)
class Lazy:
    """A part of an adapter named as ``module:attribute``; imported at the first call."""

    target: str

    def load(self) -> Any:
        """Import the module and return the attribute."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Load the part and call it."""
        return self.load()(*args, **kwargs)


lazy = Lazy


@dataclass(frozen=True)
class Item:
    """One sample, or a collated batch of them (then ``x`` has a leading axis and ``id`` is a list).

    Args:
        x: the normalised state, float32; a tensor (*dims) or a dictionary of them.
        mask: which elements are valid, bool (n,), or None when all are.
        cond: conditions by name; a class index is a 0-dim int64 tensor.
        id: what the data set calls it.
        meta: anything a view or codec may want; the loop ignores it. ``trajectory``: (k, *dims), states while sampling.
    """

    x: State
    mask: Tensor | None = None
    cond: dict[str, Tensor] = field(default_factory=dict)
    id: Any = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Condition:
    """A condition the network understands.

    =============  ==================================================================================================
    ``"class"``    an int64 index, whose names are in the data set's facts
    ``"tensor"``   float32 numbers of ``shape``
    ``"field"``    float32 (channels, *axes) with the axes of the state, to which a network joins it as further channels
    ``"setting"``  float32 numbers about how an item was made (its augmentation, its recording), zero where nobody says:
                   never absent, never dropped, never guided away
    =============  ==================================================================================================

    Args:
        kind: one of these.
        shape: of one item's value; () for a class. None: the data set decides, and has the condition only if its facts
            describe it, ``facts["conditions"][name] = {"kind": ..., "shape": [...]}`` with null for the axes of the state.
        read: ``(path, facts, size) -> value``: what a file of the user's means; raises DataError or ConfigError.
    """

    kind: str = "class"
    shape: tuple[int | None, ...] | None = ()
    read: Callable[[Path, Mapping[str, Any], Mapping[str, Any]], Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """int64 for a class, float32 otherwise."""
        return torch.int64 if self.kind == "class" else torch.float32

    def shape_in(self, state: Sequence[int]) -> tuple[int, ...]:
        """Shape of the value for an item whose state has this shape: axes that the state decides are filled in."""
        return tuple(state[axis] if size is None else size for axis, size in enumerate(self.shape or ()))


def conditions_of(declared: Mapping[str, Condition], facts: Mapping[str, Any]) -> dict[str, Condition]:
    """Those of the declared conditions that a data set has, with their shapes.

    Args:
        declared: an adapter's.
        facts: of the data set: ``classes``, and ``conditions`` for those whose shape it decides.

    Raises:
        ConfigError: the facts describe another kind of condition, or a shape that is none.
    """
    found, described = {}, facts.get("conditions") or {}
    for name, condition in declared.items():
        if condition.kind == "class":
            if name in (facts.get("classes") or {}):
                found[name] = condition
        elif condition.shape is not None:
            found[name] = condition
        elif name in described:
            kind, shape = described[name].get("kind"), described[name].get("shape")
            valid = isinstance(shape, list) and all(n is None or (type(n) is int and n > 0) for n in shape)
            if kind != condition.kind or not valid:
                raise ConfigError(
                    f"condition {name!r}: the data describe {kind} of {shape}, declared is {condition.kind}"
                )
            found[name] = replace(condition, shape=tuple(shape))
    return found


class Metric(NamedTuple):
    """A measured number with its bootstrap interval, the value real held-out data has, and the sample count."""

    value: float
    low: float | None = None
    high: float | None = None
    real: float | None = None
    n: int = 0


class Fragment(NamedTuple):
    """A piece of the report: HTML without outside addresses, scripts by name (each inlined once), a PNG still."""

    html: str
    scripts: Mapping[str, str] = {}
    png: bytes | None = None


class Finding(NamedTuple):
    """One line of ``polydiff doctor``: level is ``ok``, ``warn`` or ``fail``."""

    level: str
    text: str
    remedy: str = ""


def collate(items: Sequence[Item], *, mask_axis: int = 1) -> Item:
    """Stack items into a batch; ragged ones are padded with zeros along the mask axis and get a mask.

    Args:
        items: at least one; either all have equal shapes or they differ only along the mask axis.
        mask_axis: axis of the batch along which lengths differ (1, or -1 for the last).
    """
    xs = [item.x for item in items]
    shapes = {tuple(tree_map(lambda x: tuple(x.shape), x).items()) if isinstance(x, dict) else x.shape for x in xs}
    masks = [item.mask for item in items]
    if len(shapes) > 1 or any(mask is not None for mask in masks):
        axis = mask_axis - 1 if mask_axis > 0 else mask_axis
        lengths = [next(iter(x.values())).shape[axis] if isinstance(x, dict) else x.shape[axis] for x in xs]
        longest = max(lengths)
        xs = [tree_map(partial(_pad, axis=axis, length=longest), x) for x in xs]
        masks = [
            _pad(torch.ones(n, dtype=torch.bool) if mask is None else mask, axis=0, length=longest)
            for mask, n in zip(masks, lengths, strict=True)
        ]
    x = tree_map(lambda *leaf: torch.stack(leaf), *xs)
    cond = {name: _stack([torch.as_tensor(item.cond[name]) for item in items]) for name in items[0].cond}
    mask = None if masks[0] is None else torch.stack([m for m in masks if m is not None])
    return Item(x, mask, cond, [item.id for item in items])


def _stack(values: Sequence[Tensor]) -> Tensor:
    """Stack the values of a condition; those that are as long as their items are padded with zeros like them."""
    for axis in range(values[0].ndim):
        longest = max(value.shape[axis] for value in values)
        values = [_pad(value, axis, longest) for value in values]
    return torch.stack(list(values))


def _pad(x: Tensor, axis: int, length: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = length - x.shape[axis]
    return torch.cat([x, x.new_zeros(shape)], dim=axis) if shape[axis] else x


def _nothing(*_: Any, **__: Any) -> list[Finding]:
    return []


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A modality: its data, representation, network, metrics and pictures.

    Args:
        name: the folder's name.
        process: ``(**config.process) -> Process``; usually ``polydiff.core.processes:gaussian``.
        conditions: the conditions by name that a data set of this modality may have; see :func:`conditions_of`.
        shape: ``(size, cond) -> (like, mask)`` for one item, without batch axis; ``size`` is ``facts["size"]`` merged
            with what the user asked for; an impossible size raises ConfigError.
        dataset: ``(path, split, **config.data.options) -> Dataset`` of Items, with ``len``, ``[i]`` and ``.facts``.
        collate: ``items -> Item`` with a leading batch axis.
        codec: ``(facts) -> codec`` with encode, decode, tolerance, read, write and ``formats``.
        network: constructors by name, each ``(facts, **options) -> nn.Module``.
        terms: further loss terms by name, ``(prediction, x0, t, mask, cond) -> (b,)``.
        tasks: by name, ``(input, options, run, noise, k) -> Task``; see ``polydiff.core.tasks``.
        metrics: ``(samples, reference, options) -> {name: Metric}``.
        view: ``(samples, reference) -> Fragment``.
        checks: ``(data, run) -> list[Finding]`` for ``polydiff doctor``.
        symmetries: names of the group actions the network commutes with; the contract suite tests each.
        default_data: name of an embedded data set for tests and the first run.
    """

    name: str
    process: Callable[..., Any]
    shape: Callable[..., Any]
    dataset: Callable[..., Any]
    codec: Callable[..., Any]
    network: Mapping[str, Callable[..., Any]]
    metrics: Callable[..., dict[str, Metric]]
    view: Callable[..., Fragment]
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    collate: Callable[[Sequence[Item]], Item] = collate
    terms: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    tasks: Mapping[str, Callable[..., Task]] = field(default_factory=dict)
    checks: Callable[..., list[Finding]] = _nothing
    symmetries: tuple[str, ...] = ()
    default_data: str = ""


def names() -> list[str]:
    """Names of all adapters: folders of ``polydiff.modalities`` and installed entry points."""
    import polydiff.modalities

    own = [module.name for module in pkgutil.iter_modules(polydiff.modalities.__path__) if module.ispkg]
    return sorted({*own, *(point.name for point in entry_points(group=GROUP))})


def load(name: str) -> Adapter:
    """The adapter of that name: a folder of ``polydiff.modalities`` first, then an entry point.

    Raises:
        ConfigError: no such adapter; the message names the nearest ones. Or its entry point cannot be imported.
    """
    import polydiff.modalities

    if any(m.ispkg and m.name == name for m in pkgutil.iter_modules(polydiff.modalities.__path__)):
        return importlib.import_module(f"polydiff.modalities.{name}").ADAPTER
    for point in entry_points(group=GROUP):
        if point.name == name:
            try:
                adapter = point.load()
            except Exception as error:
                raise ConfigError(f"adapter {name!r} ({point.value}) cannot be imported: {error}") from error
            if not isinstance(adapter, Adapter):
                raise ConfigError(f"adapter {name!r}: entry point {point.value} is not a polydiff Adapter")
            return adapter
    raise unknown("adapter", name, names())
