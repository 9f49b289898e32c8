"""An adapter's packaging, data, codec and sizes."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from polydiff.core.adapter import Lazy, conditions_of
from polydiff.core.build import construct, find_network
from polydiff.core.contract.case import Case, difference, home
from polydiff.core.errors import ConfigError, DataError
from polydiff.core.tree import leaves, tree_map

LARGEST_LOSS = 0.1  # of sigma_data, that a codec may declare as its tolerance


def test_importing_is_lazy(case: Case) -> None:
    """Importing the adapter's module loads none of its parts and no library."""
    own = case.module.partition(".")[0] if case.point else "polydiff.modalities"
    parents = [case.module.rsplit(".", n)[0] for n in range(case.module.count(".") + 1)]
    known = {*sys.stdlib_module_names, "polydiff", own}
    libraries = {name.partition(".")[0] for name in case.fresh["imported"]} - known
    parts = [name for name in case.fresh["imported"] if name.startswith(f"{own}.") and name not in parents]
    found = [*parts, *sorted(name for name in libraries if not name.startswith("_"))]
    assert not found, (
        f"importing {case.module} also imports {', '.join(found[:5])}: give parts as lazy('module:attribute') and import "
        "libraries in the modules of the parts, so that listing adapters stays quick and a missing library harms nobody else"
    )


def test_every_part_can_be_imported(case: Case) -> None:
    """Each ``lazy("module:attribute")`` leads to something that can be called."""
    for field, value in vars(case.adapter).items():
        for given in value.values() if isinstance(value, dict) else [value]:
            part = getattr(given, "func", given)  # what a functools.partial calls
            if isinstance(part, Lazy):
                try:
                    target = part.load()
                except (ImportError, AttributeError) as error:
                    pytest.fail(f"ADAPTER.{field} = lazy({part.target!r}) leads nowhere: {error}")
                assert callable(target), (
                    f"ADAPTER.{field} = lazy({part.target!r}) is a {type(target).__name__}, not callable"
                )


def test_readme_and_configuration(case: Case) -> None:
    """There is a text that says what the modality is, and at least one experiment, all of which build."""
    text = (home(case) / "README.md").is_file()
    if case.point is not None and case.point.dist is not None:
        text = text or bool(case.point.dist.metadata.json.get("description"))
    assert text, (
        f"put a README.md beside {case.module}, or name one as readme in pyproject.toml: state, files, conditions"
    )
    for config in case.experiments:
        where = f"experiment {config['experiment']!r}"
        try:
            find_network(case.adapter, config["network"], local=True)
            construct("process", case.adapter.process, (), config["process"])
        except ConfigError as error:
            pytest.fail(f"{where} does not fit its adapter: {error}")
        for term in config["objective"]["terms"]:
            assert term in case.adapter.terms, f"{where}: objective.terms.{term} is not in ADAPTER.terms"


def test_items_are_well_formed(case: Case) -> None:
    """Items are what ``shape`` announces, float32, finite, at the scale stated in the facts, with declared conditions."""
    facts, values = case.facts, torch.cat([leaf.flatten() for item in case.items for leaf in leaves(item.x)])
    assert facts == case.train.facts, (
        "facts must hold plain text, numbers, lists and dictionaries: they are stored as JSON"
    )
    for name in ("name", "n", "sigma_data", "size", "classes"):
        assert name in facts, f"the data set's facts lack {name!r}"
    like, _ = case.adapter.shape(facts["size"], {})
    declared = conditions_of(case.adapter.conditions, facts)
    assert values.dtype == torch.float32, f"items must be float32, these are {values.dtype}"
    assert bool(values.isfinite().all()), "an item has values that are not finite"
    for item in case.items:
        assert [leaf.ndim for leaf in leaves(item.x)] == [leaf.ndim for leaf in leaves(like)], (
            f"shape(facts['size'], cond) gives {[*like.shape]}, items have {[*leaves(item.x)[0].shape]}: other axes"
        )
        assert set(item.cond) <= set(declared), (
            f"an item has conditions {sorted(item.cond)}, but ADAPTER.conditions and the facts declare {sorted(declared)}"
        )
        for name, value in item.cond.items():
            condition = declared[name]
            shape = condition.shape_in(leaves(item.x)[0].shape)
            assert tuple(value.shape) == shape, f"cond[{name!r}] has shape {tuple(value.shape)}, not {shape}"
            assert value.dtype == condition.dtype, f"cond[{name!r}] is {value.dtype}, it must be {condition.dtype}"
            if condition.kind == "class":
                assert 0 <= int(value) < len(facts["classes"][name]), (
                    f"cond[{name!r}] = {int(value)} has no name in the facts"
                )
    batch = case.batch()
    assert len(leaves(batch.x)[0]) == len(case.items), "collate must put a leading batch axis before the items' own"
    assert len({str(item.id) for item in case.items}) == len(case.items), "every item needs an id of its own"
    if torch.is_tensor(case.items[0].x):
        some = torch.cat([case.train[i].x.flatten() for i in range(0, len(case.train), len(case.train) // 64 + 1)])
        ratio = float(some.std()) / facts["sigma_data"]
        assert 0.5 < ratio < 2, (
            f"the items' standard deviation is {ratio:.2f} x sigma_data of the facts: store the one measured on encoded items "
            "(polydiff data does), or the network's inputs have the wrong size"
        )


def test_codec_round_trip(case: Case) -> None:
    """Decoding and encoding real items changes no element of the state by more than the codec's tolerance."""
    tolerance = case.codec.tolerance
    assert 0 <= tolerance <= LARGEST_LOSS * case.facts["sigma_data"], (
        f"codec.tolerance = {tolerance} must lie between 0 and {LARGEST_LOSS} sigma_data: it is the largest change of a "
        "normalised element when a state is decoded and encoded again"
    )
    for item in case.items:
        again = case.codec.encode(case.codec.decode(item.x))
        error = difference(again, item.x)
        assert error <= tolerance, (
            f"item {item.id!r}: encode(decode(x)) differs from x by {error:.3g}, codec.tolerance states {tolerance}; "
            "keep the lost digits, or state what is lost"
        )


def test_files_reopen(case: Case) -> None:
    """Each format's files can be read by a new process; those of the default format hold the items within the tolerance."""
    assert case.codec.formats, "codec.formats is empty: name at least one format that codec.write writes"
    for kind, paths in case.written.items():
        assert [path.stem for path in paths] == [f"sample-{i:05d}" for i in range(3)], (
            f"codec.write(items, folder, {kind!r}) must return one path an item, sample-00000.<extension> and so on"
        )
        assert all(path.is_file() and path.stat().st_size for path in paths), (
            f"codec.write left no or empty {kind} files"
        )
        assert kind not in case.fresh["errors"], (
            f"codec.read cannot read in a new process what codec.write wrote as {kind}: {case.fresh['errors'][kind]}"
        )
    for kind in case.codec.formats:
        for i, item in enumerate(case.items[:3]):
            names = list(item.x) if isinstance(item.x, dict) else [""]
            read = [case.fresh["states"][f"{kind}/{i}/{name}"] for name in names]
            shapes = [leaf.shape for leaf in read], [leaf.shape for leaf in leaves(item.x)]
            assert shapes[0] == shapes[1], f"a {kind} file of an item of shape {shapes[1]} reads back as {shapes[0]}"
            error = max(float((a - b).abs().max()) for a, b in zip(read, leaves(item.x), strict=True))
            allowed = case.codec.tolerance + 1e-6 if kind == case.codec.formats[0] else float("inf")
            assert error <= allowed, (
                f"a {kind} file gives an item back with an error of {error:.3g}, codec.tolerance states "
                f"{case.codec.tolerance}: the first of codec.formats must keep what the codec keeps"
            )


@pytest.mark.parametrize(
    "content", [None, b"", b"\x00\xff neither text nor anything else \n"], ids=["missing", "empty", "noise"]
)
def test_codec_refuses_other_files(case: Case, content: bytes | None) -> None:
    """A missing, empty or foreign file is a DataError that names it."""
    for kind, paths in case.written.items():
        path = case.folder / f"strange{paths[0].suffix}"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        try:
            raw = case.codec.read(path)
        except DataError as error:
            assert path.name in str(error), f"the DataError of codec.read must name the file: {error}"
        except Exception as error:  # noqa: BLE001  whatever a library raises
            pytest.fail(
                f"codec.read raises {type(error).__name__} on such a {kind} file: turn it into a DataError that names the file"
            )
        else:
            pytest.fail(
                f"codec.read takes such a {kind} file for {type(raw).__name__}: check what was read, raise DataError"
            )


def test_shape_refuses_impossible_sizes(case: Case) -> None:
    """Zero, negative and non-numeric sizes and unknown keys are ConfigErrors."""
    size = case.facts["size"]
    wrong = [{**size, "no_such_size": 4}]
    wrong += [{**size, name: value} for name in size for value in (0, -1, 2.5, "many")]
    for asked in wrong:
        try:
            case.adapter.shape(asked, {})
        except ConfigError:
            continue
        except Exception as error:  # noqa: BLE001  whatever it is, a user should have seen a ConfigError
            pytest.fail(
                f"shape({asked}, cond) raises {type(error).__name__}: raise ConfigError saying which values are possible"
            )
        pytest.fail(f"shape({asked}, cond) must raise ConfigError, saying which values are possible")
    like, mask = case.adapter.shape(size, {})
    zeros = tree_map(torch.zeros_like, like)
    assert difference(like, zeros) == 0, "shape gives a state that stands for an empty item: zeros"
    assert mask is None or mask.dtype == torch.bool, "the mask that shape returns must be bool, or None"
    assert json.dumps(size), "facts['size'] must be plain numbers"
