"""Collects the contract tests and gives them the adapters of the command line; loaded only when there are some."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from polydiff.core import adapter as adapters
from polydiff.core.adapter import Adapter
from polydiff.core.contract import OPTION
from polydiff.core.errors import ConfigError

MODULES = ("data_tests", "network_tests", "output_tests")
_here = "polydiff.core.contract"

pytest.register_assert_rewrite(*(f"{_here}.{name}" for name in MODULES))


class _Tests(pytest.Module):
    """A module of tests under its import name, wherever the package lies."""

    def _getobj(self) -> Any:
        return importlib.import_module(self.name)


def check(names: Iterable[str]) -> None:
    """Load the adapters; one that cannot be loaded is a mistake in the command line, said in one line."""
    for name in names:
        try:
            adapters.load(name)
        except ConfigError as error:
            raise pytest.UsageError(f"{OPTION}: {error}") from error


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The adapter under test with its data, configurations and networks; a ``Case``."""
    from polydiff.core.contract.case import Case

    words = tuple(request.config.getoption("--polydiff-set"))
    return Case(request.param, words, tmp_path_factory.mktemp(request.param))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add the contract tests before ``-k`` and ``-m`` choose among all."""
    for name in MODULES:
        path = Path(__file__).with_name(f"{name}.py")
        tests = _Tests.from_parent(session, path=path, name=f"{_here}.{name}", nodeid=f"contract/{name}")
        items.extend(item for item in session.genitems(tests) if isinstance(item, pytest.Item))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each contract test its adapters, with their networks, conditions or symmetries where it asks for them."""
    if not metafunc.module.__name__.startswith(f"{_here}."):
        return
    values: list[tuple[str, ...]] = []
    asked = [name for name in TABLES if name in metafunc.fixturenames]
    for name in dict.fromkeys(metafunc.config.getoption(OPTION)):
        rows: list[tuple[str, ...]] = [(name,)]
        for table in asked:
            rows = [(*row, entry) for row in rows for entry in TABLES[table](adapters.load(name))]
        values += rows
    ids = ["-".join(value) for value in values]
    metafunc.parametrize(["case", *asked], values, indirect=["case"], ids=ids, scope="session")


def _networks(adapter: Adapter) -> list[str]:
    return list(adapter.network)


def _conditions(adapter: Adapter) -> list[str]:
    from polydiff.core.objectives import RESERVED

    return [name for name in adapter.conditions if name not in RESERVED]


def _symmetries(adapter: Adapter) -> list[str]:
    return list(adapter.symmetries)


def _tasks(adapter: Adapter) -> list[str]:
    return list(adapter.tasks)


TABLES = {"network": _networks, "condition": _conditions, "symmetry": _symmetries, "task": _tasks}
