"""``polydiff doctor``: whether everything is there, and in order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from polydiff.core.commands import options


@dataclass(frozen=True)
class Options:
    """What ``polydiff doctor`` takes."""

    data: Annotated[Path | None, "a data file, or the name of a prepared data set"] = None
    run: Annotated[Path | None, "folder of a trained model"] = None
    network: Annotated[str | None, "import path of the network, for a run trained with one"] = None


def explain() -> str:
    """Help text."""
    return options.explain(Options, "polydiff doctor", "polydiff doctor run=runs/image-digits")


def main(words: list[str]) -> int:
    """Run the verb; returns 1 when something fails."""
    chosen = options.parse(Options, words)

    from polydiff import data
    from polydiff.core import doctor

    parts = [doctor.machine()]
    if chosen.data is not None:
        is_name = not chosen.data.exists() and chosen.data.name == str(chosen.data) and chosen.data.suffix != ".h5"
        path = data.locate(str(chosen.data), prepare_embedded=False) if is_name else chosen.data
        parts.append(doctor.data_set(path))
    if chosen.run is not None:
        parts.append(doctor.run_folder(chosen.run, chosen.network))
    failures = 0
    for finding in itertools.chain(*parts):
        failures += finding.level == "fail"
        remedy = f"; {finding.remedy}" if finding.remedy and finding.level != "ok" else ""
        print(f"{finding.level:5} {finding.text}{remedy}")
    print("all is well" if not failures else f"{failures} check{'s' if failures > 1 else ''} failed")
    return int(failures > 0)
