"""What every test may rely on: where the repository and the data are, and a session that leaves no trace."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(min(2, torch.get_num_threads()))  # tensors here are small: more threads only wait for each other
settings.register_profile("polydiff", deadline=None, derandomize=True)  # the same examples on every machine
settings.load_profile("polydiff")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where prepared data sets go during the session: POLYDIFF_DATA when it is set, else a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        if "POLYDIFF_DATA" not in os.environ:
            patch.setenv("POLYDIFF_DATA", str(tmp_path_factory.mktemp("data")))
        yield Path(os.environ["POLYDIFF_DATA"])


@pytest.fixture(scope="session")
def data_source() -> Path:
    """A folder with public data sets in their own layout (POLYDIFF_DATA_SOURCE); tests that need one skip without."""
    folder = os.environ.get("POLYDIFF_DATA_SOURCE")
    if not folder:
        pytest.skip("POLYDIFF_DATA_SOURCE is not set: it names a folder with public data sets in their own layout")
    return Path(folder)


@pytest.fixture(scope="session")
def moons_run(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """A run of toy2d, trained for a moment, with checkpoints of steps 20 and 40; copy it before changing it."""
    from polydiff.core.cli import main

    run = tmp_path_factory.mktemp("runs") / "moons"
    words = ["trainer.steps=40", "trainer.save_every=20", "trainer.batch=64", "network.width=32", "network.blocks=2"]
    assert main(["train", "experiment=toy2d", f"run={run}", "logger=jsonl", "trainer.device=cpu", *words]) == 0
    return run
