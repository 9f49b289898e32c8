"""The adapter that docs/adding-a-modality.md builds, written to a folder outside of the repository and installed there."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = re.compile(r"^`([\w/.-]+)`\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)

Result = subprocess.CompletedProcess[str]
Outside = Callable[..., Result]


def documented() -> dict[str, str]:
    """Files of the document by path."""
    return dict(FILE.findall((ROOT / "docs/adding-a-modality.md").read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with the document's adapter in it."""
    folder = tmp_path_factory.mktemp("outside")
    project, site = folder / "polydiff-curves", folder / "site"
    for name, text in {**documented(), "polydiff_curves/configs/__init__.py": ""}.items():
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(site), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.fixture(scope="session")
def outside(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    """``outside("-m", "pytest", ...)`` runs Python in an empty folder where the installed adapter can be found."""
    folder = tmp_path_factory.mktemp("work")
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> Result:
        command = [sys.executable, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)

    yield run


def outcome(outside: Outside, tmp_path: Path, *words: str) -> tuple[dict[str, str], set[str]]:
    """Messages of the failed tests by name, and the names of those that passed."""
    report = tmp_path / "report.xml"
    done = outside("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *words)
    assert report.is_file(), done.stdout + done.stderr
    failed, passed = {}, set()
    for test in ElementTree.parse(report).iter("testcase"):  # noqa: S314  pytest has just written it
        problems = [child for child in test if child.tag in ("failure", "error")]
        assert all(child.tag == "failure" for child in problems), problems[0].get("message")
        if problems:
            failed[test.get("name", "")] = problems[0].get("message", "")
        elif not len(test):
            passed.add(test.get("name", ""))
    return failed, passed
