"""The measures put together: on the digits' classifier, and on points in the plane, real and damaged."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from polydiff.core.adapter import Item, Metric, load
from polydiff.core.errors import DataError
from polydiff.core.evaluation.bootstrap import interval
from polydiff.core.evaluation.quality import matched, originality, quality, spacing
from polydiff.data import prepare


def read(adapter: str, path: Path, split: str) -> list[Item]:
    dataset = load(adapter).dataset(path, split)
    return [dataset[i] for i in range(len(dataset))]


def known(metric: Metric) -> tuple[float, float, float, float]:
    """Low, value, high, real of a metric that has them all."""
    assert metric.low is not None
    assert metric.high is not None
    assert metric.real is not None
    return metric.low, metric.value, metric.high, metric.real


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Where the classifier of the digits is kept."""
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def digits(store):
    """The splits, and a function (samples, **options) -> metrics with one stored classifier."""
    path = prepare("digits", folder=store)
    train, test = read("image", path, "train"), read("image", path, "test")

    def score(samples: list[Item], **options) -> dict[str, Metric]:
        given = {"held_out": test, "facts": {}, "store": store, "seed": 0, **options}
        return load("image").metrics(samples, train, given)

    return train, test, score


def test_real_digits_score_as_real(digits):
    _, test, score = digits
    result = score(test)
    assert result["class_accuracy"].value >= 0.98
    assert set(result) == {
        *("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage"),
        *("class_accuracy", "nearest_train_ratio", "near_copies"),
    }
    for name, metric in result.items():
        low, value, high, real = known(metric)
        assert value == pytest.approx(real), name
        assert low <= value <= high, name
        assert metric.n == 360
    assert result["recall"].value > 0.85
    assert result["precision"].value > 0.85
    low, value, *_ = known(result["frechet_distance"])
    assert low > 0.15 * value  # the classes are strata: with drawn classes it would reach 0


def test_damage_is_seen_in_the_right_measure(digits):
    train, test, score = digits
    real = score(test)

    def damaged(change) -> dict[str, Metric]:
        return score([replace(item, x=change(item.x)) for item in test])

    kernel = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))[None, None]
    blurred = damaged(lambda x: F.conv2d(F.pad(x[None], (1, 1, 1, 1), mode="replicate"), kernel)[0])
    assert blurred["frechet_distance"].value > 5 * real["frechet_distance"].value
    assert blurred["recall"].value < real["recall"].value - 0.15

    generator = torch.Generator().manual_seed(0)
    noisy = [damaged(lambda x, sd=sd: x + sd * torch.randn(x.shape, generator=generator)) for sd in (0.1, 0.4)]
    distances = [m["frechet_distance"].value for m in (real, *noisy)]
    assert distances == sorted(distances)
    assert distances[1] < 1.6 * distances[0]
    assert distances[2] > 4 * distances[0]
    assert noisy[1]["precision"].value < 0.7 * real["precision"].value

    by_class = {int(item.cond["label"]): item for item in train}
    collapsed = score([replace(by_class[int(item.cond["label"])], cond=item.cond) for item in test])
    assert collapsed["recall"].value < 0.1
    assert collapsed["precision"].value == 1.0
    assert collapsed["near_copies"].value == 1.0
    assert collapsed["nearest_train_ratio"].value < 1e-3

    wrong = [replace(item, cond={"label": (item.cond["label"] + 1) % 10}) for item in test]
    assert score(wrong)["class_accuracy"].value < 0.02


def test_without_classes(digits):
    """No label to train on: principal components. No label asked for: no accuracy."""
    _, test, score = digits
    plain = [replace(item, cond={}) for item in test]
    assert "class_accuracy" not in score(plain)
    bare = load("image").metrics(plain[:100], plain[100:], {"held_out": None, "store": None, "seed": 0})
    assert "class_accuracy" not in bare
    assert bare["frechet_distance"].real is None
    assert bare["recall"].value > 0.7


def test_bad_pictures(digits):
    _, test, score = digits
    with pytest.raises(DataError, match="at least 6 samples"):
        score(test[:3])
    with pytest.raises(DataError, match="size"):
        score([Item(torch.zeros(1, 16, 16))] * 10)
    with pytest.raises(DataError, match="not finite"):
        score([replace(test[0], x=test[0].x * torch.nan), *test[:10]])


def test_real_value_has_the_classes_of_the_samples():
    available = torch.tensor([0] * 30 + [1] * 30 + [2] * 5)
    asked = torch.tensor([1] * 12 + [2] * 9 + [0] * 3)
    chosen = matched(asked, available, 24, 65)
    assert available[chosen].bincount().tolist() == [3, 12, 5]
    assert len(chosen.unique()) == 20
    assert len(matched(None, available, 24, 65)) == 24
    assert torch.equal(matched(asked, available, 24, 65, seed=3), matched(asked, available, 24, 65, seed=3))


def test_strata_keep_their_sizes():
    groups, seen = torch.tensor([2, 0, 0, 1, 2, 2, 2]), []

    def statistic(index: torch.Tensor) -> float:
        seen.append(groups[index].bincount().tolist())
        return float(index.sum())

    low, high = interval(statistic, 7, strata=groups, resamples=50)
    assert seen == [[2, 1, 4]] * 50
    assert low < high


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    path = prepare("moons", folder=tmp_path_factory.mktemp("moons"))
    return read("toy2d", path, "train"), read("toy2d", path, "test")


def test_intervals_of_distances_keep_the_classes_that_were_asked_for():
    """Within a class all samples are equal: only other shares of the classes could move the distances."""
    reference = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(40) % 2
    samples = classes[:, None] * torch.ones(3) * 2.0
    for name in ("frechet_distance", "kernel_distance"):
        apart, mixed = quality(samples, reference, classes=classes)[name], quality(samples, reference)[name]
        spread = [(m.high or 0.0) - (m.low or 0.0) for m in (apart, mixed)]
        assert spread[0] < 0.05 * spread[1], name


def test_points(moons):
    train, test = moons[0][::5], moons[1][::4]
    metrics = load("toy2d").metrics
    options = {"held_out": moons[1], "facts": {}, "store": None, "seed": 0}
    real = metrics(test, train, options)
    assert set(real) == {"sliced_wasserstein", "energy_distance", "outliers", "class_accuracy"}
    for name, metric in real.items():
        low, value, high, _ = known(metric)
        assert low <= value <= high, name
        assert metric.n == len(test)
    assert real["outliers"].value < 0.04
    assert real["class_accuracy"].value > 0.9
    _, value, _, floor = known(real["sliced_wasserstein"])
    assert value < 3 * floor
    assert abs(real["energy_distance"].value) < 0.02

    moved = metrics([replace(item, x=item.x + 0.3) for item in test], train, options)
    assert moved["sliced_wasserstein"].value == pytest.approx(0.3, abs=0.1)  # |v| / sqrt(2)
    assert known(moved["energy_distance"])[0] > known(real["energy_distance"])[2]
    broken = metrics([replace(i, x=5 + i.x, cond={"label": 1 - i.cond["label"]}) for i in test], train, options)
    assert broken["outliers"].value == 1.0
    swapped = metrics([replace(i, cond={"label": 1 - i.cond["label"]}) for i in test], train, options)
    assert swapped["class_accuracy"].value < 0.1
    unlabelled = metrics([replace(i, cond={}) for i in test], train, {**options, "held_out": None})
    assert set(unlabelled) == {"sliced_wasserstein", "energy_distance", "outliers"}
    assert unlabelled["outliers"].real is None


def test_the_bar_passes_real_digits_and_fails_damaged_ones(digits, capsys, monkeypatch):
    """The judgement of ``tests/bars/digits_quality.py`` on samples whose worth is known."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "bars")
    bar = importlib.import_module("digits_quality")
    _, test, score = digits
    generator = torch.Generator().manual_seed(0)
    good = score(test)
    assert bar.judge({1.0: [good, good], 1.5: [good]})
    assert "MISSED" not in capsys.readouterr().out
    bad = score([replace(item, x=item.x + 0.4 * torch.randn(item.x.shape, generator=generator)) for item in test])
    assert not bar.judge({1.0: [bad], 1.5: [good]})
    missed = [line for line in capsys.readouterr().out.splitlines() if "MISSED" in line]
    assert any("Frechet distance" in line for line in missed)
    assert not any("recall" in line for line in missed)  # noise hides in recall: one bar alone would not do
    missing = {**good, "class_accuracy": good["class_accuracy"]._replace(value=float("nan"))}
    assert not bar.judge({1.0: [good], 1.5: [missing]})
    assert "guidance 1.5, intended class: nan" in capsys.readouterr().out


def test_the_bars_of_mnist_and_of_sampling_cost_judge(digits, capsys, monkeypatch):
    """Their judgements on scores whose worth is known; digits stand in for MNIST, whose scale they share."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "bars")
    mnist, cost, shared = (importlib.import_module(name) for name in ("mnist_quality", "sampling_cost", "_bars"))
    _, test, score = digits
    good = score(test)
    good["class_accuracy"] = good["class_accuracy"]._replace(real=0.995, value=0.985)
    assert shared.judge(mnist.bars(1.0), {1.0: [good]})
    mnist.show(good)
    assert "class_accuracy 0.985" in capsys.readouterr().out
    for name, change in {"class_accuracy": {"value": 0.97}, "frechet_distance": {"value": 100.0}}.items():
        assert not shared.judge(mnist.bars(1.0), {1.0: [{**good, name: good[name]._replace(**change)}]})
    near, far = Metric(1.0, 0.9, 1.2), Metric(1.3, 1.2, 1.4)
    assert cost.judge("cpu", {10: far, 20: near, 35: near})
    assert cost.judge("cpu", {10: near, 35: near._replace(value=1.1)})
    assert not cost.judge("cpu", {10: near, 35: far})
    assert not cost.judge("cpu", {10: near, 20: near._replace(value=float("nan")), 35: near})


def test_a_bar_draws_the_classes_of_the_test_split(moons_run, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "bars")
    shared = importlib.import_module("_bars")
    model = shared.trained_run(str(moons_run))
    train, test = shared.splits(model)
    assert (len(train), len(test)) == (8000, 2000)
    samples = shared.draw(model, 50, seed=1, steps=1)
    share = sum(int(item.cond["label"]) for item in test) / 2000
    assert sum(int(item.cond["label"]) for item in samples) == pytest.approx(50 * share, abs=1)
    assert shared.score(model, samples)["outliers"].n == 50


def test_what_is_known_of_real_pictures_is_kept_and_used(digits, store, tmp_path, monkeypatch):
    _, test, score = digits
    score(test[:40])
    for file in store.glob("classifier-*"):
        shutil.copy(file, tmp_path)
    first = score(test[:40], store=tmp_path)
    assert len(list(tmp_path.glob("reference-*.safetensors"))) == 1
    seconds: dict[str, float] = {}
    with monkeypatch.context() as patch:
        patch.setattr("polydiff.modalities.image.metrics._real", lambda *_: pytest.fail("computed again"))
        patch.setattr("polydiff.core.evaluation.features.train", lambda *_, **__: pytest.fail("trained again"))
        assert score(test[:40], store=tmp_path, seconds=seconds) == first
    assert seconds["features"] > 0
    score(test[:40], store=tmp_path, held_out=test[:100])
    assert len(list(tmp_path.glob("reference-*.safetensors"))) == 2


def test_spacing_is_what_originality_finds_by_itself():
    generator = torch.Generator().manual_seed(0)
    train, fresh, x = (torch.randn(n, 2, 3, generator=generator) for n in (40, 20, 10))
    within, near = spacing(train, fresh)
    assert originality(x, train, fresh, known=(within, near)) == originality(x, train, fresh)
    far = torch.cdist(train.flatten(1).double(), train.flatten(1).double()).fill_diagonal_(torch.inf)
    torch.testing.assert_close(within, far.min(1).values)
    torch.testing.assert_close(near, torch.cdist(fresh.flatten(1).double(), train.flatten(1).double()).min(1).values)
    assert torch.equal(*spacing(train))
