"""Bar "size": the maths of the core stays under 4,000 lines of code.

    python tests/bars/size.py

Blank lines, comments and docstrings are left out; what a file has with them stands beside.
"""

from __future__ import annotations

import sys
from pathlib import Path

from _bars import check, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.packaging.test_guards import MOST_MATHS, ROOT, code_lines, maths, physical_lines


def main() -> int:
    """Print every module and both sums; whether the bar is met."""
    sizes = {path.relative_to(ROOT).as_posix(): (code_lines(path), physical_lines(path)) for path in maths()}
    for name, (code, physical) in sorted(sizes.items(), key=lambda entry: -entry[1][0]):
        print(f"{name}: {code} lines of code, {physical} in all")
    code, physical = (sum(column) for column in zip(*sizes.values(), strict=True))
    met = check("maths of the core, lines of code", code, MOST_MATHS - 1, note=f"{physical} with what documents them")
    print(machine())
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
