"""One offline HTML page about a run: look, listen, rotate, compare with real data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydiff.core.adapter import Fragment, Item
from polydiff.core.errors import CheckpointError, DataError, PolydiffError
from polydiff.core.report.offline import FOLDER, LIMIT, outside_addresses, spill
from polydiff.core.report.page import page
from polydiff.core.request import SHOWN, enough, lend, lent
from polydiff.core.tree import leaves

if TYPE_CHECKING:
    from polydiff.core.run import Run

__all__ = ["draw", "outside_addresses", "page", "real", "report", "write"]

MANY = 2000  # samples of tiny states
ROWS = 16  # classes that get a row each
REFERENCE = 10_000  # real items to compare with
NUMBERS = 100_000_000  # in all states together, of samples and of real items
EACH = 4  # samples under the same conditions, where real items lend theirs
STATES = 8  # states along the way from noise to sample


def report(run: Path, *, n: int | None = None, seed: int = 0, device: str = "auto") -> Path:
    """Draw samples from a run and write its page.

    Args:
        run: the run folder; without a checkpoint the page has no samples.
        n: how many samples; by default 64, a whole number of rows where there are classes, more of tiny states.
        seed: of the samples.
        device: as of ``polydiff.load``.
    Returns:
        The page, ``index.html`` in the run folder.
    Raises:
        CheckpointError: not a run, its checkpoints are damaged, or the page cannot be written.
        PolydiffError: the adapter's view would load something from outside.
    """
    run = Path(run)
    if not any((run / "checkpoints").glob("step-*")):
        return write(run)
    from polydiff.core.run import Run

    trained = Run.load(run, device=device)
    try:
        reference, missing = real(trained), ""
    except DataError as error:
        reference, missing = [], f'<p class="note">Without real data beside the samples: {escape(str(error))}</p>'
    fragment = trained.adapter.view(draw(trained, lenders(trained, reference), n, seed), reference)
    return write(run, [("Samples", fragment._replace(html=missing + fragment.html))])


def real(run: Run, split: str = "train") -> list[Item]:
    """Items of the data a run was trained on, evenly over the split, no more than fit into memory with ease."""
    data = run.dataset(split)
    numbers = sum(leaf.numel() for leaf in leaves(data[0].x))
    count = min(len(data), REFERENCE, max(SHOWN, NUMBERS // max(1, numbers)))
    return [_named(data[i * len(data) // count], run.facts) for i in range(count)]


def lenders(run: Run, reference: Sequence[Item]) -> Sequence[Item]:
    """Real items whose conditions samples are given: held-out ones, where there are some and classes are not all."""
    if not reference or not lent(run.denoiser.conditions, reference[0]):
        return reference
    try:
        return real(run, "test")
    except DataError:
        return reference


def draw(run: Run, reference: Sequence[Item] = (), n: int | None = None, seed: int = 0) -> list[Item]:
    """Samples with the states along the way; classes take turns and are named in ``meta``.

    Args:
        run: what to sample from.
        reference: real items; where they have conditions that are no classes, a few lend all theirs to four samples each
            and become ``meta["truth"]``.
        n: how many samples; None chooses.
        seed: of the samples.
    """
    like, _ = run.adapter.shape(run.facts.get("size") or {}, {})
    counts = {name: len(names) for name, names in _classes(run.facts).items() if name in run.denoiser.conditions}
    if n is None:
        n = enough(like, MANY, NUMBERS)
        if counts and min(counts.values()) <= ROWS:
            n = min(counts.values()) * math.ceil(n / min(counts.values()))
    cond: dict[str, Any] = {name: list(range(count)) for name, count in counts.items()}
    truth: list[Item] = []
    if reference and lent(run.denoiser.conditions, reference[0]):
        count = min(len(reference), max(1, n // EACH))
        truth = [reference[i * len(reference) // count] for i in range(count)]
        cond = lend(run.denoiser.conditions, truth)
    samples = [_named(item, run.facts) for item in run.sample(n, cond=cond, seed=seed, trajectory=STATES)]
    for i, item in enumerate(samples if truth else ()):
        item.meta["truth"] = truth[i % len(truth)].x
    return samples


def _classes(facts: Mapping[str, Any]) -> Mapping[str, Sequence[str]]:
    return facts.get("classes") or {}


def _named(item: Item, facts: Mapping[str, Any]) -> Item:
    names = {key: names[int(item.cond[key])] for key, names in _classes(facts).items() if key in item.cond}
    return dataclasses.replace(item, meta={**item.meta, **names})


def write(folder: Path, fragments: Sequence[tuple[str, Fragment]] = (), *, limit: int = LIMIT) -> Path:
    """Write ``index.html`` into a run folder in one move, so that a reader sees the old page or the new one.

    Args:
        folder: the run.
        fragments: (title, what a view drew), one section each.
        limit: bytes of the page above which pictures and sounds become files in ``index_files/`` beside it.
    Returns:
        The page.
    Raises:
        CheckpointError: not a run folder, or it cannot be written to.
        PolydiffError: a fragment would load something from outside.
    """
    folder = Path(folder)
    for title, fragment in fragments:
        if found := outside_addresses(fragment.html):
            raise PolydiffError(
                f"the view for {title!r} loads {found[0][:200]!r} from outside: embed it as a data: address"
            )
    html, files = spill(page(folder, fragments), limit)
    target = folder / "index.html"
    try:
        for name, content in files.items():
            (folder / FOLDER).mkdir(exist_ok=True)
            _replace(folder / FOLDER / name, content)
        _replace(target, html.encode())
        for stale in (path for path in (folder / FOLDER).glob("*") if path.name not in files):
            stale.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error.strerror}); free space or choose another folder"
        ) from error
    return target


def _replace(path: Path, content: bytes) -> None:
    """Write beside the target, then rename over it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
