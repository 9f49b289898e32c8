"""A way to run the command in this process and to read what it said."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from polydiff.core.cli import main


class Said(NamedTuple):
    code: int
    out: str
    error: str


Command = Callable[..., Said]


@pytest.fixture
def polydiff(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``polydiff("sample", "run=...")`` -> exit code, standard output, standard error."""
    monkeypatch.delenv("POLYDIFF_DEBUG", raising=False)

    def run(*words: object) -> Said:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Said(code, *capfd.readouterr())

    return run


@pytest.fixture
def refused(polydiff: Command) -> Callable[..., str]:
    """As ``polydiff``, for a user's error: exit code 1 and exactly one line, which is returned."""

    def run(*words: object) -> str:
        said = polydiff(*words)
        assert said.code == 1, said
        assert said.out == ""
        assert said.error.count("\n") == 1, said.error
        assert "Traceback" not in said.error
        return said.error

    return run
