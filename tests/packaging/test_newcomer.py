"""The fast form of the bar ``newcomer``: the same steps with an environment whose programs only pretend."""

import importlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if shutil.which("make") is None or shutil.which("git") is None:
    pytest.skip("needs make and git", allow_module_level=True)

# Stands for python3: makes an environment of programs that note how they were called; `polydiff train` writes a log.
PYTHON = """#!/bin/sh
test "$1" = -m || exit 0
mkdir -p "$3/bin"
for name in pip python ruff mypy polydiff; do
cat > "$3/bin/$name" <<'END'
#!/bin/sh
echo "$(basename "$0") $1 ${{PYTHONPATH-}}" >> "{log}"
case "$(basename "$0") $1" in
{fault}
"polydiff train")
    for word; do case $word in run=*) folder=${{word#run=}};; esac; done
    mkdir -p "$folder" data/cache
    test -e data/cache/made && echo prepared >> "{log}"
    touch data/cache/made
    echo '{{"step": 1, "wall_s": {seconds}}}' > "$folder/metrics.jsonl";;
esac
END
chmod +x "$3/bin/$name"
done
"""

DEMO = ["polydiff train", "polydiff sample", "polydiff evaluate", "polydiff report"]


Bar = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def bar(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bar:
    """Runs the bar with pretended programs; returns exit code, output, and the calls that were made."""
    if not (root / ".git").exists():
        pytest.skip("the bar clones the repository: this is no git checkout")
    monkeypatch.syspath_prepend(root / "tests/bars")
    newcomer = importlib.import_module("newcomer")
    for name, value in {"MAKEFLAGS": "-n", "RUN": "elsewhere", "VENV": "elsewhere"}.items():
        monkeypatch.setenv(name, value)

    def run(reuse: Path | None = None, only: str = "", fault: str = "", seconds: float = 60) -> Any:
        python, log = tmp_path / "python", tmp_path / "log"
        python.write_text(PYTHON.format(log=log, fault=fault, seconds=seconds))
        python.chmod(0o755)
        log.write_text("")
        code = newcomer.main(str(python), reuse, only, cores=1)
        said = capsys.readouterr()
        return code, said.out + said.err, [line.rstrip() for line in log.read_text().splitlines()]

    return run


def test_both_commands_then_a_demo_from_nothing_but_the_installation(bar: Bar) -> None:
    code, said, calls = bar()
    assert code == 0, said
    assert said.count(": met") == 5 and "make demo: exit code" in said and "make test: exit code" in said
    lint = ["ruff check", "ruff format", "mypy"]
    assert calls == ["python -m", *DEMO, *lint, "python -m", *DEMO]


@pytest.mark.parametrize(
    ("fault", "seconds", "missed"),
    [
        (
            '"python -m") exit 1;;',
            60,
            ["make demo: exit code: 2", "make test: exit code: 2", "installed: exit code: 2"],
        ),
        ('"mypy ") echo wrong types; exit 1;;', 60, ["wrong types", "make test: exit code: 2"]),
        ("", 241, ["training: minutes: 4.017"]),
        ('"polydiff train") ;;', 60, ["training: minutes: nan"]),
    ],
)
def test_what_goes_wrong_is_missed(bar: Bar, fault: str, seconds: float, missed: list[str]) -> None:
    code, said, _ = bar(fault=fault, seconds=seconds)
    assert code == 1
    assert all(text in said for text in missed) and "MISSED" in said


def test_an_environment_that_exists_runs_the_clone_and_is_left_as_it_was(bar: Bar, tmp_path: Path) -> None:
    bar(only="demo")  # writes the pretended interpreter
    subprocess.run([tmp_path / "python", "-m", "venv", tmp_path / "venv"], check=True)
    code, said, calls = bar(tmp_path / "venv", only="demo")
    assert code == 0, said
    assert [" ".join(call.split()[:2]) for call in calls] == DEMO
    assert all(call.endswith("/a clone/src") for call in calls)
    assert [path.name for path in (tmp_path / "venv").iterdir()] == ["bin"]
