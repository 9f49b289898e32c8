"""``polydiff train``: one command trains, the same command goes on, and what cannot be is said in one line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from polydiff.core.training import loop
from polydiff.core.training.loop import TrainResult
from polydiff.core.training.resume import Lock

Command = Callable[..., tuple[int, str, str]]
SMALL = (
    "experiment=toy2d",
    "trainer.batch=16",
    "trainer.steps=4",
    "network.width=8",
    "network.blocks=1",
    "logger=jsonl",
)


def step(run: Path) -> int:
    return int((run / "LATEST").read_text().strip()[-8:])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_learned_variance_is_trained_resumed_and_sampled(
    polydiff: Command, refused: Callable[..., str], here: Path, data_folder: Path
) -> None:
    small = [word for word in SMALL if not word.startswith("trainer.steps")]
    hybrid = [*small, "objective=hybrid", "objective.variance.bins=null", "process=vp", "trainer.log_every=1"]
    for steps in (4, 6):
        assert polydiff("train", *hybrid, "trainer.precision=bf16", f"trainer.steps={steps}", "run=a")[0] == 0
    lines = [json.loads(line) for line in Path("a/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(0 < line["vlb"] < 100 and line["skipped"] == 0 for line in lines)
    for solver in ("ddpm-learned", "ddim"):
        assert polydiff("sample", "run=a", "n=3", f"solver={solver}", "steps=4", "guidance=2", "cond.label=0")[0] == 0
    assert polydiff("train", *SMALL, "run=b")[0] == 0
    assert "second head: train with objective=hybrid" in refused("sample", "run=b", "n=3", "solver=ddpm-learned")
    assert "unknown option 'objective.variance.stepz'" in refused(
        "train", *hybrid, "objective.variance.stepz=3", "run=c"
    )


def test_a_run_is_trained_finished_continued_and_begun_anew(polydiff: Command, here: Path, data_folder: Path) -> None:
    code, out, error = polydiff("train", *SMALL)
    run = Path("runs/toy2d")
    assert code == 0
    assert "8,000 items" in error
    assert [line for line in out.splitlines() if "polydiff" in line] == [
        f"  polydiff {verb} run={run}" for verb in ("sample", "evaluate", "report")
    ]
    assert {path.name for path in here.iterdir()} == {"runs"}  # the working directory stays, and hydra leaves nothing
    assert step(run) == 4
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["network"]["width"], config["data"]["name"], config["data"]["path"]) == (8, "moons", None)

    code, out, error = polydiff("train", *SMALL)
    assert (code, error) == (0, "")
    assert "is finished: 4 steps are done" in out

    code, _, error = polydiff("train", *[word.replace("steps=4", "steps=6") for word in SMALL])
    assert (code, step(run)) == (0, 6)
    assert "goes on from step 4" in error

    code, out, _ = polydiff("train", *SMALL, "restart=true", "optim.warmup=9")
    assert (code, step(run)) == (0, 4)
    assert "the old run is now runs/toy2d.old-1" in out
    assert step(Path("runs/toy2d.old-1")) == 6

    shutil.copy(data_folder / "moons.h5", "my moons.h5")
    code, _, error = polydiff("train", *SMALL, "run=second", f"init={run}", "data.path='my moons.h5'")
    assert code == 0
    assert "second starts from runs/toy2d (step 4)" in error
    assert yaml.safe_load(Path("second/config.yaml").read_text())["data"]["path"] == str(here / "my moons.h5")


def test_several_values_train_one_after_another(polydiff: Command, here: Path) -> None:
    code, out, _ = polydiff("train", "-m", *SMALL, "data=rings,spiral", "trainer.seed=choice(5)")
    assert code == 0
    for number, name in enumerate(("rings", "spiral"), 1):
        run = Path(f"runs/toy2d/data={name}")
        assert f"[{number}/2] {run}\n" in out
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert (config["data"]["name"], config["trainer"]["seed"], step(run)) == (name, 5, 4)


def test_several_values_are_all_checked_before_the_first_trains(refused: Command, here: Path) -> None:
    assert "unknown data 'ringz': did you mean rings" in refused("train", "-m", *SMALL, "data=moons,ringz")
    assert "optim.lr=-1.0 must be positive" in refused("train", "-m", *SMALL, "optim.lr=1e-3,-1")
    assert list(here.iterdir()) == []


def test_a_folder_of_configurations_is_used(polydiff: Command, here: Path) -> None:
    (here / "mine/experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /data: spiral\nadapter: toy2d\n"
    (here / "mine/experiment/mine.yaml").write_text(text)
    code, _, _ = polydiff("train", "--config-dir", "mine", *SMALL[1:], "experiment=mine")
    assert code == 0
    config = yaml.safe_load(Path("runs/mine/config.yaml").read_text())
    assert (config["experiment"], config["data"]["name"]) == ("mine", "spiral")


def test_cfg_prints_the_configuration_and_trains_nothing(polydiff: Command, here: Path) -> None:
    code, out, error = polydiff("train", *SMALL, "--cfg")
    assert (code, error) == (0, "")
    assert yaml.safe_load(out)["trainer"]["batch"] == 16
    assert list(here.iterdir()) == []


def test_an_interrupted_run_has_its_own_exit_code(
    polydiff: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "train", lambda config, run, init: TrainResult(run, 3, 4, 0, signal=15))
    code, out, _ = polydiff("train", *SMALL)
    assert (code, out) == (75, "")


def test_another_network_size_is_refused_by_name(refused: Command, moons_run: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in moons_run.rglob("*") if path.name != "lock")
    config = yaml.safe_load((moons_run / "config.yaml").read_text())
    same = [f"trainer.{key}={config['trainer'][key]}" for key in ("steps", "save_every", "batch", "device")]
    words = ["experiment=toy2d", "logger=jsonl", f"run={moons_run}", "network.blocks=2", *same]
    said = refused("train", *words, "network.width=33")
    assert "was trained with another configuration: network.width (32 -> 33);" in said
    assert sorted((path, path.stat().st_mtime_ns) for path in moons_run.rglob("*") if path.name != "lock") == before


def test_a_second_process_is_refused(refused: Command, moons_run: Path) -> None:
    lock = Lock(moons_run)
    try:
        assert f"another process (pid {os.getpid()}) is training this run" in refused(
            "train", "experiment=toy2d", f"run={moons_run}"
        )
        assert "another process" in refused("train", "experiment=toy2d", f"run={moons_run}", "restart=true")
    finally:
        lock.release()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=toyd"], "unknown experiment 'toyd': did you mean toy2d?"),
        (["experiment=toy2d", "optim.lrr=1"], "unknown key 'optim.lrr': did you mean optim.lr"),
        (["experiment=toy2d", "netwrk=mlp"], "unknown key 'netwrk': did you mean network"),
        (["experiment=toy2d", "sampling.solver=hun"], "unknown solver 'hun': did you mean heun"),
        (["experiment=toy2d", "sampling.grid=karas"], "unknown grid 'karas': did you mean karras"),
        (["experiment=toy2d", "sampling.steps=0"], "steps=0 must be at least 1"),
        (["experiment=toy2d", "trainer.steps=0"], "trainer.steps=0 must be a whole number of at least 1"),
        (["experiment=toy2d", "trainer.batch=-4"], "trainer.batch=-4 must be a whole number of at least 1"),
        (["experiment=toy2d", "optim.lr=0"], "optim.lr=0.0 must be positive and finite"),
        (["experiment=toy2d", "network=unet"], "unknown network 'unet': valid: mlp"),
        (["experiment=toy2d", "data=digits"], "unknown option 'data.options.flip'"),
        (["experiment=toy2d", "data.options.flipp=true"], "unknown option 'data.options.flipp'"),
        (["experiment=toy2d", "data.path=nothing.h5"], "data.path=nothing.h5: no such file"),
        (["experiment=toy2d", "data.name=mons"], "unknown data set 'mons': did you mean moons"),
        (["experiment=toy2d", "network.name=os:system"], "'os:system' is outside the packages that may be named"),
        (["experiment=toy2d", "init=nothing"], "init=nothing: no such run"),
        (["experiment=toy2d", "restart=maybe"], "restart must be true or false"),
        (["experiment=toy2d", "--conf-dir=x"], "unknown flag '--conf-dir=x': did you mean --config-dir"),
        (["experiment=toy2d", "--config-dir"], "--config-dir needs a folder"),
        (["experiment=toy2d", "optim.lr=1e-3,1e-4"], "add -m to train each"),
    ],
)
def test_a_mistake_is_one_line_and_makes_no_run(refused: Command, here: Path, words: list[str], message: str) -> None:
    assert message in refused("train", *words)
    assert not list(here.rglob("checkpoints"))


def test_a_folder_that_is_no_run_stays_untouched(refused: Command, here: Path) -> None:
    (here / "precious").mkdir()
    (here / "precious/thesis.txt").write_text("years")
    assert "run=precious exists and holds no run" in refused("train", *SMALL, "run=precious")
    assert "exists and holds no run" in refused("train", *SMALL, "run=precious", "restart=true")
    assert [path.name for path in (here / "precious").iterdir()] == ["thesis.txt"]
    assert "run=precious/thesis.txt is a file" in refused("train", *SMALL, "run=precious/thesis.txt")


def test_two_processes_train_one_run(tmp_path: Path, data_folder: Path) -> None:
    if shutil.which("torchrun") is None and not (Path(sys.executable).parent / "torchrun").exists():
        pytest.skip("torchrun is not installed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "polydiff", "train", *SMALL, "trainer.device=cpu", f"run={tmp_path / 'run'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("polydiff sample") == 1
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2
    assert step(tmp_path / "run") == 4
