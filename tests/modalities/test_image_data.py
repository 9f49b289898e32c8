"""Images: representation, files and data set."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polydiff import data
from polydiff.core.adapter import Item, collate
from polydiff.core.errors import ConfigError, DataError, DivergenceError
from polydiff.data import Table, h5, pictures
from polydiff.modalities.image import ADAPTER
from polydiff.modalities.image.codec import Codec
from polydiff.modalities.image.dataset import Images


@pytest.fixture
def digits(data_folder: Path) -> Path:
    return data.locate("digits")


def table(n: int = 6, channels: int = 3, split: str = "train", **columns: np.ndarray) -> Table:
    return Table(
        {"image": np.random.RandomState(0).randint(0, 256, (n, 5, 7, channels)).astype(np.uint8)},
        {"id": np.array([f"i{i}" for i in range(n)]), "split": np.array([split] * n), **columns},
        attributes={"name": "made", "modality": "image", "sigma_data": 0.5},
    )


def test_every_byte_survives_the_round_trip() -> None:
    raw = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    x = Codec().encode(raw)
    assert x.dtype == torch.float32 and x.shape == (1, 16, 16)
    assert (x.min().item(), x.max().item()) == (-1, 1) and x[0, 0, 3] == torch.tensor(3.0) / 127.5 - 1
    np.testing.assert_array_equal(Codec().decode(x), raw)
    np.testing.assert_array_equal(Codec().decode(x + 0.49 / 127.5), raw, "rounding, not truncation")
    assert Codec.tolerance == 0


def test_batches_and_channels_move_the_right_axis() -> None:
    raw = np.random.RandomState(0).randint(0, 256, (4, 5, 7, 3)).astype(np.uint8)
    x = Codec().encode(raw)
    assert x.shape == (4, 3, 5, 7)
    assert x[2, 1, 4, 6] == torch.tensor(raw[2, 4, 6, 1]).float() / 127.5 - 1
    np.testing.assert_array_equal(Codec().decode(x), raw)


def test_decoding_clips_and_refuses_what_is_not_finite() -> None:
    np.testing.assert_array_equal(Codec().decode(torch.tensor([[[-7.0, 3.0]]]))[..., 0], [[0, 255]])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(DivergenceError):
            Codec().decode(torch.full((1, 2, 2), bad))
    with pytest.raises(DataError, match="uint8"):
        Codec().encode(np.zeros((4, 4, 1), np.float32))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("format", "extension"), [("png", ".png"), ("webp", ".webp"), (None, ".png")])
def test_lossless_files_give_every_pixel_back(tmp_path: Path, channels: int, format: str, extension: str) -> None:
    raw = np.random.RandomState(0).randint(0, 256, (2, 5, 7, channels)).astype(np.uint8)
    items = [Item(Codec().encode(image)) for image in raw]
    paths = Codec().write(items, tmp_path / "new" / "folder", format)
    assert [path.name for path in paths] == [f"sample-{i:05d}{extension}" for i in range(2)]
    reader = Codec({"size": {"channels": channels}})
    for path, image in zip(paths, raw, strict=True):
        np.testing.assert_array_equal(reader.read(path), image)
        assert Image.open(path).size == (7, 5)


def test_jpeg_is_close_and_smaller_at_lower_quality(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64, 1).astype(np.uint8)
    item = Item(Codec().encode(ramp))
    (fine,) = Codec().write([item], tmp_path / "fine", "jpeg")
    (coarse,) = Codec().write([item], tmp_path / "coarse", "jpeg", quality=10)
    assert fine.suffix == ".jpg" and coarse.stat().st_size < fine.stat().st_size
    assert np.abs(Codec().read(fine).astype(int) - ramp).max() <= 8


def test_files_of_other_kinds_become_grey_or_rgb(tmp_path: Path) -> None:
    colours = np.random.RandomState(0).randint(0, 256, (5, 7, 4)).astype(np.uint8)
    Image.fromarray(colours, "RGBA").save(tmp_path / "rgba.png")
    alpha = colours[..., 3:] / 255
    over_white = colours[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(Codec().read(tmp_path / "rgba.png") - over_white).max() <= 1
    assert Codec({"size": {"channels": 1}}).read(tmp_path / "rgba.png").shape == (5, 7, 1)
    grey = Image.fromarray(colours[..., 0])
    grey.save(tmp_path / "grey.png")
    assert Codec().read(tmp_path / "grey.png").shape == (5, 7, 1)
    assert Codec({"size": {"channels": 3}}).read(tmp_path / "grey.png").shape == (5, 7, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    grey.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(Codec().read(tmp_path / "turned.png")[..., 0], np.rot90(colours[..., 0], -1))
    deep = colours[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(Codec().read(tmp_path / "deep.png")[..., 0], colours[..., 0])
    frames = [Image.new("L", (4, 4), k) for k in (50, 255)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert Codec({"size": {"channels": 1}}).read(tmp_path / "moving.webp").max() == 50


def test_damaged_and_unsuitable_files_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = Codec().write([Item(torch.rand(3, 64, 64))], tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    Image.new("F", (4, 4)).save(tmp_path / "deep.tiff")
    for name in (path.name, "empty.png", "text.png", "deep.tiff", "absent.png"):
        with pytest.raises(DataError, match=name) as caught:
            Codec().read(tmp_path / name)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(DataError, match="64 x 64 pixels, at most"):
        Codec().read(path)


def test_unknown_formats_options_and_bad_folders(tmp_path: Path) -> None:
    items = [Item(torch.zeros(1, 4, 4))]
    with pytest.raises(ConfigError, match="did you mean png"):
        Codec().write(items, tmp_path / "new", "pgn")
    with pytest.raises(ConfigError, match="quality"):
        Codec().write(items, tmp_path / "new", "jpeg", qualty=3)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="choose another folder"):
        Codec().write(items, tmp_path / "file")


def test_digits_as_the_network_sees_them(digits: Path) -> None:
    train, test = ADAPTER.dataset(digits, "train"), ADAPTER.dataset(digits, "test")
    assert (len(train), len(test)) == (1437, 360)
    facts = train.facts
    assert facts["size"] == {"height": 8, "width": 8, "channels": 1}
    assert facts["classes"] == {"label": list("0123456789")}
    assert facts["name"] == "digits" and facts["n"] == 1437 and len(facts["sha256"]) == 64
    stored = h5.Reader(digits)
    item = test[17]
    row = stored.rows("test")[17]
    np.testing.assert_array_equal(Codec().decode(item.x), stored.item(row)["image"])
    assert item.cond["label"].dtype == torch.int64 and item.cond["label"] == stored.columns["label"][row]
    assert item.id == stored.columns["id"][row]
    assert {item.id for item in train}.isdisjoint(item.id for item in test)
    batch = collate(train.__getitems__([3, 1, 4]))
    assert batch.x.shape == (3, 1, 8, 8) and batch.cond["label"].shape == (3,) and batch.mask is None
    assert torch.equal(batch.x[1], train[1].x)


def test_held_in_memory_or_read_lazily_is_the_same(digits: Path) -> None:
    held, lazy = Images(digits, "test"), Images(digits, "test", memory_mb=0)
    assert held._held is not None and lazy._held is None and held.facts == lazy.facts
    for index in (0, 100, -1):
        assert torch.equal(held[index].x, lazy[index].x) and held[index].id == lazy[index].id
    with pytest.raises(IndexError):
        lazy[360]


@pytest.mark.parametrize("memory_mb", [0, 512])
def test_workers_deliver_the_same_batches(digits: Path, memory_mb: float) -> None:
    dataset = Images(digits, "test", memory_mb=memory_mb)
    loader = torch.utils.data.DataLoader(dataset, batch_size=180, num_workers=1, collate_fn=collate)
    assert torch.equal(torch.cat([batch.x for batch in loader]), torch.stack([item.x for item in dataset]))


def test_a_set_without_classes_has_no_condition(tmp_path: Path) -> None:
    writer = np.array([0, 1] * 3)
    made = Images(h5.write(tmp_path / "made.h5", table(writer=writer)))
    assert made.facts["classes"] == {} and made[0].cond == {} and made[0].x.shape == (3, 5, 7)
    with pytest.raises(DataError, match=r"'test'; it has: train \(6\)"):
        Images(tmp_path / "made.h5", "test")
    with pytest.raises(ConfigError, match="memory_mb"):
        Images(tmp_path / "made.h5", memory_mb=-1)


def test_arrays_that_are_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs an array image"):
        Images(h5.write(tmp_path / "made.h5", table(channels=2)))


def test_flip_mirrors_half_and_only_when_asked(tmp_path: Path) -> None:
    path = h5.write(tmp_path / "made.h5", table())
    plain, flipping = Images(path), Images(path, flip=True)
    generator = torch.Generator().manual_seed(0)
    assert all(plain.augment(item, generator) is item for item in plain)
    seen = [flipping.augment(flipping[0], generator).x for _ in range(400)]
    mirrored = sum(torch.equal(x, flipping[0].x.flip(2)) for x in seen)
    assert 160 < mirrored < 240 and mirrored + sum(torch.equal(x, flipping[0].x) for x in seen) == 400


def test_shape_makes_an_empty_image_or_says_why_not() -> None:
    like, mask = ADAPTER.shape({"height": 8, "width": 6, "channels": 3}, {})
    assert like.shape == (3, 8, 6) and mask is None
    size = {"height": 8, "width": 8, "channels": 1}
    for change in ({"height": 0}, {"width": -8}, {"height": 8.5}, {"width": "8"}, {"channels": 2}, {"height": True}):
        with pytest.raises(ConfigError, match="size"):
            ADAPTER.shape({**size, **change}, {})
    with pytest.raises(ConfigError, match="pixels at most"):
        ADAPTER.shape({**size, "height": 2**20, "width": 2**20}, {})
    with pytest.raises(ConfigError, match="did you mean width"):
        ADAPTER.shape({**size, "widht": 8}, {})
    with pytest.raises(ConfigError, match="whole numbers"):
        ADAPTER.shape({"height": 8}, {})


def test_checks_praise_digits_and_find_planted_faults(digits: Path, tmp_path: Path) -> None:
    assert [finding.level for finding in ADAPTER.checks(digits, None)] == ["ok"] * 3
    assert ADAPTER.checks(None, None) == []
    made = table(24, label=np.array([0] * 22 + [1, 1]))
    dim = made.arrays["image"] // 4
    dim[5] = dim[4]
    poor = Table({"image": dim}, made.columns, {"label": ["a", "b"]}, None, made.attributes)
    path = h5.write(tmp_path / "made.h5", poor)
    text = " ".join(f"{finding.level}: {finding.text}." for finding in ADAPTER.checks(path, None))
    assert "warn: values 0..63." in text and "warn: 1 images occur more than once." in text
    assert "warn: label: 'b' has 2 training images, 'a' 22." in text
    path.write_bytes(path.read_bytes()[:-100])
    assert [finding.level for finding in ADAPTER.checks(path, None)] == ["fail"]


def test_the_network_takes_channels_and_classes_from_the_facts(digits: Path) -> None:
    facts = ADAPTER.dataset(digits, "train").facts
    network = ADAPTER.network["unet"](facts, channels=8)
    cond, present = {"label": torch.tensor([1, 2])}, {"label": torch.tensor([True, False])}
    assert network(torch.zeros(2, 1, 8, 8), torch.zeros(2), None, cond, present).shape == (2, 1, 8, 8)
