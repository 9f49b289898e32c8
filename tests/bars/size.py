"""Bar "size": the maths of the core stays under 4,000 lines.

    python tests/bars/size.py

The bar is on physical lines; beside them stand the lines of code, without blank lines, comments and docstrings.
"""

from __future__ import annotations

import ast
import sys
import tokenize
from pathlib import Path

from _bars import check, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.packaging.test_guards import MOST_MATHS, ROOT, maths, parse, physical_lines

BLANK = (
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(path: Path) -> int:
    """Lines that hold a token of code."""
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in BLANK]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(parse(path)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            code -= {*range(text.lineno, (text.end_lineno or text.lineno) + 1)}
    return len(code)


def main() -> int:
    """Print every module and both sums; whether the bar is met."""
    sizes = {path.relative_to(ROOT).as_posix(): (physical_lines(path), code_lines(path)) for path in maths()}
    for name, (physical, code) in sorted(sizes.items(), key=lambda entry: -entry[1][0]):
        print(f"{name}: {physical} lines, {code} of code")
    physical, code = (sum(column) for column in zip(*sizes.values(), strict=True))
    met = check("maths of the core, lines", physical, MOST_MATHS - 1, note=f"{code} of code")
    print(machine())
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
