"""The verbs that look after data and runs: ``data``, ``report``, ``doctor``."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from polydiff import data
from polydiff.core import doctor
from polydiff.core.adapter import Finding
from polydiff.core.report import outside_addresses

Command = Callable[..., tuple[int, str, str]]


def test_data_prepares_a_verified_file_and_says_where(polydiff: Command, refused: Command, tmp_path: Path) -> None:
    code, out, error = polydiff("data", "rings", f"folder={tmp_path}")
    assert (code, error) == (0, "")
    assert out.startswith("rings: 2000 test, 8000 train; complete; sigma_data ")
    assert out.endswith(f"wrote {tmp_path / 'rings.h5'} (verified)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["rings.h5"]
    assert "unknown data set 'ringz': did you mean rings?" in refused("data", "ringz")
    assert "missing data: a data set's name" in refused("data")
    assert "is embedded: leave out source=" in refused("data", "rings", f"source={tmp_path}")


def test_report_writes_one_page_that_needs_nothing_else(
    polydiff: Command, refused: Command, moons_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(moons_run, tmp_path / "run")
    code, out, _ = polydiff("report", f"run={run}", "n=20")
    assert code == 0
    assert f"wrote {run / 'index.html'}" in out
    assert outside_addresses((run / "index.html").read_text()) == []
    assert "no such run" in refused("report", f"run={tmp_path / 'nothing'}")
    assert "n=0 must be at least 1" in refused("report", f"run={run}", "n=0")
    assert "not a run folder" in refused("report", f"run={tmp_path}")


def test_doctor_finds_a_sound_machine_data_set_and_run(polydiff: Command, moons_run: Path, data_folder: Path) -> None:
    code, out, error = polydiff("doctor", "data=moons", f"run={moons_run}")
    assert (code, error) == (0, ""), out
    lines = out.splitlines()
    assert lines[-1] == "all is well"
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "warn"}
    for text in (
        "ok    torch 2.",
        "ok    checkpoint of step 20 is whole",
        f"ok    {moons_run}: toy2d, adapter toy2d, step 40",
        f"ok    {data_folder / 'moons.h5'}: moons, 10000 items for the adapter toy2d",
    ):
        assert any(line.startswith(text) for line in lines), text


def test_doctor_knows_prepared_data_sets_by_their_names(
    polydiff: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POLYDIFF_DATA", str(tmp_path))
    shutil.copy(data.prepare("moons", folder=tmp_path / "made"), tmp_path / "pets.h5")
    code, out, _ = polydiff("doctor", "data=pets")
    assert code == 0 and f"{tmp_path / 'pets.h5'}: moons, 10000 items" in out


def test_doctor_fails_for_a_damaged_checkpoint_and_a_damaged_data_set(
    polydiff: Command, moons_run: Path, data_folder: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(moons_run, tmp_path / "run")
    weights = run / "checkpoints/step-00000040/ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    data = tmp_path / "moons.h5"
    data.write_bytes((data_folder / "moons.h5").read_bytes()[:-100])
    code, out, error = polydiff("doctor", f"data={data}", f"run={run}")
    assert code == 1
    failures = [line for line in out.splitlines() if line.startswith("fail")]
    assert len(failures) == 2
    assert str(data) in failures[0]
    assert str(weights) in failures[1]
    assert "remove it; training goes on from the one before" in failures[1]
    assert out.endswith("2 checks failed\n")
    assert "FALLING BACK to step 20" in error


def test_doctor_says_what_is_missing(polydiff: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(doctor, "BROWSERS", ())
    monkeypatch.setattr(doctor, "ENOUGH_BYTES", 10**18)
    code, out, _ = polydiff("doctor", f"run={tmp_path / 'nothing'}", f"data={tmp_path / 'nothing.h5'}")
    assert code == 1
    for text in (
        "fail  no-such-package is not installed; pip install",
        "no Chromium: the tests",
        "GB free; set POLYDIFF_DATA",
    ):
        assert text in out
    assert "nothing: no such run" in out
    assert "nothing.h5: no such file" in out
    assert out.endswith("3 checks failed\n")


def test_doctor_knows_the_data_that_a_run_was_not_trained_on(
    polydiff: Command, moons_run: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert polydiff("data", "spiral")[0] == 0
    monkeypatch.setattr(doctor, "data_path", lambda section: data_folder / "spiral.h5")
    findings = [*doctor.run_folder(moons_run)]
    assert any(
        finding.level == "warn" and "is not the data this run was trained on" in finding.text for finding in findings
    )
    assert isinstance(findings[0], Finding)
