"""Progress of work that a command waits for: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_PER_LINE = 15.0  # where standard error is no terminal

Advance = Callable[[int], None]


@contextmanager
def progress(title: str, total: int, unit: str = "items") -> Iterator[Advance]:
    """Show on standard error how far something is.

    Args:
        title: what is done, e.g. ``sample``.
        total: how many units there are.
        unit: what they are.
    Returns:
        A function to call with the number of units that were just finished.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=title, unit=f" {unit}", dynamic_ncols=True, leave=False) as bar:
            yield bar.update
        return
    done, began = 0, time.monotonic()
    shown = began

    def advance(n: int) -> None:
        nonlocal done, shown
        done, now = done + n, time.monotonic()
        if now - shown >= SECONDS_PER_LINE:
            rate = done / (now - began)
            left = (total - done) / max(rate, 1e-9)
            print(f"{title} {done}/{total}  {rate:,.1f} {unit}/s  {left:,.0f} s left", file=sys.stderr, flush=True)
            shown = now

    yield advance
