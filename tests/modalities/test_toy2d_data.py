"""Points: representation, files and data set."""

from pathlib import Path

import numpy as np
import pytest
import torch

from polydiff import data
from polydiff.core.adapter import Item, collate
from polydiff.core.errors import ConfigError, DataError
from polydiff.data import Table, h5
from polydiff.modalities.toy2d import ADAPTER
from polydiff.modalities.toy2d.codec import Codec


def test_the_five_sets_load_with_their_classes(data_folder: Path) -> None:
    classes = {"moons": 2, "rings": 3, "checkerboard": 8, "spiral": 2, "gaussians8": 8}
    for name, n in classes.items():
        path = data.locate(name)
        train, test = ADAPTER.dataset(path, "train"), ADAPTER.dataset(path, "test")
        assert (len(train), len(test)) == (8000, 2000)
        assert len(train.facts["classes"]["label"]) == n and train.facts["size"] == {}
        assert train.facts["sigma_data"] == pytest.approx(1, abs=0.01)
        batch = collate(train.__getitems__(range(8000)))
        assert batch.x.shape == (8000, 2) and sorted(set(batch.cond["label"].tolist())) == list(range(n))
        assert ADAPTER.checks(path, None)[0].level == "ok"


@pytest.mark.parametrize("format", [None, "csv", "npy"])
def test_files_give_every_bit_back(tmp_path: Path, format: str | None) -> None:
    points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 50)[:, None]
    paths = Codec().write([Item(x) for x in points], tmp_path / "new", format)
    assert paths[7].name == f"sample-00007.{format or 'csv'}"
    for path, x in zip(paths, points, strict=True):
        raw = Codec().read(path)
        assert raw.dtype == np.float32 and torch.equal(Codec().encode(raw), x)
    if format == "csv":
        assert paths[0].read_text().splitlines()[0] == "x,y"


def test_encoding_changes_nothing() -> None:
    raw = np.random.RandomState(0).standard_normal((5, 2)).astype(np.float32)
    np.testing.assert_array_equal(Codec().decode(Codec().encode(raw)), raw)


def test_damaged_files_are_one_clear_error(tmp_path: Path) -> None:
    cases = {
        "empty.csv": b"",
        "short.csv": b"x,y\n1\n",
        "long.csv": b"x,y\n1,2\n3,4\n",
        "words.csv": b"x,y\none,two\n",
        "nan.csv": b"x,y\nnan,0\n",
        "big.csv": b"x,y\n" + b"1," * 4000,
        "binary.csv": bytes(range(128, 256)),
        "empty.npy": b"",
        "text.npy": b"x,y\n1,2\n",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "object.npy", np.array([{}, {}]), allow_pickle=True)
    np.save(tmp_path / "shape.npy", np.zeros(3))
    np.save(tmp_path / "whole.npy", np.zeros(2, int))
    np.save(tmp_path / "huge.npy", np.zeros(2))
    header = (tmp_path / "huge.npy").read_bytes().replace(b"(2,), }" + 12 * b" ", b"(2199023255552,), }")
    (tmp_path / "huge.npy").write_bytes(header)
    names = [*cases, "object.npy", "shape.npy", "whole.npy", "huge.npy", "absent.csv"]
    for name in names:
        with pytest.raises(DataError, match=name):
            Codec().read(tmp_path / name)


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format"):
        Codec().write([], tmp_path, "xlsx")
    with pytest.raises(ConfigError, match="digits"):
        Codec().write([], tmp_path, digits=3)
    with pytest.raises(ConfigError, match="no size"):
        ADAPTER.shape({"height": 3}, {})
    like, mask = ADAPTER.shape({}, {})
    assert like.shape == (2,) and mask is None
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="another folder"):
        Codec().write([Item(torch.zeros(2))], tmp_path / "file")
    columns = {"id": np.array(["a", "b"]), "split": np.array(["train"] * 2)}
    attributes = {"name": "made", "modality": "toy2d", "sigma_data": 1.0}
    wrong = h5.write(tmp_path / "made.h5", Table({"point": np.zeros((2, 3))}, columns, attributes=attributes))
    with pytest.raises(DataError, match="needs an array point"):
        ADAPTER.dataset(wrong, "train")
    assert ADAPTER.checks(wrong, None)[0].level == "fail"


def test_the_network_takes_points_and_classes(data_folder: Path) -> None:
    network = ADAPTER.network["mlp"](ADAPTER.dataset(data.locate("rings"), "train").facts, width=16, blocks=1)
    cond, present = {"label": torch.tensor([0, 2])}, {"label": torch.tensor([True, False])}
    assert network(torch.zeros(2, 2), torch.zeros(2), None, cond, present).shape == (2, 2)
