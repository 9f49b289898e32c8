"""The two commands of the README, run with an environment whose programs only say how they were called."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >> "{log}"
"""
if shutil.which("make") is None:
    pytest.skip("make is not installed", allow_module_level=True)


class Checkout:
    """A copy of the Makefile beside a ``.venv`` that is already made."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(root / name, folder)
        (folder / ".venv/bin").mkdir(parents=True)
        for name in ("pip", "python", "ruff", "mypy", "polydiff"):
            self.program(name, PROGRAM.format(log=self.log))

    def program(self, name: str, text: str) -> None:
        path = self.folder / ".venv/bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def make(self, *words: str) -> tuple[int, str, list[str]]:
        """Exit status, what was printed, and the calls made."""
        self.log.write_text("")
        outer = ("MAKE", "MFLAGS", "PYTHON", "TORCH_INDEX", "VENV", "RUN")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
        result = subprocess.run(
            ["make", *words], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        return result.returncode, result.stdout + result.stderr, self.log.read_text().splitlines()


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Checkout:
    folder = tmp_path / "a checkout"
    folder.mkdir()
    return Checkout(root, folder)


def test_it_installs_once_and_again_when_the_project_file_changed(checkout: Checkout) -> None:
    status, said, first = checkout.make("test")
    assert status == 0, said
    assert first[0] == "python -m pip install --progress-bar off -e .[dev]"
    assert first[1:] == ["ruff check .", "ruff format --check .", "mypy ", "python -m pytest"]
    assert checkout.make("test")[2] == first[1:]
    stamp = checkout.folder / ".venv/installed"
    os.utime(checkout.folder / "pyproject.toml", (stamp.stat().st_mtime + 5,) * 2)
    assert checkout.make("test")[2] == first


def test_a_failed_install_is_tried_again(checkout: Checkout) -> None:
    checkout.program("python", "#!/bin/sh\nexit 1\n")
    assert checkout.make("demo")[0] != 0
    checkout.program("python", PROGRAM.format(log=checkout.log))
    assert checkout.make("demo")[2][0].startswith("python -m pip install")


def test_the_missing_environment_is_made_with_the_python_asked_for(checkout: Checkout) -> None:
    shutil.move(checkout.folder / ".venv", checkout.folder / "made")
    python = checkout.folder / "our python"
    python.write_text(f'#!/bin/sh\ntest "$1" = -c || {{ echo "our $*" >> "{checkout.log}"; mv made .venv; }}\n')
    python.chmod(0o755)
    status, said, calls = checkout.make("lint", "PYTHON=./our\\ python")
    assert status == 0, said
    assert calls[0] == "our -m venv .venv"
    assert calls[1].startswith("python -m pip install")


def test_an_old_python_is_refused_in_one_line(checkout: Checkout) -> None:
    old = checkout.folder / "old"
    old.write_text('#!/bin/sh\npython3 -c "import sys; sys.version_info = (3, 10); exec(sys.argv[1])" "$2"\n')
    old.chmod(0o755)
    status, said, calls = checkout.make("test", "PYTHON=./old")
    assert status != 0
    assert "polydiff needs Python 3.11 or later: make PYTHON=python3.12" in said
    assert calls == []


def test_one_variable_chooses_where_torch_comes_from(checkout: Checkout) -> None:
    calls = checkout.make("lint", "TORCH_INDEX=https://example.org/cpu")[2]
    assert calls[0] == "python -m pip install --progress-bar off --extra-index-url https://example.org/cpu -e .[dev]"


def test_the_demo_runs_four_verbs_on_one_run_and_says_where_its_page_is(checkout: Checkout) -> None:
    _, said, calls = checkout.make("demo", "RUN=runs/mine")
    verbs = [call.split()[1] for call in calls[1:]]
    assert verbs == ["train", "sample", "evaluate", "report"]
    assert all("run=runs/mine" in call.split() for call in calls[1:])
    assert said.splitlines()[-1] == f"Open {checkout.folder}/runs/mine/index.html in a browser."


def test_every_bar_is_measured_even_after_a_miss(checkout: Checkout) -> None:
    bars = checkout.folder / "tests/bars"
    bars.mkdir(parents=True)
    for name in ("a.py", "b.py", "_shared.py"):
        (bars / name).touch()
    checkout.program("python", '#!/bin/sh\necho "ran $1"; test "$1" != tests/bars/a.py\n')
    status, said, _ = checkout.make("bars")
    assert status != 0
    assert "ran tests/bars/b.py" in said
    assert "_shared" not in said
    assert said.count("missed: tests/bars/a.py") == 1
    checkout.program("python", '#!/bin/sh\ntest "$1" != tests/bars/b.py || exit 2\n')
    status, said, _ = checkout.make("bars")
    assert status == 0
    assert "not measured, something is not installed: tests/bars/b.py" in said


def test_cleaning_keeps_runs_data_and_the_environment(checkout: Checkout) -> None:
    for folder in (
        "runs/x",
        "data/cache",
        "core/__pycache__",
        "modalities",
        "configs",
        "src",
        "tests",
        "examples",
        "build",
    ):
        (checkout.folder / folder).mkdir(parents=True)
    assert checkout.make("clean")[0] == 0
    left = {path.name for path in checkout.folder.iterdir()}
    assert {"runs", "data", ".venv", "core"} <= left
    assert "build" not in left
    assert (checkout.folder / "runs/x").is_dir()
    assert (checkout.folder / "data/cache").is_dir()
    assert not (checkout.folder / "core/__pycache__").exists()


def publish(index: Path, name: str, version: str) -> None:
    """Put an empty wheel into a package index made of files."""
    folder = index / name
    folder.mkdir(parents=True)
    stem = f"{name}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{stem.replace("+", "%2B")}-py3-none-any.whl">{stem}</a>')


def test_the_extra_index_wins_for_both_of_the_pair(root: Path, tmp_path: Path) -> None:
    """The CPU-only line relies on pip ranking 2.12.1+cpu above 2.12.1, and must not mix one build with the other."""
    needs = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    pair = [need for need in needs if need.startswith("torch")]
    assert len(pair) == 2
    for name, version in (("torch", "2.12.1"), ("torchaudio", "2.11.0")):
        publish(tmp_path / "usual", name, version)
        publish(tmp_path / "cpu", name, f"{version}+cpu")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--target", str(tmp_path / "site")]
    command += ["--index-url", (tmp_path / "usual").as_uri(), "--extra-index-url", (tmp_path / "cpu").as_uri(), *pair]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "Would install torch-2.12.1+cpu torchaudio-2.11.0+cpu" in result.stdout, result.stdout + result.stderr
