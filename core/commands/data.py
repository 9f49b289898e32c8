"""``polydiff data``: prepare a data set as one verified HDF5 file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from polydiff.core.commands import options
from polydiff.core.commands.options import POSITIONAL


@dataclass(frozen=True)
class Options:
    """What ``polydiff data`` takes."""

    name: Annotated[str, "a data set's name (polydiff list data)", POSITIONAL]
    source: Annotated[Path | None, "where the public files are, in their own layout; null: download them"] = None
    folder: Annotated[Path | None, "where to write; null: POLYDIFF_DATA, else the checkout's or the user's cache"] = (
        None
    )


def explain() -> str:
    """Help text."""
    return options.explain(Options, "polydiff data digits")


def main(words: list[str]) -> int:
    """Run the verb; returns the exit code."""
    chosen = options.parse(Options, words)

    from polydiff import data
    from polydiff.data.h5 import Reader

    path = data.prepare(chosen.name, source=chosen.source, folder=chosen.folder)
    reader = Reader(path)
    reader.verify()
    about = reader.attributes
    splits = ", ".join(f"{sum(reader.columns['split'] == name)} {name}" for name in sorted({*reader.columns["split"]}))
    k, n = about.get("complete", (len(reader), len(reader)))
    share = "complete" if k == n else f"{k} of {n} items of the public set"
    print(
        f"{chosen.name}: {splits}; {share}; sigma_data {about['sigma_data']:.4f}; licence {about.get('licence') or 'unknown'}"
    )
    print(f"wrote {path} (verified)")
    return 0
