"""``polydiff list``: what there is to choose from. Everything is discovered, nothing is written down here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from polydiff.core.commands import options
from polydiff.core.commands.options import POSITIONAL
from polydiff.core.errors import unknown

Rows = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Options:
    """What ``polydiff list`` takes."""

    what: Annotated[str, "one of the tables below, or all", POSITIONAL] = "all"
    config_dir: Annotated[Path | None, "a folder of further configurations"] = None


def explain() -> str:
    """Help text."""
    return options.explain(Options, "polydiff list", "polydiff list solvers") + f"\n\ntables: {', '.join(TABLES)}"


def main(words: list[str]) -> int:
    """Run the verb; returns the exit code."""
    chosen = options.parse(Options, words)
    if chosen.what not in TABLES and chosen.what != "all":
        raise unknown("table", chosen.what, [*TABLES, "all"])
    wanted = list(TABLES) if chosen.what == "all" else [chosen.what]
    blocks = []
    for name in wanted:
        rows = list(TABLES[name](chosen.config_dir))
        width = max((len(row[0]) for row in rows), default=0)
        blocks.append("\n".join([name, *(f"  {row[0]:{width}}  {row[1]}".rstrip() for row in rows)]))
    print("\n\n".join(blocks))
    return 0


def _experiments(config_dir: Path | None) -> Rows:
    from polydiff.core.commands.compose import choices, compose
    from polydiff.core.errors import ConfigError

    for name in choices("experiment", config_dir):
        try:
            config = compose([f"experiment={name}"], config_dir)
            yield name, f"{config['adapter']}, {config['data']['name']}, {config['trainer']['steps']} steps"
        except ConfigError as error:
            yield name, f"broken: {error}"


def _adapters(_: Path | None) -> Rows:
    from polydiff.core import adapter as adapters
    from polydiff.core.errors import ConfigError

    for name in adapters.names():
        try:
            found = adapters.load(name)
            conditions = ", ".join(found.conditions) or "none"
            yield name, f"networks: {', '.join(found.network)}; conditions: {conditions}"
        except ConfigError as error:
            yield name, f"broken: {error}"


def _tasks(_: Path | None) -> Rows:
    from polydiff.core import adapter as adapters
    from polydiff.core.errors import ConfigError
    from polydiff.core.tasks import declared_by

    for name in adapters.names():
        try:
            for task, make in adapters.load(name).tasks.items():
                yield f"{name} {task}", _first_line(make.load() if isinstance(make, adapters.Lazy) else make)
                for key in options.declared(declared_by(make)).values():
                    yield f"  task.{key.name}={options.show(key.default)}", key.text
        except ConfigError:  # the table of adapters says why
            continue


def _solvers(_: Path | None) -> Rows:
    from polydiff.core.solvers.names import NAMES

    for name, entry in NAMES.items():
        calls = "calls to a tolerance"
        if entry.stages is not None:
            calls = f"{entry.stages} call{'s' if entry.stages > 1 else ''} a step"
        noise = ", stochastic" if entry.stochastic else ""
        yield name, f"order {entry.order}, {calls}{noise}; {entry.source}"


def _grids(_: Path | None) -> Rows:
    from polydiff.core.grids import GRIDS

    return ((name, _first_line(grid)) for name, grid in GRIDS.items())


def _schedules(_: Path | None) -> Rows:
    from polydiff.core.schedules import SCHEDULES

    return ((name, _first_line(schedule)) for name, schedule in SCHEDULES.items())


def _data(_: Path | None) -> Rows:
    from polydiff import data

    return ((name, entry.about) for name, entry in data.catalogue().items())


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0].replace("``", "")


TABLES: dict[str, Callable[[Path | None], Rows]] = {
    "experiments": _experiments,
    "adapters": _adapters,
    "tasks": _tasks,
    "solvers": _solvers,
    "grids": _grids,
    "schedules": _schedules,
    "data": _data,
}
