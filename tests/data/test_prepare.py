"""Names, places and preparation of data sets."""

import dataclasses
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from polydiff import data
from polydiff.core import adapter
from polydiff.core.errors import ConfigError, DataError
from polydiff.data import Entry, Table, h5


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYDIFF_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_entry_has_an_adapter_a_recipe_and_terms() -> None:
    for name, entry in data.catalogue().items():
        assert entry.modality in adapter.names()
        assert callable(adapter.Lazy(entry.recipe).load()), name
        assert entry.about and entry.licence
        assert entry.embedded or entry.urls or "source=PATH" in entry.about


@pytest.mark.parametrize("name", [name for name, entry in data.catalogue().items() if entry.embedded])
def test_embedded_sets_are_made_at_first_use_and_then_kept(cache: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"run: polydiff data {name}"):
        data.locate(name, prepare_embedded=False)
    path = data.locate(name)
    assert path == cache / f"{name}.h5"
    stamp = path.stat().st_mtime_ns
    assert data.locate(name, prepare_embedded=False) == path and path.stat().st_mtime_ns == stamp
    reader = h5.Reader(path)
    reader.verify()
    entry = data.catalogue()[name]
    assert reader.attributes["name"] == name and reader.attributes["modality"] == entry.modality
    assert reader.attributes["complete"] == [len(reader), len(reader)]
    assert reader.attributes["licence"] == entry.licence


def test_a_name_that_is_not_prepared_says_which_are_and_how_to_make_it(cache: Path) -> None:
    data.locate("moons").rename(cache / "pets.h5")
    assert data.locate("pets") == cache / "pets.h5"
    with pytest.raises(ConfigError, match="unknown data set 'petz': did you mean pets"):
        data.locate("petz")
    with pytest.raises(DataError, match="run: polydiff data imagefolder source=PATH"):
        data.locate("imagefolder")


@pytest.mark.parametrize("name", ["digits", "moons"])
def test_sigma_data_is_that_of_the_items_the_network_sees(cache: Path, name: str) -> None:
    path = data.locate(name)
    train = adapter.load(data.catalogue()[name].modality).dataset(path, "train")
    values = [value for item in train for value in item.x.flatten().tolist()]
    assert train.facts["sigma_data"] == pytest.approx(statistics.pstdev(values), rel=1e-9)


def test_prepare_is_repeatable_and_goes_where_it_is_told(cache: Path, tmp_path: Path) -> None:
    first = data.prepare("moons", folder=tmp_path / "a")
    second = data.prepare("moons", folder=tmp_path / "b")
    assert first == tmp_path / "a" / "moons.h5" and not cache.exists()
    assert h5.Reader(first).attributes == h5.Reader(second).attributes


def test_an_encoding_of_the_caller_decides_sigma_data(cache: Path) -> None:
    plain = h5.Reader(data.prepare("moons")).attributes["sigma_data"]
    double = h5.Reader(data.prepare("moons", encode=lambda raw: 2 * torch.from_numpy(raw))).attributes["sigma_data"]
    assert double == pytest.approx(2 * plain, rel=1e-6)


def test_sigma_data_of_ragged_items_and_of_states_with_leaves() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0, 99.0])
    table = Table(
        {"v": values, "w": -values},
        {"id": np.array(["a", "b", "c"]), "split": np.array(["train", "train", "test"])},
        offsets=np.array([0, 1, 4, 5]),
    )

    def encode(raw: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in raw.items()}

    expected = statistics.pstdev([1, 2, 4, 8, -1, -2, -4, -8])
    assert data.measure_sigma_data(table, encode) == pytest.approx(expected, rel=1e-12)
    constant = dataclasses.replace(table, arrays={"v": np.ones(5)})
    with pytest.raises(DataError, match="empty or constant"):
        data.measure_sigma_data(constant, torch.from_numpy)


def test_names_and_sources_that_cannot_be_used(cache: Path) -> None:
    for function in (data.locate, data.prepare):
        with pytest.raises(ConfigError, match="did you mean digits"):
            function("digit")
    with pytest.raises(ConfigError, match="embedded"):
        data.prepare("digits", source="elsewhere")
    assert not cache.exists()


def test_a_file_put_into_the_folder_is_found_by_its_name(cache: Path) -> None:
    data.prepare("moons", folder=cache).rename(cache / "mine.h5")
    assert data.locate("mine") == cache / "mine.h5"


def test_a_source_that_is_not_the_expected_one_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = dataclasses.replace(data.catalogue()["digits"], sha256="0" * 64)
    monkeypatch.setattr(data, "catalogue", lambda: {"digits": entry})
    with pytest.raises(DataError, match=r"has digest 65e5.*expected 0000"):
        data.prepare("digits")
    assert not cache.exists()


def test_a_public_set_says_how_to_prepare_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(modality="image", recipe="polydiff.data.digits:recipe", about="public", urls=("https://example.org",))
    monkeypatch.setattr(data, "catalogue", lambda: {"public": entry})
    with pytest.raises(DataError, match="run: polydiff data public"):
        data.locate("public")


def test_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path) -> None:
    monkeypatch.setenv("POLYDIFF_DATA", str(tmp_path))
    assert data.folder() == tmp_path
    monkeypatch.delenv("POLYDIFF_DATA")
    if (root / "pyproject.toml").is_file() and Path(data.__file__).resolve().is_relative_to(root / "data"):
        assert data.folder() == root / "data" / "cache"
    package = tmp_path / "site-packages" / "polydiff" / "data" / "__init__.py"
    monkeypatch.setattr(data, "__file__", str(package))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert data.folder() == tmp_path / "home" / "polydiff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.folder() == Path.home() / ".cache" / "polydiff"


def test_digits_are_scikit_learns_and_the_split_is_fixed_and_stratified(cache: Path) -> None:
    from sklearn.datasets import load_digits

    source, reader = load_digits(), h5.Reader(data.locate("digits"))
    index = reader.columns["id"].astype(int)
    assert sorted(index) == list(range(1797))
    image = reader.block(np.arange(1797))["image"]
    np.testing.assert_array_equal(np.round(image[..., 0] * (16 / 255)), source.images[index])
    np.testing.assert_array_equal(reader.columns["label"], source.target[index])
    test = reader.rows("test")
    assert (len(test), len(reader.rows("train"))) == (360, 1437)
    np.testing.assert_array_equal(np.bincount(reader.columns["label"][test]), np.full(10, 36))
    assert index[test][:8].tolist() == [3, 7, 13, 19, 36, 38, 43, 48], (
        "the split must never change: results are compared by it"
    )
    assert math.isclose(reader.attributes["sigma_data"], 0.75287, abs_tol=1e-5)
