"""The command itself: help, exit codes, one line for an error."""

import shlex
import subprocess
import sys
from collections.abc import Callable

import pytest

from polydiff import __version__
from polydiff.core import cli
from polydiff.core.commands import VERBS


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(polydiff: Callable[..., tuple[int, str, str]], words: list[str]) -> None:
    code, out, error = polydiff(*words)
    assert (code, error) == (0, "")
    assert all(f"\n  {name} " in out for name in VERBS)


def test_help_imports_neither_torch_nor_hydra() -> None:
    code = "import sys; from polydiff.core.cli import main; main(['--help']); print({'torch', 'hydra', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself(polydiff: Callable[..., tuple[int, str, str]], verb: str) -> None:
    code, out, error = polydiff(verb, "--help")
    assert (code, error) == (0, "")
    assert out.startswith(f"polydiff {verb}: {VERBS[verb][0]}\n\nusage: polydiff {verb} ")
    assert "options:\n  " in out
    assert f"examples:\n  polydiff {verb}" in out


def test_version(polydiff: Callable[..., tuple[int, str, str]]) -> None:
    assert polydiff("--version") == (0, f"polydiff {__version__}\n", "")


def test_an_unknown_verb_names_the_nearest(refused: Callable[..., str]) -> None:
    assert refused("smaple").startswith("polydiff: unknown command 'smaple': did you mean sample?")


def test_a_fault_of_polydiff_has_its_own_code_and_debug_shows_where(
    polydiff: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(verb: str, words: list[str]) -> int:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(cli, "_run", broken)
    code, out, error = polydiff("list")
    assert (code, out) == (cli.FAULT, "")
    assert error == "polydiff list: ZeroDivisionError: two lines (a fault of polydiff; POLYDIFF_DEBUG=1 shows where)\n"
    monkeypatch.setenv("POLYDIFF_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["list"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_too_little_memory_is_no_fault(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def hungry(verb: str, words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", hungry)
    assert refused("list").startswith("polydiff list: out of memory: take a smaller batch")


def test_ctrl_c_is_one_line(polydiff: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(verb: str, words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stopped)
    assert polydiff("list") == (cli.STOPPED, "", "polydiff list: stopped\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m polydiff list schedules | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["schedules", "0"]
    assert done.stderr == ""
