"""FID and KID through torch-fidelity: its own network with random weights, against its own numbers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from polydiff.core.adapter import Item
from polydiff.core.errors import DataError
from polydiff.core.evaluation.frechet import moments
from polydiff.modalities.image import inception
from polydiff.modalities.image.inception import WEIGHTS, ready, sha256
from polydiff.modalities.image.metrics import metrics


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch-fidelity were installed; nothing of it is imported."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: None) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert ready({}) == ready({"inception": "off"}) == ""
    found = ready({"inception": "auto"})
    assert found == (
        "no FID: the Inception weights are not on this machine; save https://github.com/toshas/torch-fidelity/releases/"
        f"download/v0.2.0/{WEIGHTS} as {tmp_path}/hub/checkpoints/{WEIGHTS}"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ready({"inception": "auto"}) == (
        "no FID: torch-fidelity is not installed; get it with: pip install 'polydiff[fid]'"
    )


def test_only_a_file_that_is_what_its_name_says_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: None
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    public = tmp_path / "checkpoints" / WEIGHTS
    public.parent.mkdir()
    public.write_bytes(b"something else")
    found = ready({"inception": "auto"})
    assert isinstance(found, str)
    assert found.startswith(
        f"no FID: the SHA-256 of {public} begins with {sha256(public)[:8]}, which its name does not"
    )
    own = tmp_path / f"weights-{sha256(public)[:8]}.pth"
    own.write_bytes(public.read_bytes())
    assert ready({"inception": "auto", "inception_weights": own}) == own
    plain = own.rename(tmp_path / "weights.pth")
    assert "which its name does not" in str(ready({"inception": "auto", "inception_weights": plain}))
    assert "torch_fidelity" not in sys.modules


def test_scores_use_every_training_item_and_keep_what_they_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: None
) -> None:
    """The way through the metrics, with a linear map in the place of the network."""
    weights = tmp_path / "w"
    weights.write_bytes(b"weights")
    own = weights.rename(tmp_path / f"w-{sha256(weights)[:8]}.pth")
    generator, calls = torch.Generator().manual_seed(0), []
    matrix = torch.randn(16, 8, generator=generator)

    def extractor(_weights: Path, _device: object) -> object:
        def features(x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return x.flatten(1) @ matrix

        return features

    monkeypatch.setattr(inception, "extractor", extractor)
    pictures = [Item(x) for x in torch.rand(120, 1, 4, 4, generator=generator) * 2 - 1]
    samples, train, held_out = pictures[:40], pictures[40:90], pictures[90:]
    options = {"held_out": held_out, "store": tmp_path, "inception": "auto", "inception_weights": own}
    first = metrics(samples, train, options)
    assert calls == [50, 30, 40]
    assert metrics(samples, train, options) == first
    assert calls == [50, 30, 40, 40]
    assert (first["fid"].n, first["kid"].n) == (40, 40)
    real = moments(torch.stack([item.x for item in train]).flatten(1) @ matrix)
    drawn = torch.stack([item.x for item in samples]).flatten(1) @ matrix
    assert first["fid"].value == pytest.approx(inception.frechet_distance(drawn, real), rel=1e-6)
    assert first["fid"].low is not None
    assert first["fid"].real is not None
    assert first["kid"].low is not None
    assert first["kid"].real is not None
    notes: list[str] = []
    assert "fid" not in metrics(samples, train, {**options, "inception_weights": tmp_path / "none.pth", "notes": notes})
    assert len(notes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_numbers_are_those_of_torch_fidelity(tmp_path: Path, channels: int) -> None:
    """On the same pictures, written as PNG for it; its network has random weights, ours are read from the same file."""
    fidelity = pytest.importorskip("torch_fidelity")
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    from polydiff.modalities.image.codec import Codec

    class Untrained(module.FeatureExtractorInceptionV3):  # type: ignore[misc, name-defined]
        def load_state_dict(self, *_: object, **__: object) -> None:
            return None

    empty = tmp_path / "empty.pth"
    torch.save({}, empty)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = Untrained("x", ["2048"], feature_extractor_weights_path=str(empty)).state_dict()
    torch.save(state, empty)
    weights = empty.rename(tmp_path / f"weights-{sha256(empty)[:8]}.pth")
    generator = torch.Generator().manual_seed(1)
    rough = torch.rand(48, channels, 4, 4, generator=generator)
    x = torch.nn.functional.interpolate(rough, (32, 32), mode="bilinear") * 2 - 1
    x[24:] = x[24:] * 0.7 + 0.2
    found = ready({"inception": "auto", "inception_weights": weights})
    assert found == weights
    ours = inception.inception_scores(x[:24], x[24:], None, weights)
    for name, part in (("one", x[:24]), ("two", x[24:])):
        Codec().write([Item(picture) for picture in part], tmp_path / name)
    theirs = fidelity.calculate_metrics(
        input1=str(tmp_path / "one"),
        input2=str(tmp_path / "two"),
        fid=True,
        kid=True,
        kid_subsets=1,
        kid_subset_size=24,
        feature_extractor_weights_path=str(weights),
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    assert ours["fid"].value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["kid"].value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert (ours["fid"].n, ours["fid"].low, ours["fid"].real) == (24, None, None)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights file, and a network that gives pictures' first pixels as their features."""
    monkeypatch.setattr(inception, "extractor", lambda *_: lambda x: x.flatten(1)[:, :8])
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    return path


def test_no_held_out_picture_of_the_classes_that_were_asked_for_costs_the_real_values_alone(
    weights: Path,
) -> None:
    samples, train, fresh = torch.rand(90, 1, 4, 4, generator=torch.Generator().manual_seed(0)).split(30)
    classes, available = torch.full((30,), 3), torch.arange(30) % 3
    found = inception.inception_scores(samples, train, fresh, weights, classes=classes, available=available)
    assert found["fid"].value > 0
    assert found["fid"].real is None and found["kid"].real is None


def test_too_few_pictures_are_refused_before_a_classifier_is_trained(tmp_path: Path) -> None:
    many = [Item(torch.zeros(1, 8, 8), None, {"label": torch.tensor(i % 2)}, str(i)) for i in range(8)]
    with pytest.raises(DataError, match="at least 6 samples, got 5: more are needed"):
        metrics(many[:5], many, {"store": tmp_path})
    with pytest.raises(DataError, match="at least 6 reference pictures, got 5: more are needed"):
        metrics(many, many[:5], {"store": tmp_path})
    assert list(tmp_path.iterdir()) == []


def test_other_held_out_pictures_are_not_given_the_features_that_were_kept(tmp_path: Path, weights: Path) -> None:
    samples, train, *others = torch.rand(120, 1, 4, 4, generator=torch.Generator().manual_seed(0)).split(30)
    kept, anew = (
        [inception.inception_scores(samples, train, fresh, weights, store=store)["fid"].real for fresh in others]
        for store in (tmp_path, None)
    )
    assert kept == anew and kept[0] != kept[1]
