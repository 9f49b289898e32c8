"""``polydiff data``: prepare a data set as one verified HDF5 file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from polydiff.core.commands import options
from polydiff.core.commands.options import POSITIONAL
from polydiff.core.errors import ConfigError, DataError, unknown

SHOWN = 20


@dataclass(frozen=True)
class Options:
    """What ``polydiff data`` takes, besides the options of the data set's recipe."""

    data: Annotated[str, "a data set's name (polydiff list data)", POSITIONAL]
    source: Annotated[Path | None, "where the public files are, in their own layout; null: download them"] = None
    folder: Annotated[Path | None, "where to write; null: POLYDIFF_DATA, else the checkout's or the user's cache"] = (
        None
    )
    name: Annotated[str | None, "what to call it; null: as the data set"] = None


def explain() -> str:
    """Help text."""
    from polydiff import data

    own = options.explain(Options, "polydiff data digits", "polydiff data mnist source=DOWNLOADS")
    own += "\n  polydiff data imagefolder source=PICTURES name=pets size=64"
    for name in data.catalogue():
        if further := data.recipe_options(name):
            own += (
                f"\n\noptions of {name}: {' '.join(f'{key}={options.show(value)}' for key, value in further.items())}"
            )
    return own


def main(words: list[str]) -> int:
    """Run the verb; returns the exit code."""
    from polydiff import data
    from polydiff.data.h5 import Reader

    chosen, further = _parse(words)
    target = (chosen.folder or data.folder()) / f"{chosen.name or chosen.data}.h5"
    before = _held(target)
    path = data.prepare(chosen.data, chosen.source, folder=chosen.folder, name=chosen.name, **further)
    reader = Reader(path)
    reader.verify()
    about = reader.attributes
    splits = ", ".join(f"{sum(reader.columns['split'] == name)} {name}" for name in sorted({*reader.columns["split"]}))
    k, n = about.get("complete", (len(reader), len(reader)))
    share = "complete" if k == n else f"{k} of {n} items of the public set"
    if (listed := data.skipped_list(path)).is_file():
        share = _skipped(listed)
    print(
        f"{about['name']}: {splits}; {share}; sigma_data {about['sigma_data']:.4f}; "
        f"licence {about.get('licence') or 'unknown'}"
    )
    if preparation := about.get("preparation"):
        print(preparation)
    if before and before[0] != about["sha256"]:
        print(f"it replaces another set of that name, of {before[1]} items; name=NAME keeps both")
    print(f"wrote {path} (verified)")
    return 0


def _held(path: Path) -> tuple[str, int] | None:
    """Digest and number of items of a file that is there already; None if it is no data set."""
    from polydiff.data.h5 import Reader

    try:
        reader = Reader(path)
        return reader.attributes["sha256"], len(reader)
    except DataError:
        return None


def _parse(words: list[str]) -> tuple[Options, dict[str, Any]]:
    """The verb's own options, and those of the data set's recipe, which only the data set knows."""
    from polydiff import data

    own = options.declared(Options)
    is_own = [(key in own or not equals) for key, equals, _ in (word.partition("=") for word in words)]
    chosen = options.parse(Options, [word for word, mine in zip(words, is_own, strict=True) if mine])
    valid = data.recipe_options(chosen.data)
    further: dict[str, Any] = {}
    for word in (word for word, mine in zip(words, is_own, strict=True) if not mine):
        key = word.partition("=")[0]
        if key not in valid:
            raise unknown(f"option of polydiff data {chosen.data}", key, [*own, *valid])
        if key in further:
            raise ConfigError(f"{key} is given twice")
        further[key] = options.value_of(word)
    return chosen, further


def _skipped(listed: Path) -> str:
    """Show the first of what was skipped; returns the count in words."""
    with listed.open(encoding="utf-8") as file:
        lines = file.read().splitlines()
    for line in lines[:SHOWN]:
        print(f"skipped {line}")
    if len(lines) > SHOWN:
        print(f"... and {len(lines) - SHOWN} more, all in {listed}")
    return f"{len(lines)} files skipped, listed in {listed}"
