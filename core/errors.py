"""The errors a user can meet. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PolydiffError(Exception):
    """Base of every error that polydiff raises on purpose; the command line prints it as one line."""


class ConfigError(PolydiffError):
    """A configuration key, value, name or combination that cannot be used."""


class DataError(PolydiffError):
    """A data file or data set that is missing, damaged, unsafe or not what it claims to be."""


class CheckpointError(PolydiffError):
    """A run folder or checkpoint that is missing, incomplete, altered or of another format."""


class ScheduleError(PolydiffError):
    """A time, grid or schedule value outside the domain on which the formula holds."""


class DivergenceError(PolydiffError):
    """Training or sampling produced non-finite numbers that cannot be recovered from."""


def unknown(kind: str, name: object, valid: Iterable[str]) -> ConfigError:
    """Build the error for a name that is not in a table, naming the nearest valid ones.

    Args:
        kind: what was looked up, e.g. ``"solver"``.
        name: what the user asked for.
        valid: the names that exist.
    """
    names = sorted(valid)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(f"unknown {kind} {str(name)!r}: {hint}valid: {', '.join(names) or '(none)'}")
