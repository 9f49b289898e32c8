"""Data sets: a catalogue of public ones, recipes that turn each into the one file layout, and where the files are."""

from __future__ import annotations

import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np

from polydiff.core.adapter import Lazy
from polydiff.core.adapter import load as load_adapter
from polydiff.core.errors import ConfigError, DataError, unknown
from polydiff.core.tree import leaves
from polydiff.data import h5
from polydiff.data.fetch import fetch
from polydiff.data.table import Table

__all__ = ["Entry", "Table", "catalogue", "command", "folder", "locate", "prepare", "recipe_options", "skipped_list"]

GROUP = "polydiff.data"
PIECE_BYTES = 2**22  # of raw items that are encoded at once; in float64 they take eight times as much


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One data set of the catalogue: a line of ``catalog.yaml``, or what an entry point of an installed package names.

    Args:
        modality: the adapter that reads it.
        recipe: ``module:function``, called as ``(name, source, **options) -> Table`` with the path the user gave or the
            folder that ``urls`` were downloaded to, None for an embedded set; its keyword arguments are its options.
        about: one line for ``polydiff list``.
        embedded: it comes with the installation and is prepared at first use, without a download.
        urls: where its files are; none for a set whose files only the user has.
        digests: ``md5:...`` or ``sha256:...`` of each of these files.
        sha256: digest of the source that the recipe reports; a differing one is an error.
        licence: terms of the source.
        citation: whom to cite.
    """

    modality: str
    recipe: str
    about: str
    embedded: bool = False
    urls: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    sha256: str = ""
    licence: str = ""
    citation: str = ""


@cache
def catalogue() -> dict[str, Entry]:
    """The known data sets by name: our own, then those of installed packages."""
    import yaml

    lines = yaml.safe_load(Path(__file__).with_name("catalog.yaml").read_text(encoding="utf-8"))
    own = {name: Entry(**{key: _frozen(value) for key, value in line.items()}) for name, line in lines.items()}
    return {**own, **{name: entry for name, entry in _installed().items() if name not in own}}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _installed() -> dict[str, Entry]:
    """Data sets that installed packages declare in the entry-point group ``polydiff.data``; a broken one is left out."""
    found = {}
    for point in entry_points(group=GROUP):
        try:
            entry = point.load()
            if not isinstance(entry, Entry):
                raise TypeError(f"it is a {type(entry).__name__}, not a polydiff.data.Entry")
        except Exception as error:  # noqa: BLE001  a broken package must not take all data sets along
            print(f"polydiff: the data set {point.name!r} ({point.value}) cannot be used: {error}", file=sys.stderr)
            continue
        found[point.name] = entry
    return found


def folder() -> Path:
    """Where prepared files are: POLYDIFF_DATA, else data/cache of a checkout, else the user's cache folder."""
    if chosen := os.environ.get("POLYDIFF_DATA"):
        return Path(chosen).expanduser()
    here = Path(__file__).resolve().parent
    if (here.parent / "pyproject.toml").is_file() and (here.parent / "core" / "__init__.py").is_file():
        return here / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polydiff"


_folder = folder  # under the name that the argument of ``prepare`` does not hide


def locate(name: str, prepare_embedded: bool = True) -> Path:
    """The prepared file of a data set.

    Args:
        name: a name of the catalogue, or of a file ``<name>.h5`` that somebody put into ``folder()``.
        prepare_embedded: make an embedded set now if its file is not there yet.
    Raises:
        ConfigError: there is no data set of that name.
        DataError: it has not been prepared; the message says how.
    """
    path = folder() / f"{name}.h5"
    if path.is_file():
        return path
    if name not in catalogue():
        prepared = [file.stem for file in sorted(folder().glob("*.h5"))]
        raise unknown("data set", name, dict.fromkeys([*catalogue(), *prepared]))
    if prepare_embedded and catalogue()[name].embedded:
        return prepare(name)
    raise DataError(f"data set {name!r} is not prepared ({path} is missing); run: {command(name)}")


def command(name: str) -> str:
    """The command that prepares a data set of the catalogue; only the user knows where files without an address are."""
    entry = catalogue()[name]
    return f"polydiff data {name}" + ("" if entry.embedded or entry.urls else " source=PATH")


def recipe_options(dataset: str) -> dict[str, Any]:
    """The options of a data set's recipe, with their defaults.

    Raises:
        ConfigError: unknown name.
    """
    if dataset not in catalogue():
        raise unknown("data set", dataset, catalogue())
    arguments = list(inspect.signature(Lazy(catalogue()[dataset].recipe).load()).parameters.values())
    return {argument.name: argument.default for argument in arguments[2:]}


def prepare(
    dataset: str,
    source: str | Path | None = None,
    encode: Callable[[Any], Any] | None = None,
    folder: str | Path | None = None,
    name: str | None = None,
    **options: Any,
) -> Path:
    """Make the file of a data set of the catalogue, atomically.

    What the recipe had to skip stands in ``<name>.skipped.txt`` beside the file, a line ``name: reason`` each.

    Args:
        dataset: a name of the catalogue.
        source: where the public files are, in their own layout; None for embedded sets, and to download the files.
        encode: the codec's ``encode``, by which sigma_data is measured; by default that of the set's adapter.
        folder: where to put ``<name>.h5``; by default ``folder()``.
        name: what to call it; by default ``dataset``. So several folders of pictures become several data sets.
        options: of the recipe, see ``recipe_options``.
    Returns:
        The file.
    Raises:
        ConfigError: unknown name or option, or a source for an embedded set.
        DataError: the source is missing or not what it should be, or the file cannot be written.
    """
    valid = recipe_options(dataset)
    for key in options:
        if key not in valid:
            raise unknown(f"option of data set {dataset!r}", key, valid)
    entry, name = catalogue()[dataset], name or dataset
    _check_name(name, dataset)
    target = Path(folder) if folder else _folder()
    if entry.embedded and source is not None:
        raise ConfigError(f"data set {dataset!r} is embedded: leave out source={source}")
    if not entry.embedded and source is None:
        if not entry.urls:
            raise ConfigError(f"data set {dataset!r} is made of files of yours: give their folder as source=PATH")
        source = fetch(dataset, entry.urls, target / "downloads" / dataset, entry.digests)
    table = Lazy(entry.recipe)(name, None if source is None else Path(source).expanduser(), **options)
    digest = table.attributes.get("sha256_of_source", "")
    if entry.sha256 and digest != entry.sha256:
        raise DataError(f"data set {name!r}: the source has digest {digest}, expected {entry.sha256}; get it again")
    if encode is None:
        encode = load_adapter(entry.modality).codec({}).encode
    common: dict[str, Any] = {
        "name": name,
        "modality": entry.modality,
        "licence": entry.licence,
        "source": " ".join(entry.urls),
        "complete": [len(table), len(table)],
    }
    # An encoding with several leaves (a product of geometries) has no single scale: its recipe states sigma_data itself.
    if "sigma_data" not in table.attributes:
        common["sigma_data"] = measure_sigma_data(table, encode)
    path = h5.write(target / f"{name}.h5", replace(table, attributes={**common, **table.attributes}))
    _list_skipped(path, table.skipped)
    return path


def skipped_list(path: Path) -> Path:
    """Where the list of what was skipped for a prepared file stands, if anything was."""
    return path.with_suffix(".skipped.txt")


def _list_skipped(path: Path, skipped: Sequence[tuple[str, str]]) -> None:
    target = skipped_list(path)
    try:
        if skipped:
            target.write_text("".join(f"{name}: {reason}\n" for name, reason in skipped), encoding="utf-8")
        else:
            target.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}; free space") from error


def _check_name(name: str, dataset: str) -> None:
    if not re.fullmatch(r"[\w-][\w.-]{0,99}", name):
        raise ConfigError(f"name={name}: use up to 100 letters, digits, '-', '_' and '.'")
    if name != dataset and name in catalogue():
        raise ConfigError(f"name={name}: this is another data set of the catalogue; choose a name of its own")


def measure_sigma_data(table: Table, encode: Callable[[Any], Any]) -> float:
    """Population standard deviation of all elements of the encoded training split, in float64.

    Args:
        table: the content; items of one size are encoded in batches, ragged ones one by one.
        encode: raw array (or, if there are several, a dictionary of them) -> State.
    Raises:
        DataError: there is no training split, or it is constant.
    """
    count, total, squares = 0, 0.0, 0.0
    for raw in _pieces(table, table.rows("train")):
        for leaf in leaves(encode(raw)):
            values = leaf.double()
            count, total = count + values.numel(), total + float(values.sum())
            squares += float(values.square().sum())
    variance = squares / count - (total / count) ** 2 if count else 0.0
    if variance <= 0:
        raise DataError("the training split is empty or constant: sigma_data cannot be measured")
    return math.sqrt(variance)


def _pieces(table: Table, rows: np.ndarray) -> Any:
    arrays = dict(table.arrays)
    if table.offsets is None:
        item_bytes = max(1, sum(array.nbytes for array in arrays.values()) // len(table))
        at_once = min(256, max(1, PIECE_BYTES // item_bytes))
        slices: Any = np.array_split(rows, max(1, len(rows) // at_once)) if len(rows) else []
    else:
        slices = [slice(int(table.offsets[i]), int(table.offsets[i + 1])) for i in rows]
    for part in slices:
        raw = {name: np.asarray(array[part]) for name, array in arrays.items()}
        yield raw if len(raw) > 1 else next(iter(raw.values()))
