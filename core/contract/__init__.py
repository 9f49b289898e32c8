"""A pytest plugin that gives any adapter its tests: ``pytest --polydiff-adapter NAME``.

Without the option it adds nothing and imports nothing. With it and without paths only the contract tests run; with
paths they run beside the tests found there. ``docs/adding-a-modality.md`` says what they ask for.
"""

from __future__ import annotations

import pytest

OPTION = "--polydiff-adapter"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("polydiff", "contract tests of polydiff adapters")
    group.addoption(
        OPTION,
        action="append",
        default=[],
        metavar="NAME",
        help="run the contract tests on this adapter; may be repeated",
    )
    group.addoption(
        "--polydiff-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the experiment that the contract tests take, e.g. network.width=32 for a smaller network",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Bring in the tests if they are asked for, alone unless the command line names other tests."""
    if not config.getoption(OPTION):
        return
    from polydiff.core.contract import plugin

    plugin.check(config.getoption(OPTION))
    config.pluginmanager.register(plugin, "polydiff-contract")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []
