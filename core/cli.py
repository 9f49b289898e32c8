"""The ``polydiff`` command: finds the verb, runs it, and turns a user's error into one line and an exit code.

Exit codes: 0 done; 1 something the user can mend, said in one line; 70 a fault of polydiff; 75 training was interrupted
and saved, the same command goes on; 130 stopped by Ctrl-C. ``POLYDIFF_DEBUG=1`` shows tracebacks.

Nothing heavy is imported here, so that ``polydiff --help`` answers at once.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence

from polydiff import __version__
from polydiff.core.commands import VERBS
from polydiff.core.errors import PolydiffError, unknown

_NO_MEMORY = re.compile("out of memory|allocate memory|not enough memory|bad_alloc")  # as torch says it, by device
OK, USER_ERROR, FAULT, INTERRUPTED, STOPPED = 0, 1, 70, 75, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after ``polydiff``; the process's own when None.
    """
    code = _main(list(sys.argv[1:] if argv is None else argv))
    return leave(code) if argv is None else code


def leave(code: int) -> int:
    """End a process that is one of several at once; any other gets its exit code back.

    Threads of the process group may outlive the interpreter, which then aborts although all is saved. All processes have
    waited for each other by then, so none needs this one any more.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _main(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(overview())
        return OK
    if words[0] in ("--version", "-V"):
        print(f"polydiff {__version__}")
        return OK
    debug = os.environ.get("POLYDIFF_DEBUG", "") not in ("", "0")
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = _show_warning  # type: ignore[assignment]
            return _run(words[0], words[1:])
    except PolydiffError as error:
        if debug:
            raise
        return _fail(words[0], str(error), USER_ERROR)
    except BrokenPipeError:  # `polydiff list | head`: the reader has gone, and nobody is left to complain to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(words[0], f"{where}{error.strerror or error}", USER_ERROR)
    except KeyboardInterrupt:
        return _fail(words[0], "stopped", STOPPED)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
            return _fail(
                words[0], "out of memory: take a smaller batch, fewer samples or a smaller network", USER_ERROR
            )
        line = f"{type(error).__name__}: {error} (a fault of polydiff; POLYDIFF_DEBUG=1 shows where)"
        return _fail(words[0], line, FAULT)


def overview() -> str:
    """The text of ``polydiff --help``."""
    verbs = "\n".join(f"  {name:10}{summary}" for name, (summary, _) in VERBS.items())
    return (
        f"polydiff {__version__}: train and sample diffusion models of any modality\n\n"
        f"usage: polydiff COMMAND [key=value ...]\n\n{verbs}\n\n"
        "`polydiff COMMAND --help` explains each. A first run:\n"
        "  polydiff train experiment=image-digits\n"
        "  polydiff sample run=runs/image-digits cond.label=3\n"
        "  polydiff report run=runs/image-digits"
    )


def _run(verb: str, words: list[str]) -> int:
    if verb not in VERBS:
        raise unknown("command", verb, VERBS)
    command = importlib.import_module(f"polydiff.core.commands.{verb}")
    if "--help" in words or "-h" in words:
        summary, usage = VERBS[verb]
        print(f"polydiff {verb}: {summary}\n\nusage: polydiff {verb} {usage}\n\n{command.explain()}")
        return OK
    return command.main(words)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"polydiff: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(verb: str, message: str, code: int) -> int:
    line = " ".join(message.split())
    name = f"polydiff {verb}" if verb in VERBS else "polydiff"
    print(f"{name}: {line}", file=sys.stderr)
    return code
