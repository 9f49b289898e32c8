"""What a user installs: built both ways, compared with the sources git tracks, then used away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import polydiff

if shutil.which("git") is None or not (Path(__file__).resolve().parents[2] / ".git").exists():
    pytest.skip("the wheel is compared with the files git tracks: this is no git checkout", allow_module_level=True)


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module", params=["tree", "sdist"])
def wheel(request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the working tree, and the one built from the source distribution."""
    folder = tmp_path_factory.mktemp(request.param)
    kind = ["--wheel"] if request.param == "tree" else []
    run(sys.executable, "-m", "build", "--no-isolation", *kind, "--outdir", folder, root, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    run(*pip, "--target", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_the_tracked_sources_and_nothing_else(wheel: Path, root: Path) -> None:
    folders = ("core/", "modalities/", "configs/", "data/")
    tracked = run("git", "ls-files", cwd=root).splitlines()
    expected = {f"polydiff/{name}" for name in tracked if name.startswith(folders)}
    expected |= {f"polydiff/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed - expected == set(), "in the wheel, not in git: forgotten `git add`, or a stray file"
    assert expected - packed == set(), "in git, not in the wheel"
    assert {name.partition("/")[0] for name in packed} == {"polydiff"}
    assert {name.partition("/")[0] for name in names - packed} == {f"polydiff-{polydiff.__version__}.dist-info"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


USE = """
import sys
from pathlib import Path
import polydiff, polydiff.core.adapter as adapter
site, root = map(Path, sys.argv[1:])
assert Path(polydiff.__file__).is_relative_to(site), polydiff.__file__
assert Path(adapter.__file__).is_relative_to(site), adapter.__file__
assert not any(Path(entry).resolve().is_relative_to(root) for entry in polydiff.__path__), polydiff.__path__
from hydra import compose, initialize_config_module
with initialize_config_module("polydiff.configs", version_base="1.3"):
    config = compose("train", overrides=["experiment=image-digits"])
print(config.adapter, config.data.name, *adapter.names())
"""


def test_the_wheel_works_away_from_the_checkout(site: Path, root: Path, tmp_path: Path) -> None:
    said = run(sys.executable, "-c", USE, site, root, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert said[:2] == ["image", "digits"]
    assert {"image", "toy2d"} <= set(said[2:])


def test_the_command_of_the_wheel_finds_its_configs(site: Path, tmp_path: Path) -> None:
    said = run(sys.executable, site / "bin/polydiff", "list", cwd=tmp_path, PYTHONPATH=str(site))
    assert "image-digits" in said
    assert "dpmpp-2m" in said


def test_reading_the_configs_writes_nothing_where_it_is_run(site: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "polydiff", "--help", cwd=tmp_path, PYTHONPATH=str(site))
    assert list(tmp_path.iterdir()) == []
