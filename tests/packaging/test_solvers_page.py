"""docs/solvers.md says of every solver what the code says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from polydiff.core.solvers import NAMES, Solver

PAGE = Path(__file__).resolve().parents[2] / "docs" / "solvers.md"
HEAD = "| name | class and parameters | order | calls an interval | draws noise | any process | source |"


def shown(value: Any) -> str:
    """A solver as one would write it: its class with the parameters that differ from their defaults."""
    if not isinstance(value, Solver):
        return "Churn()" if type(value).__name__ == "Churn" and value == type(value)() else repr(value)
    own = [
        # what Multistep keeps of the order asked for is its terms; ``order`` is what it reaches
        f"{'order' if field.name == 'terms' else field.name}={shown(getattr(value, field.name))}"
        for field in dataclasses.fields(value)  # type: ignore[arg-type]
        if getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(own)})".replace("'", '"')


def table() -> list[str]:
    """The rows of the page, from the code."""
    return [
        f"| `{name}` | `{shown(entry.solver)}` | {entry.order} | {'adaptive' if entry.stages is None else entry.stages} | "
        f"{'yes' if entry.stochastic else ''} | {'yes' if entry.solver.needs == 'any' else ''} | {entry.source} |"
        for name, entry in NAMES.items()
    ]


def test_the_table_is_that_of_the_code() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEAD) + 2
    found = lines[start : start + len(NAMES)]
    assert found == table(), "docs/solvers.md should hold:\n" + "\n".join(table())
    assert not lines[start + len(NAMES)].startswith("|")
