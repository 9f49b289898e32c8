"""``polydiff report``: one offline HTML page about a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from polydiff.core.commands import options


@dataclass(frozen=True)
class Options:
    """What ``polydiff report`` takes."""

    run: Annotated[Path, "folder of a trained model"]
    n: Annotated[int | None, "samples to draw and show; null: as many as fit"] = None
    seed: Annotated[int, "of the samples"] = 0
    device: Annotated[str, "auto, cpu, cuda"] = "auto"


def explain() -> str:
    """Help text."""
    return options.explain(Options, "polydiff report run=runs/image-digits")


def main(words: list[str]) -> int:
    """Run the verb; returns the exit code."""
    chosen = options.parse(Options, words)

    from polydiff.core.report import report
    from polydiff.core.request import positive
    from polydiff.core.run import check_folder

    positive(**({} if chosen.n is None else {"n": chosen.n}))
    check_folder(chosen.run)
    path = report(chosen.run, n=chosen.n, seed=chosen.seed, device=chosen.device)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser, it needs no network")
    return 0
