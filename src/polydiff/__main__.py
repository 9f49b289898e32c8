"""``python -m polydiff`` is the ``polydiff`` command."""

from polydiff.core.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
