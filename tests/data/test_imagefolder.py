"""Folders of pictures: classes, splits, how a picture is read, and the command that prepares them."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polydiff import data
from polydiff.core.errors import ConfigError, DataError
from polydiff.data import h5, imagefolder
from polydiff.data.pictures import Fit

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def save(path: Path, size: tuple[int, int] = (12, 10), colour: object = (10, 20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def pictures(root: Path, n: int = 6) -> Path:
    for name, colour in COLOURS.items():
        for k in range(n):
            save(root / name / f"{k:02d}.png", colour=colour)
    return root


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.RandomState(0).randint(256, size=(height, width, channels)).astype(np.uint8)


def test_sub_folders_are_classes_and_pictures_are_theirs(tmp_path: Path) -> None:
    source = pictures(tmp_path / "colours")
    save(source / "red" / "dark" / "deep" / "a.png", colour=COLOURS["red"])
    reader = h5.Reader(data.prepare("imagefolder", source, folder=tmp_path, name="colours", size=8))
    assert reader.attributes["name"] == "colours" and reader.shapes == {"image": (8, 8, 3)}
    assert reader.names == {"label": ["blue", "green", "red"]}
    assert len(reader) == 19 and "red/dark/deep/a.png" in reader.columns["id"]
    for k, text in enumerate(reader.columns["id"]):
        name = reader.names["label"][reader.columns["label"][k]]
        assert text.startswith(f"{name}/")
        assert (reader.item(k)["image"] == COLOURS[name]).all()
    nested = imagefolder.recipe("c", source, size=8, classes="path")
    assert nested.names["label"] == ["blue", "green", "red", "red/dark/deep"]
    assert "label" not in imagefolder.recipe("c", source, size=8, classes="none").columns


def test_pictures_in_the_root_have_no_class(tmp_path: Path) -> None:
    for k in range(4):
        save(tmp_path / f"{k}.png")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "read.me").write_text("no picture")
    table = imagefolder.recipe("c", tmp_path, size=8)
    assert len(table) == 4 and "label" not in table.columns and not table.names
    save(tmp_path / "notes" / "a.png")
    table = imagefolder.recipe("c", tmp_path, size=8)
    assert table.columns["id"].tolist() == ["notes/a.png"] and "label" not in table.columns, "one class is none"
    assert ("0.png", "in no class folder, others are; classes=none takes all") in table.skipped
    assert len(imagefolder.recipe("c", tmp_path, size=8, classes="none")) == 5


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "test"), {"train": "train", "test": "test"}),
        (("train", "val"), {"train": "train", "val": "test"}),
        (("train", "test", "valid"), {"train": "train", "test": "test", "valid": "valid"}),
    ],
)
def test_splits_that_the_folders_name(tmp_path: Path, folders: tuple[str, ...], expected: dict[str, str]) -> None:
    for folder in folders:
        pictures(tmp_path / folder, 2)
    save(tmp_path / "beside.png")
    table = imagefolder.recipe("c", tmp_path, size=8)
    assert len(table) == 6 * len(folders) and len(table.names["label"]) == 3
    for text, split in zip(table.columns["id"], table.columns["split"], strict=True):
        assert split == expected[text.partition("/")[0]]
    assert table.skipped == [("beside.png", "beside the folders of the splits")]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "bus"):
        save(tmp_path / name / "a.png")
    assert imagefolder.recipe("c", tmp_path, size=8).names["label"] == ["bus", "train"]


def test_the_share_for_testing_stays_when_pictures_are_added(tmp_path: Path) -> None:
    source = pictures(tmp_path, 40)

    def split() -> dict[str, str]:
        table = imagefolder.recipe("c", source, size=8)
        return dict(zip(table.columns["id"], table.columns["split"], strict=True))

    before = split()
    for k in range(10):
        save(source / "blue" / f"another-{k}.png")
    after = split()
    assert before.items() <= after.items() and len(after) == 130
    assert 4 <= list(before.values()).count("test") <= 24, "10 % of 120, within four deviations"
    for text, part in after.items():
        assert (part == "test") == (int(hashlib.sha256(text.encode()).hexdigest(), 16) < 2**256 // 10)
    few = imagefolder.recipe("c", save(tmp_path / "few" / "x" / "a.png").parents[1], size=8)
    assert few.columns["split"].tolist() == ["train"]
    save(tmp_path / "few" / "x" / "b.png")
    assert sorted(imagefolder.recipe("c", tmp_path / "few", size=8).columns["split"]) == ["test", "train"]
    assert {*imagefolder.recipe("c", tmp_path / "few", size=8, test=0).columns["split"]} == {"train"}


def test_grey_is_one_channel_only_if_all_are(tmp_path: Path) -> None:
    grey = noise(8, 8, 1)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(np.repeat(grey[:, :, None], 3, 2)).save(tmp_path / "b.png")
    image = imagefolder.recipe("c", tmp_path, size=8).arrays["image"]
    np.testing.assert_array_equal(image, np.stack([grey, grey])[..., None])
    assert imagefolder.recipe("c", tmp_path, size=8, channels=3).arrays["image"].shape == (2, 8, 8, 3)
    colour = noise(8, 8)
    Image.fromarray(colour).save(tmp_path / "c.png")
    image = imagefolder.recipe("c", tmp_path, size=8).arrays["image"]
    np.testing.assert_array_equal(image[2], colour)
    luma = imagefolder.recipe("c", tmp_path, size=8, channels=1).arrays["image"]
    np.testing.assert_allclose(luma[2, ..., 0], colour @ [0.299, 0.587, 0.114], atol=0.51)


def test_the_crop_is_centred_and_resizing_does_not_alias(tmp_path: Path) -> None:
    wide = noise(16, 8)
    Image.fromarray(wide).save(tmp_path / "a.png")
    np.testing.assert_array_equal(Fit(height=8, width=8).read(tmp_path / "a.png"), wide[:, 4:12])
    np.testing.assert_array_equal(Fit(height=8, width=16).read(tmp_path / "a.png"), wide)
    # One period in four pixels, sampled every eight: an aliasing resize would keep stripes, the mean is 127.5.
    stripes = np.tile(np.array([0, 0, 255, 255], np.uint8), (256, 64))
    Image.fromarray(stripes).save(tmp_path / "b.png")
    inner = Fit(height=32, width=32).read(tmp_path / "b.png", 1)[:, 4:-4]
    assert np.abs(inner.astype(float) - 127.5).max() < 3
    squeezed = Fit(height=8, width=8, crop="none").read(tmp_path / "a.png")
    np.testing.assert_allclose(squeezed[:, 2:6].mean(), wide[:, 4:12].mean(), atol=6)


def test_a_reduction_is_the_lanczos_sum(tmp_path: Path) -> None:
    """By the formula: weights sinc(x) sinc(x/3) with x in output pixels, normalised, along each axis."""
    pixels = noise(48, 48, 1)[:, :, 0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    x = (np.arange(48)[None] + 0.5) / 6 - (np.arange(8)[:, None] + 0.5)
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    weights /= weights.sum(1, keepdims=True)
    expected = weights @ pixels @ weights.T
    np.testing.assert_allclose(Fit(height=8, width=8).read(tmp_path / "a.png", 1)[..., 0], expected, atol=1.01)


def test_options_that_cannot_be_used(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for options, message in (
        ({"sise": 8}, "unknown option of data set 'imagefolder' 'sise': did you mean size"),
        ({"size": 0}, "sides are whole numbers from 1"),
        ({"size": "big"}, "sides are whole numbers"),
        ({"size": [8, 8, 8]}, r"one side, or \[height,width\]"),
        ({"size": 8, "crop": "centre"}, "unknown crop 'centre': did you mean center"),
        ({"size": 8, "channels": 4}, "channels=4: must be 1, 3 or null"),
        ({"size": 8, "channels": True}, "channels=True: must be 1, 3 or null"),
        ({"size": 8, "channels": [1]}, "must be 1, 3 or null"),
        ({"size": 8, "crop": ["center"]}, "unknown crop"),
        ({"size": 8, "classes": ["top"]}, "unknown classes"),
        ({"size": 8, "classes": "tops"}, "unknown classes 'tops': did you mean top"),
        ({"size": 8, "test": 1}, "test=1: a share"),
        ({"size": 8, "enlarge": 0.5}, "enlarge=0.5: a factor"),
        ({"name": "mnist"}, "another data set of the catalogue"),
        ({"name": "../a"}, "use up to 100 letters"),
    ):
        with pytest.raises(ConfigError, match=message):
            data.prepare("imagefolder", tmp_path, folder=tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="give their folder as source=PATH"):
        data.prepare("imagefolder", folder=tmp_path / "out")
    with pytest.raises(DataError, match=r"a.png is not a folder; give a folder of pictures"):
        data.prepare("imagefolder", tmp_path / "a.png", folder=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"option of data set 'mnist' 'size': valid: \(none\)"):
        data.prepare("mnist", tmp_path, size=8)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_did(tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from polydiff.core.cli import main

    source = pictures(tmp_path / "source")
    for k in range(25):
        (source / f"note-{k:02d}.txt").write_text("not a picture")
    words = ["data", "imagefolder", f"source={source}", "name=colours", f"folder={tmp_path}", "size=[8,16]"]
    assert main(words) == 0
    out = capsys.readouterr().out.splitlines()
    listed = tmp_path / "colours.skipped.txt"
    assert out[:20] == [
        f"skipped note-{k:02d}.txt: not a picture (PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM), or damaged at its start"
        for k in range(20)
    ]
    assert out[20] == f"... and 5 more, all in {listed}"
    assert out[21].startswith("colours: ") and f"; 25 files skipped, listed in {listed}; sigma_data " in out[21]
    assert out[22].startswith(
        "18 pictures of 8x16x3: the largest centred part of that shape, Lanczos, over white; 3 classes;"
    )
    assert out[23] == f"wrote {tmp_path / 'colours.h5'} (verified)"
    assert len(listed.read_text().splitlines()) == 25
    for path in source.glob("*.txt"):
        path.unlink()
    assert main(words) == 0 and not listed.exists(), "a list of another time would mislead"
    assert main([*words, "sise=8"]) == 1
    assert "unknown option of polydiff data imagefolder 'sise': did you mean size" in capsys.readouterr().err
    assert main([*words, "size=8"]) == 1
    assert "size is given twice" in capsys.readouterr().err
    assert main(["data", "--help"]) == 0
    assert "options of imagefolder: size=64 crop=center" in capsys.readouterr().out


def test_fewer_pictures_than_a_batch_are_repeated(tmp_path: Path) -> None:
    from polydiff.core import adapter
    from polydiff.core.training.stream import Stream, loader

    images = adapter.load("image")
    path = data.prepare("imagefolder", pictures(tmp_path / "source", 1), folder=tmp_path, name="three", size=8)
    train = images.dataset(path, "train")
    batches = [*loader(train, Stream(len(train), 8, 0), 0, 3, chunks=range(1), collate=images.collate)]
    assert [x.shape for x, *_ in batches] == [(8, 3, 8, 8)] * 3
    labels = np.concatenate([cond["label"].numpy() for *_, cond in batches])
    assert np.unique(labels, return_counts=True)[1].tolist() == [12, 12], "two of three are for training"


def test_photographs_are_what_pillow_makes_of_them(data_source: Path) -> None:
    table = imagefolder.recipe("photos", data_source / "photos", size=32)
    assert len(table) == 13 and not table.skipped and table.arrays["image"].shape[1:] == (32, 32, 3)
    k = table.columns["id"].tolist().index("chelsea.png")
    with Image.open(data_source / "photos" / "chelsea.png") as image:  # 451 x 300
        expected = image.resize((32, 32), Image.Resampling.LANCZOS, box=(75.5, 0, 375.5, 300))
    np.testing.assert_array_equal(table.arrays["image"][k], expected)


def test_a_folder_given_twice_is_two_data_sets(tmp_path: Path) -> None:
    source = pictures(tmp_path / "source", 2)
    shutil.copytree(source / "red", tmp_path / "other" / "red")
    save(tmp_path / "other" / "grey" / "a.png")
    prepare: Callable[..., Path] = data.prepare
    paths = [prepare("imagefolder", tmp_path / n, folder=tmp_path, name=n, size=8) for n in ("source", "other")]
    assert [path.name for path in paths] == ["source.h5", "other.h5"]
    assert [len(h5.Reader(path)) for path in paths] == [6, 3]


def test_the_command_says_that_it_replaces_other_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from polydiff.core.cli import main

    words = [f"folder={tmp_path / 'out'}", "name=shades", "size=8"]
    few, many = pictures(tmp_path / "few", 4), pictures(tmp_path / "many", 5)
    for source, replaced in ((few, ""), (few, ""), (many, "replaces another set of that name, of 12 items")):
        assert main(["data", "imagefolder", f"source={source}", *words]) == 0
        out = capsys.readouterr().out
        assert replaced in out and ("replaces" in out) == bool(replaced)
