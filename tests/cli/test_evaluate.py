"""``polydiff evaluate``: the numbers are the adapter's metrics of the samples that the options describe."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image

from polydiff.core.adapter import Metric
from polydiff.core.commands.evaluate import representative
from polydiff.core.run import Run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(moons_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(moons_run, tmp_path / "run")


def test_a_run_is_scored_against_its_data_with_the_conditions_of_the_held_out_items(
    polydiff: Command, run: Path
) -> None:
    code, out, error = polydiff("evaluate", f"run={run}", "n=60", "seeds=2", "seed=4", "steps=3", "guidance=1.5")
    assert (code, error) == (0, "")
    result = json.loads((run / "evaluation/metrics.json").read_text())
    expected = {"checkpoint_step": 40, "n": 60, "seeds": [4, 5], "steps": 3, "guidance": 1.5, "solver": "dpmpp-2m"}
    expected |= {"split": "test", "reference": "train", "n_reference": 8000, "n_held_out": 2000}
    assert expected.items() <= result.items()
    assert {*result["seconds"]} == {"sampling", "features", "measures"}
    assert result["seconds"]["sampling"] > 0
    assert result["seconds"]["measures"] > 0
    assert f"sampling {result['seconds']['sampling']:.1f} s, features 0.0 s, measures " in out

    trained = Run.load(run)
    train, held_out = ([*trained.dataset(split)] for split in ("train", "test"))
    labels = [int(item.cond["label"]) for item in held_out]
    asked = [labels[i] for i in representative([item.cond for item in held_out], 60)]
    assert (labels.count(0), asked.count(0)) == (962, 29)
    scores = []
    for seed in (4, 5):
        samples = trained.sample(60, {"label": asked}, steps=3, guidance=1.5, seed=seed)
        scores.append(trained.adapter.metrics(samples, train, {"held_out": held_out, "seed": seed}))
    assert {*result["metrics"]} == {*scores[0]}
    for name, entry in result["metrics"].items():
        for field in ("value", "low", "high", "real"):
            values = [getattr(score[name], field) for score in scores]
            assert entry[field] == pytest.approx(fmean(values), rel=1e-5), (name, field)
        assert [part[name]["value"] for part in result["by_seed"]] == pytest.approx(
            [s[name].value for s in scores], rel=1e-5
        )
        assert f"  {name} " in out
        assert f"{entry['value']:.4g}" in out
    assert "60 samples, dpmpp-2m on karras, 3 steps, guidance 1.5, mean of 2 seeds" in out
    assert f"wrote {run / 'evaluation/metrics.json'}" in out


def test_results_of_other_settings_are_kept_and_those_of_the_same_replaced(
    polydiff: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap = {"mean": Metric(0.5, 0.4, 0.6, 0.5, 20)}  # what is measured does not matter here
    monkeypatch.setattr("polydiff.modalities.toy2d.metrics.metrics", lambda *_: cheap)
    file, words = run / "evaluation/metrics.json", ["evaluate", f"run={run}", "n=20"]
    said = [polydiff(*words, f"steps={steps}") for steps in (1, 2, 1, 2, 3)]
    assert [code for code, *_ in said] == [0] * 5
    result = json.loads(file.read_text())
    assert (result["steps"], [entry["steps"] for entry in result["earlier"]]) == (3, [2, 1])
    assert all("metrics" in entry and "earlier" not in entry for entry in result["earlier"])
    assert "(2 earlier results of other settings are kept in it)" in said[-1][1]
    assert "earlier" not in said[0][1]
    for damage in ("[1, 2]", "{", '{"earlier": 3}', ""):
        file.write_text(damage)
        assert polydiff(*words, "steps=1")[0] == 0
        assert json.loads(file.read_text())["steps"] == 1


@pytest.mark.parametrize(("m", "n"), [(100, 7), (100, 99), (100, 100), (100, 350), (7, 3)])
def test_fewer_samples_than_items_have_the_classes_in_the_same_shares(m: int, n: int) -> None:
    classes = torch.randint(5, (m,), generator=torch.Generator().manual_seed(m + n)).square() // 4
    chosen = representative([{"label": k, "hint": torch.zeros(2)} for k in classes], n)
    assert len(chosen) == n
    if n >= m:
        assert chosen == [i % m for i in range(n)]
        return
    assert chosen == sorted({*chosen})
    counts = classes[torch.tensor(chosen)].bincount(minlength=5)
    assert (counts - classes.bincount(minlength=5) * n / m).abs().max() <= 1


def test_without_conditions_the_items_are_spread_evenly() -> None:
    assert representative([{}] * 10, 5) == [1, 3, 5, 7, 9]


def test_by_default_every_held_out_item_has_its_sample(polydiff: Command, run: Path) -> None:
    assert polydiff("evaluate", f"run={run}", "steps=1")[0] == 0
    result = json.loads((run / "evaluation/metrics.json").read_text())
    assert (result["n"], result["by_seed"]) == (2000, [])
    assert {entry["n"] for entry in result["metrics"].values()} == {2000}


def test_folders_of_files_are_compared_too(polydiff: Command, refused: Command, run: Path, tmp_path: Path) -> None:
    one, two = (tmp_path / name for name in ("one", "two"))
    for folder, seed in ((one, 0), (two, 1)):
        words = ["n=30", "steps=2", f"seed={seed}", f"out={folder}", "cond.label=[0,1]"]
        assert polydiff("sample", f"run={run}", *words)[0] == 0
    code, out, _ = polydiff("evaluate", f"samples={one}", f"reference={two}", "adapter=toy2d")
    assert code == 0
    assert f"30 files in {one} against 30 in {two}" in out
    metrics = json.loads((one / "metrics.json").read_text())["metrics"]
    items = [Run.load(run).sample(30, {"label": [0, 1]}, steps=2, seed=seed) for seed in (0, 1)]
    expected = Run.load(run).adapter.metrics(items[0], items[1], {"held_out": None})
    for name, metric in expected.items():
        assert metrics[name]["value"] == pytest.approx(metric.value, abs=1e-5), name

    (tmp_path / "empty").mkdir()
    for words, message in [
        ([f"reference={tmp_path / 'empty'}", "adapter=toy2d"], "no files that the adapter 'toy2d' reads (.csv, .npy)"),
        ([f"reference={tmp_path / 'nothing'}", "adapter=toy2d"], "no such folder"),
        ([f"reference={two}", "adapter=toy3d"], "unknown adapter 'toy3d': did you mean toy2d"),
        ([f"reference={two}"], "samples=DIR also needs reference=DIR and adapter=NAME"),
        ([f"reference={two}", "adapter=toy2d", f"run={run}"], "give either run=DIR, or samples=DIR"),
    ]:
        assert message in refused("evaluate", f"samples={one}", *words)
    (two / "sample-00003.csv").write_text("x,y\n1\n")
    assert "sample-00003.csv: not a point" in refused("evaluate", f"samples={one}", f"reference={two}", "adapter=toy2d")


def test_pictures_are_compared_whatever_their_files_are_called(polydiff: Command, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for i, ending in enumerate(("jpg", "JPG", "jpeg", "png", "tif", "gif", "bmp", "ppm") * 2):
            picture = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            picture.save(tmp_path / folder / f"{i}.{ending}")
    words = [f"samples={tmp_path / 'one'}", f"reference={tmp_path / 'two'}", "adapter=image"]
    code, out, _ = polydiff("evaluate", *words)
    assert code == 0 and "16 files in" in out and "against 16 in" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["n=0"], "n=0 must be at least 1"),
        ([f"out={__file__}"], "choose another folder"),
        (["seeds=0"], "seeds=0 must be at least 1"),
        (["steps=0"], "steps=0 must be at least 1"),
        (["solver=huen"], "unknown solver 'huen': did you mean heun"),
        (["split=tset"], "no items in split 'tset'; it has: test (2000), train (8000)"),
        (["data=nothing.h5"], "nothing.h5"),
        (["n=1", "steps=1"], "at least 2"),
        (["n=1000001"], "n=1000001 must be at most 1000000 for samples of this size"),
        (["inception=on"], "inception=on must be auto or off"),
        (["inception_weights=nothing.pth"], "inception_weights=nothing.pth: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(refused: Command, run: Path, words: list[str], message: str) -> None:
    assert message in refused("evaluate", f"run={run}", *words)
    assert not (run / "evaluation/metrics.json").exists()
