"""The classifier behind the features: what it accepts, how it is stored, that its features see what they should."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polydiff.core.adapter import Item
from polydiff.core.errors import DataError
from polydiff.core.evaluation import features
from polydiff.core.evaluation.classifier import FeatureClassifier, Settings, _warp, classify, extract
from polydiff.core.evaluation.features import digest, labels, obtain, principal, remembered, stack

TINY = Settings(steps=20, channels=8, features=8, batch=32)


def clusters(n: int, shape: tuple[int, ...] = (3, 9), seed: int = 0) -> list[Item]:
    """Items of three classes, each around its own mean."""
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(3, *shape, generator=torch.Generator().manual_seed(99))
    return [
        Item(means[i % 3] + torch.randn(*shape, generator=generator), cond={"label": torch.tensor(i % 3)}, id=i)
        for i in range(n)
    ]


@pytest.mark.parametrize("shape", [(6,), (2, 17), (1, 8, 8), (3, 9, 20), (1, 5, 8, 12)])
def test_every_number_of_axes_learns(shape: tuple[int, ...]):
    train, held_out = clusters(120, shape), clusters(60, shape, seed=1)
    settings = Settings(steps=80, channels=8, features=8, batch=32, warp=0.02, shift=0.1)
    model, info = obtain(None, train, held_out, settings=settings)
    assert info["accuracy"] > 0.9
    features = extract(model, stack(train))
    assert features.shape == (120, 8)
    assert float(features.var(0).mean()) == pytest.approx(1, rel=1e-4)


def test_equal_seeds_give_equal_bits_and_leave_the_global_stream_alone():
    before = torch.random.get_rng_state()
    one, two, other = (obtain(None, clusters(90), seed=seed, settings=TINY)[1]["weights_sha256"] for seed in (0, 0, 1))
    assert one == two != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_stored_once_then_loaded(tmp_path: Path, monkeypatch):
    store, train, held_out = tmp_path / "new" / "folder", clusters(90), clusters(30, seed=1)
    model, info = obtain(store, train, held_out, settings=TINY)
    files = sorted(p.suffix for p in store.iterdir())
    assert files == [".json", ".safetensors"]
    assert json.loads(next(store.glob("*.json")).read_text()) == info

    monkeypatch.setattr("polydiff.core.evaluation.features.train", None)  # a second training would fail
    again, second = obtain(store, train, held_out, settings=TINY)
    assert second == info
    assert torch.equal(extract(model, stack(held_out)), extract(again, stack(held_out)))
    _, other = obtain(store, train, clusters(20, seed=5), settings=TINY)  # same weights, other held-out items
    assert other["n_held_out"] == 20
    assert other["weights_sha256"] == info["weights_sha256"]


@pytest.mark.parametrize("change", ["data", "label", "seed", "settings", "version"])
def test_anything_else_is_trained_anew(tmp_path: Path, monkeypatch, change: str):
    train, seed, settings = clusters(90), 0, TINY
    obtain(tmp_path, train, seed=seed, settings=settings)
    if change == "data":
        train[4] = Item(stack(train[4:5])[0] + 1e-3, cond=train[4].cond)
    elif change == "label":
        train[4] = Item(train[4].x, cond={"label": torch.tensor(0)})
    elif change == "seed":
        seed = 1
    elif change == "settings":
        settings = replace(TINY, steps=21)
    else:
        monkeypatch.setattr("polydiff.core.evaluation.features.VERSION", 0)
    obtain(tmp_path, train, seed=seed, settings=settings)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no json", "bad json", "list json"])
def test_altered_store_is_trained_anew_with_a_warning(tmp_path: Path, caplog, damage: str):
    train, held_out = clusters(90), clusters(30, seed=1)
    _, info = obtain(tmp_path, train, held_out, settings=TINY)
    weights, facts = next(tmp_path.glob("*.safetensors")), next(tmp_path.glob("*.json"))
    content = bytearray(weights.read_bytes())
    if damage == "flip":
        content[-100] ^= 1
        weights.write_bytes(content)
    elif damage in ("truncate", "empty"):
        weights.write_bytes(content[: len(content) // 2 if damage == "truncate" else 0])
    elif damage == "no json":
        facts.unlink()
    else:
        facts.write_text("{" if damage == "bad json" else "[]")
    with caplog.at_level(logging.WARNING):
        _, again = obtain(tmp_path, train, held_out, settings=TINY)
    assert "training it anew" in caplog.text
    assert again == info
    caplog.clear()
    obtain(tmp_path, train, held_out, settings=TINY)
    assert caplog.text == ""


def test_a_store_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    model, info = obtain(blocked, clusters(90), clusters(30, seed=1), settings=TINY)
    assert "cannot be stored" in caplog.text
    assert info["accuracy"] > 0.8
    assert not model.training


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch, caplog):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    obtain(tmp_path, clusters(90), settings=TINY)
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def strides(axes: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(torch.empty(axes, device="meta").stride())


def test_augmentation_moves_in_every_axis_and_by_the_stated_amount():
    generator = torch.Generator().manual_seed(0)
    for axes in ((40,), (40, 12), (6, 40, 9)):
        ramps = torch.meshgrid(*(torch.arange(a, dtype=torch.float32) for a in axes), indexing="ij")
        x = torch.stack(ramps).expand(300, -1, *axes)
        same = _warp(x, Settings(warp=0.0, shift=0.0), generator)
        assert torch.allclose(same, x, atol=1e-4)
        moved = _warp(x, Settings(warp=0.0, shift=0.5), generator) - x
        middle = moved.flatten(2)[:, :, int(torch.tensor([a // 2 for a in axes]) @ strides(axes))]
        assert torch.allclose(middle.std(0), torch.full((len(axes),), 0.5), rtol=0.15)


def test_principal_components_are_scaled_projections():
    x = torch.randn(200, 3, 10, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 10)
    project = principal(x, 5)
    features = project(x)
    assert features.shape == (200, 5)
    cov = features.T.cov()
    assert torch.allclose(cov - cov.diag().diag(), torch.zeros(5, 5, dtype=torch.float64), atol=1e-9)
    assert float(features.var(0).mean()) == pytest.approx(1)
    whole = principal(x, 64)(x)
    assert whole.shape == (200, 30)
    distances, direct = torch.pdist(whole), torch.pdist(x.flatten(1).double())
    assert torch.allclose(distances / distances[0], direct / direct[0])


def test_bad_items():
    with pytest.raises(DataError, match="no items"):
        stack([])
    with pytest.raises(DataError, match=r"\(2,\).*\(3,\)"):
        stack([Item(torch.zeros(2)), Item(torch.zeros(3))])
    with pytest.raises(DataError, match="one shape"):
        stack([Item({"a": torch.zeros(2)})])
    with pytest.raises(DataError, match=r"item 1 \('b'\)"):
        stack([Item(torch.zeros(2), id="a"), Item(torch.tensor([0.0, torch.inf]), id="b")])
    with pytest.raises(DataError, match="'label' on every item"):
        obtain(None, [*clusters(9), Item(torch.zeros(3, 9))])
    assert labels([*clusters(2), Item(torch.zeros(3, 9))]) is None
    with pytest.raises(DataError, match="up to 3 axes"):
        FeatureClassifier((1, 2, 2, 2, 2), 3, TINY)


@pytest.mark.slow
def test_digits_accuracy_over_seeds(tmp_path: Path):
    from polydiff.core.adapter import load
    from polydiff.data import prepare

    path = prepare("digits", folder=tmp_path)
    train, test = ([d[i] for i in range(len(d))] for d in (load("image").dataset(path, s) for s in ("train", "test")))
    accuracies = [obtain(None, train, test, seed=seed)[1]["accuracy"] for seed in range(5)]
    assert min(accuracies) >= 0.98
    model, _ = obtain(None, train, test)
    truth = labels(train)
    assert truth is not None
    assert float((classify(model, stack(train)) == truth).float().mean()) > 0.99


def test_settings_suit_the_size_and_leave_small_items_as_they_were():
    assert Settings.suited((1, 8, 8)) == Settings.suited((5,)) == Settings()
    assert [Settings.suited(shape).steps for shape in [(1, 28, 28), (3, 32, 32), (3, 512, 512)]] == [2800, 3200, 6400]
    assert Settings.suited((3, 32, 32), mirror=True, steps=7) == Settings(mirror=True, steps=7)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 40), (2, 1000), (1, 20, 20, 20), (1, 3, 900)])
def test_a_large_item_costs_what_a_small_one_does(shape):
    model = FeatureClassifier(shape, 3, TINY)
    first = model.body[0](torch.zeros(1, *shape))
    assert first[0, 0].numel() <= 400
    assert model(torch.zeros(2, *shape)).shape == (2, 3)


def test_half_of_the_items_are_mirrored_where_that_is_asked_for():
    x = torch.arange(6.0).expand(200, 1, 6, 6)
    still = Settings(warp=0.0, shift=0.0, mirror=True)
    out = _warp(x, still, torch.Generator().manual_seed(0))
    is_turned = (out - x.flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    is_kept = (out - x).abs().amax((1, 2, 3)) < 1e-5
    assert bool((is_turned ^ is_kept).all())
    assert 70 < int(is_turned.sum()) < 130


@pytest.mark.parametrize("shape", [(90, 50), (50, 90)])
def test_principal_components_by_the_smaller_product(shape):
    """The faster way for many items and elements, against scikit-learn."""
    from sklearn.decomposition import PCA

    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 9, shape[1])
    ours = principal(x, 3)(x)
    theirs = torch.from_numpy(PCA(3, svd_solver="full").fit_transform(x.double().numpy()))
    theirs = theirs / theirs.var(0).mean().sqrt()
    torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=1e-8, atol=1e-8)


def test_what_was_computed_once_is_remembered_until_it_is_damaged(tmp_path: Path, caplog):
    calls = []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"a": torch.arange(3.0), "b": torch.eye(2, dtype=torch.float64)}

    for _ in range(2):
        found = remembered(tmp_path, "thing", {"key": 1}, compute)
        assert found.keys() == {"a", "b"}
        assert torch.equal(found["b"], torch.eye(2, dtype=torch.float64))
    remembered(tmp_path, "thing", {"key": 2}, compute)
    assert len(calls) == len(list(tmp_path.iterdir())) == 2
    remembered(None, "thing", {"key": 1}, compute)
    assert len(calls) == 3
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert torch.equal(remembered(tmp_path, "thing", {"key": 1}, compute)["a"], torch.arange(3.0))
    assert len(calls) == 4
    assert "computing it anew" in caplog.text
    (tmp_path / "file").write_text("")
    remembered(tmp_path / "file", "thing", {}, compute)
    assert "cannot be stored" in caplog.text


def test_another_version_of_the_code_uses_nothing_that_was_kept(tmp_path: Path, monkeypatch):
    numbers = iter((1.0, 2.0))
    compute = lambda: {"a": torch.tensor(next(numbers))}
    assert float(remembered(tmp_path, "thing", {}, compute)["a"]) == 1
    monkeypatch.setattr(features, "VERSION", -1)
    assert float(remembered(tmp_path, "thing", {}, compute)["a"]) == 2


def test_a_digest_tells_types_shapes_and_numbers_apart():
    x = torch.zeros(2, 3)
    others = [x.view(3, 2), x.int(), x + 1, torch.zeros(6)]
    assert len({digest(tensor) for tensor in [x, *others]}) == 5
    assert digest(x) == digest(x.clone()) == digest(x.T.contiguous().T)
    assert digest(x, x) != digest(torch.cat([x, x]))
