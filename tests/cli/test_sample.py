"""``polydiff sample``: files an independent program can read, a record beside them, and nothing overwritten."""

import ctypes
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from polydiff.core.progress import progress
from polydiff.core.run import Run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(moons_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(moons_run, tmp_path / "run")


def test_samples_are_files_with_a_record(polydiff: Command, run: Path) -> None:
    words = ["n=5", "seed=3", "solver=heun", "steps=6", "grid=uniform", "guidance=1.5", "cond.label=[upper,1,null]"]
    code, out, error = polydiff("sample", f"run={run}", *words)
    folder = run / "samples/heun-6-seed3"
    assert (code, error) == (0, "")
    assert f"wrote {folder}/" in out
    files = [f"sample-{k:05d}.csv" for k in range(5)]
    assert sorted(path.name for path in folder.iterdir()) == [*files, "samples.json"]
    record = json.loads((folder / "samples.json").read_text())
    assert [entry["file"] for entry in record["samples"]] == files
    upper, lower = ({"label": {"index": k, "name": name}} for k, name in enumerate(("upper", "lower")))
    assert [entry["cond"] for entry in record["samples"]] == [upper, lower, {}, upper, lower]
    expected = {
        "seed": 3,
        "solver": "heun",
        "steps": 6,
        "grid": "uniform",
        "guidance": 1.5,
        "checkpoint_step": 40,
        "n": 5,
    }
    assert expected.items() <= record.items()
    assert record["cond"] == {"label": ["upper", 1, None]}
    items = Run.load(run).sample(5, {"label": [0, 1, None]}, None, "heun", 6, "uniform", 1.5, seed=3)
    for file, item in zip(files, items, strict=True):
        point = np.loadtxt(folder / file, delimiter=",", skiprows=1, dtype=np.float32)
        assert torch.equal(torch.from_numpy(point), torch.as_tensor(item.x))


def test_the_same_command_rewrites_and_another_takes_a_new_name(polydiff: Command, run: Path) -> None:
    def names() -> list[str]:
        return sorted(path.name for path in (run / "samples").iterdir())

    assert polydiff("sample", f"run={run}", "n=3", "steps=2")[0] == 0
    first = {path.name: path.read_bytes() for path in (run / "samples/dpmpp-2m-2-seed0").iterdir()}
    assert polydiff("sample", f"run={run}", "n=3", "steps=2")[0] == 0
    assert names() == ["dpmpp-2m-2-seed0"]
    assert polydiff("sample", f"run={run}", "n=2", "steps=2", "cond.label=1")[0] == 0
    assert polydiff("sample", f"run={run}", "n=2", "steps=2", "cond.label=1")[0] == 0
    assert names() == ["dpmpp-2m-2-seed0", "dpmpp-2m-2-seed0-2"]
    assert {path.name: path.read_bytes() for path in (run / "samples/dpmpp-2m-2-seed0").iterdir()} == first


def test_out_names_the_folder_and_never_takes_one_that_holds_something_else(
    polydiff: Command, refused: Command, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "my samples"
    words = ["sample", f"run={run}", "n=2", "steps=2", f"out={out}"]
    out.mkdir()
    assert polydiff(*words)[0] == 0
    assert polydiff(*words)[0] == 0
    before = (out / "samples.json").read_bytes()
    assert "holds samples of other settings: choose another folder" in refused(*words, "seed=1")
    assert (out / "samples.json").read_bytes() == before
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years")
    said = refused(*words[:-1], f"out={tmp_path / 'precious'}")
    assert "exists and has no samples.json, so it is no folder of samples" in said
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["thesis.txt"]
    assert "is a file" in refused(*words[:-1], f"out={tmp_path / 'precious/thesis.txt'}")


def test_other_formats_are_the_adapters(polydiff: Command, refused: Command, run: Path) -> None:
    assert polydiff("sample", f"run={run}", "n=1", "steps=2", "format=npy")[0] == 0
    assert np.load(run / "samples/dpmpp-2m-2-seed0/sample-00000.npy").shape == (2,)
    assert "unknown format 'cvs': did you mean csv" in refused("sample", f"run={run}", "format=cvs")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["n=-1"], "n=-1 must be at least 1"),
        (["n=0"], "n=0 must be at least 1"),
        (["n=1000001"], "n=1000001 must be at most 1000000 for samples of this size"),
        (["steps=0"], "steps=0 must be at least 1"),
        (["batch=0"], "batch=0 must be at least 1"),
        (["deterministic_batch=0"], "deterministic_batch=0 must be at least 1"),
        (["steps=1000000000"], "steps=1000000000 must be at most"),
        (["grid=ddpm-leading", "steps=2000"], "a discrete chain of 1000 has no more"),
        (["solver=huen"], "unknown solver 'huen': did you mean heun"),
        (["grid=karas"], "unknown grid 'karas': did you mean karras"),
        (["stepz=3"], "unknown option 'stepz': did you mean steps"),
        (["cond.label=12"], "cond.label=12: valid are the indices 0 to 1 and the names upper, lower"),
        (["cond.label=middle"], "cond.label=middle: valid are"),
        (["cond.lable=1"], "unknown condition 'lable': did you mean label"),
        (["size.height=3"], "unknown size 'size.height'"),
        (["guidance=3"], "guidance=3.0 needs a condition"),
        (["guidance=strong"], "guidance must be a number"),
        (["device=abacus"], "device=abacus cannot be used here"),
        (["out=/proc/polydiff/samples"], "/proc/polydiff: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(refused: Command, run: Path, words: list[str], message: str) -> None:
    assert message in refused("sample", f"run={run}", *words)
    assert not (run / "samples").exists() or not list((run / "samples").iterdir())


def test_what_lies_beside_samples_is_kept(polydiff: Command, refused: Command, run: Path) -> None:
    words, samples = (f"run={run}", "n=1", "steps=1"), run / "samples"
    for _ in range(2):  # the same samples once more take the same folder
        assert polydiff("sample", *words)[0] == 0
    first = samples / "dpmpp-2m-1-seed0"
    (first / "metrics.json").write_text("{}")
    assert polydiff("sample", *words)[0] == 0
    assert (first / "metrics.json").read_text() == "{}"
    assert sorted(path.name for path in samples.iterdir()) == [first.name, f"{first.name}-2"]
    assert "also holds metrics.json" in refused("sample", *words, f"out={first}")


def test_the_draft_of_a_killed_process_goes_and_that_of_a_living_one_stays(polydiff: Command, run: Path) -> None:
    samples = run / "samples"
    dead, young, living, other = (
        samples / name for name in (".ddim-1-seed0.dead0000", ".ddim-1-seed0.young000", ".ddim-1-seed0.living00", ".x")
    )
    for draft in (dead, young, living, other):
        draft.mkdir(parents=True)
        (draft / "sample-00000.csv").write_text("x,y")
        if draft != young:
            os.utime(draft, (1e9, 1e9))
    descriptor = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert polydiff("sample", f"run={run}", "n=1", "steps=1", "solver=ddim")[0] == 0
    finally:
        os.close(descriptor)
    assert {*samples.iterdir()} == {samples / "ddim-1-seed0", young, living, other}


def test_long_work_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("polydiff.core.progress.time.monotonic", lambda: float(next(clock)))
    with progress("sample", 400) as advance:
        for _ in range(4):
            advance(100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["sample 200/400  10.0 items/s  20 s left", "sample 400/400  10.0 items/s  0 s left"]


def test_a_batch_at_a_time_is_counted(moons_run: Path) -> None:
    counted: list[int] = []
    Run.load(moons_run).sample(7, {"label": [0, None]}, steps=1, batch=3, advance=counted.append)
    assert counted == [3, 1, 3]


def test_no_run_is_one_line(refused: Command, tmp_path: Path) -> None:
    assert "no such run; train one with: polydiff train" in refused("sample", f"run={tmp_path / 'nothing'}")
    (tmp_path / "empty").mkdir()
    assert "no checkpoint in this folder" in refused("sample", f"run={tmp_path / 'empty'}")


def test_damaged_checkpoints_are_one_line_when_none_is_left(polydiff: Command, refused: Command, run: Path) -> None:
    newest, older = (run / "checkpoints" / f"step-{step:08d}" for step in (40, 20))
    (newest / "ema.safetensors").write_bytes((newest / "ema.safetensors").read_bytes()[:-1])
    code, out, error = polydiff("sample", f"run={run}", "n=1", "steps=1")
    assert code == 0
    assert "1 samples of step 20" in out
    assert error.startswith("polydiff: warning: FALLING BACK to step 20: ")
    assert error.count("\n") == 1
    (older / "manifest.json").write_text("{}")
    assert "none of the 2 checkpoints is valid" in refused("sample", f"run={run}")


def test_a_folder_without_permission_is_one_line(run: Path) -> None:
    run.chmod(0o555)
    command = [sys.executable, "-m", "polydiff", "sample", f"run={run}", "n=1", "steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=obey_permissions)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"polydiff sample: {run / 'samples'}: Permission denied\n"


def obey_permissions() -> None:
    """Give up root's right to write anywhere, before the command starts."""
    pr_capbset_drop, cap_dac_override = 24, 1
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0) == 0


def test_a_task_is_recorded_with_what_it_was_given(polydiff: Command, refused: Command, run: Path) -> None:
    words = [f"run={run}", "n=3", "steps=4", "task=inpaint", "task.known=[0.5,null]", "task.method=repaint"]
    code, out, error = polydiff("sample", *words)
    folder = run / "samples/inpaint-dpmpp-2m-4-seed0"
    assert (code, error) == (0, "")
    assert f"wrote {folder}/" in out
    record = json.loads((folder / "samples.json").read_text())
    options = {"method": "repaint", "noise": 0.0, "zeta": None, "repeats": 4, "known": [0.5, None]}
    assert record["task"] == {"name": "inpaint", "input": None, "options": options}
    files = [f"sample-{k:05d}.csv" for k in range(3)]
    entries = [
        {"file": file, "index": k, "cond": {}, "given": "given/sample-00000.csv", "task": {}}
        for k, file in enumerate(files)
    ]
    assert record["samples"] == entries
    assert [path.name for path in (folder / "given").iterdir()] == ["sample-00000.csv"]  # all were given the same
    points = [np.loadtxt(folder / name, delimiter=",", skiprows=1) for name in ("given/sample-00000.csv", *files)]
    assert [point[0] for point in points] == [0.5] * 4
    assert points[0][1] == 0
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert polydiff("sample", *words)[0] == 0  # again
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    assert polydiff("sample", *words, "task.repeats=1")[0] == 0
    folders = {path.name for path in (run / "samples").iterdir()}
    assert folders == {folder.name, f"{folder.name}-2"}
    (folder / "given/mine.txt").write_text("x")
    assert "holds samples of other settings" in refused("sample", *words, "seed=1", f"out={folder}")


def test_an_input_is_a_file_or_a_folder(polydiff: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "points").mkdir()
    for name, x in (("a", 0.25), ("b", -0.5)):
        (tmp_path / f"points/{name}.csv").write_text(f"x,y\n{x},1\n")
    for given, expected in ((tmp_path / "points", [0.25, -0.5, 0.25]), (tmp_path / "points/b.csv", [-0.5] * 3)):
        words = ["n=3", "steps=2", "task=inpaint", f"input={given}", f"out={tmp_path / 'out' / given.name}"]
        assert polydiff("sample", f"run={run}", *words)[0] == 0
        folder = tmp_path / "out" / given.name
        points = [np.loadtxt(folder / f"sample-{k:05d}.csv", delimiter=",", skiprows=1) for k in range(3)]
        assert [point[0] for point in points] == expected
        assert len(list((folder / "given").iterdir())) == len(set(expected))
        assert json.loads((folder / "samples.json").read_text())["task"]["input"] == str(given)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=inpant"], "unknown task of the adapter 'toy2d' 'inpant': did you mean inpaint"),
        (["task=inpaint"], "task=inpaint needs something to work on: add input=FILE or input=FOLDER"),
        (["task=inpaint", "input=nowhere.csv"], "input=nowhere.csv: no such file or folder"),
        (["task=inpaint", "input=/dev/null"], "/dev/null"),
        (["task=inpaint", "task.methd=dps"], "unknown option 'task.methd': did you mean task.method"),
        (["task=inpaint", "task.repeats=many"], "repeats must be a whole number"),
        (["task=inpaint", "task.known=[1,2]"], "task.known must be [x,null] or [null,y]"),
        (["task=inpaint", "task.known=[0.5,null]", "task.method=none"], "unknown task.method 'none'"),
        (["task=inpaint", "task.known=[0.5,null]", "task.noise=-1"], "task.noise=-1.0 must be 0 or more"),
        (["task.known=[0.5,null]"], "input= and task.<key>= say how a task works: add task=NAME"),
        (["input=a.csv"], "input= and task.<key>= say how a task works: add task=NAME"),
        (["task=null", "input=a.csv"], "add task=NAME"),
        (["task.=3"], "unknown option 'task.'"),
    ],
)
def test_a_mistake_about_a_task_is_one_line(refused: Command, run: Path, words: list[str], message: str) -> None:
    assert message in refused("sample", f"run={run}", "n=2", "steps=2", *words)
    assert not (run / "samples").exists() or not list((run / "samples").iterdir())
