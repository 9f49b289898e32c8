"""The examples run as they stand, shorter."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


def run(root: Path, name: str, argument: object, folder: Path, *more: str) -> str:
    command = [sys.executable, str(root / "examples" / name), str(argument), *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_toy2d_learns_where_the_points_are(root: Path, tmp_path: Path) -> None:
    lines = dict(
        line.split() for line in run(root, "toy2d.py", 250, tmp_path).splitlines() if not line.startswith("step")
    )
    assert float(lines["sliced_wasserstein"]) < 0.15  # 0.65 for the noise it starts from
    assert float(lines["class_accuracy"]) > 0.9
    assert list(tmp_path.iterdir()) == []


def test_rotations_find_their_modes(root: Path, tmp_path: Path) -> None:
    lines = run(root, "rotations.py", 300, tmp_path).splitlines()
    (*real, _, spread), (*drawn, _, found) = ([*map(float, line.replace("spread", "0").split()[1:])] for line in lines)
    assert max(abs(a - b) for a, b in zip(real, drawn, strict=True)) < 0.12
    assert float(found) < 4 * float(spread)  # 1.6 for uniform rotations
    assert [path.name for path in tmp_path.iterdir()] == ["rotations.png"]


def test_image_writes_a_hundred_digits(root: Path, tmp_path: Path) -> None:
    paths = run(root, "image.py", 2, tmp_path).splitlines()[-100:]
    assert len({*paths}) == 100
    for path in paths:
        with Image.open(tmp_path / path) as digit:
            assert (digit.size, digit.mode) == ((8, 8), "L")


@pytest.mark.slow
def test_image_learns_digits(root: Path, tmp_path: Path) -> None:
    from polydiff import data
    from polydiff.core.adapter import Item, load
    from polydiff.core.evaluation.classifier import classify
    from polydiff.core.evaluation.features import obtain, stack

    run(root, "image.py", 1500, tmp_path)
    adapter = load("image")
    codec = adapter.codec({})
    train = [*adapter.dataset(data.locate("digits"), "train")]
    samples = [Item(codec.encode(codec.read(path))) for path in sorted((tmp_path / "digits").iterdir())]
    seen = classify(obtain(None, train)[0], stack(samples))
    assert sum(int(label) == k % 10 for k, label in enumerate(seen)) >= 90


def test_likelihood_of_held_out_digits_is_better_than_that_of_noise(root: Path, tmp_path: Path) -> None:
    train = ["experiment=image-digits", "trainer.steps=60", f"run={tmp_path}/run", "trainer.preview_every=1000"]
    subprocess.run([sys.executable, "-m", "polydiff", "train", *train], check=True, capture_output=True)
    lines = dict(line.split() for line in run(root, "likelihood.py", f"{tmp_path}/run", tmp_path, "4").splitlines())
    assert 4 < float(lines["bits_per_dim"]) < 8  # 8 for levels drawn evenly; 4.3 after the whole training
    assert 20 < int(lines["evaluations"]) < 500
    assert float(lines["round_trip"]) < 0.01
