"""MNIST's files: read as published, refused by name otherwise."""

import gzip
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polydiff import data
from polydiff.core.errors import DataError
from polydiff.data import h5, mnist

NAMES = [*mnist.MD5]
LARGEST = (60_000, 28, 28)


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes()


def made(folder: Path, train: int = 5, test: int = 3, pack: Callable[[bytes], bytes] = gzip.compress) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    for part, n in (("train", train), ("t10k", test)):
        end = ".gz" if pack is gzip.compress else ""
        images, labels = random.randint(256, size=(n, 28, 28)), random.randint(10, size=n)
        (folder / f"{part}-images-idx3-ubyte{end}").write_bytes(pack(idx(images.astype(np.uint8))))
        (folder / f"{part}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels.astype(np.uint8))))
    return folder


@pytest.mark.parametrize("pack", [gzip.compress, bytes], ids=["gz", "plain"])
def test_a_partial_set_is_read_and_counted(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    source = made(tmp_path / "source" / "mnist", pack=pack)
    reader = h5.Reader(data.prepare("mnist", source.parent, folder=tmp_path))
    assert reader.attributes["complete"] == [8, 70_000]
    assert reader.columns["split"].tolist() == ["train"] * 5 + ["test"] * 3
    assert reader.columns["id"][[0, 4, 5]].tolist() == ["train-00000", "train-00004", "test-00000"]
    random = np.random.RandomState(0)
    np.testing.assert_array_equal(reader.block(np.arange(5))["image"][..., 0], random.randint(256, size=(5, 28, 28)))
    np.testing.assert_array_equal(reader.columns["label"][:5], random.randint(10, size=5))


def _change(folder: Path, file: str, content: bytes) -> None:
    (folder / f"{file}.gz").write_bytes(content)


@pytest.mark.parametrize("file", NAMES)
def test_each_of_the_four_files_is_needed(tmp_path: Path, file: str) -> None:
    source = made(tmp_path)
    (source / f"{file}.gz").unlink()
    with pytest.raises(DataError, match=f"has no {file}.gz.*all four files are needed"):
        mnist.recipe("mnist", source)


IMAGES = np.zeros((5, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(idx(IMAGES)[:-1]), "says 5 x 28 x 28, 3920 bytes, but it holds fewer"),
        (gzip.compress(idx(IMAGES) + b"\0"), "but it holds more"),
        (gzip.compress(idx(IMAGES)) + gzip.compress(b"more"), "but it holds more"),
        (gzip.compress(idx(IMAGES)) + b"garbage", "cannot be read.*gzip"),
        (gzip.compress(idx(IMAGES))[:-9], "cannot be read"),
        (gzip.compress(idx(IMAGES))[:40] + b"\xff" * 40, "cannot be read"),
        (b"", "magic number 0, expected 2051"),
        (idx(IMAGES), "cannot be read"),
        (gzip.compress(idx(IMAGES[:, 0, 0])), "magic number 2049, expected 2051"),
        (gzip.compress(idx(IMAGES[:, :8])), "says 5 x 8 x 28, expected at most 60000 x 28 x 28"),
        (gzip.compress(idx(IMAGES[:0])), "says 0 x 28 x 28"),
        (gzip.compress(struct.pack(">4I", 2051, 2**32 - 1, 28, 28)), "says 4294967295 x 28 x 28, expected at most"),
        (gzip.compress(idx(IMAGES[:4])), "has 4 train images but 5 labels"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path: Path, content: bytes, message: str) -> None:
    source = made(tmp_path)
    _change(source, NAMES[0], content)
    with pytest.raises(DataError, match=message):
        mnist.recipe("mnist", source)


def test_a_label_above_nine_is_refused(tmp_path: Path) -> None:
    source = made(tmp_path)
    _change(source, NAMES[3], gzip.compress(idx(np.array([1, 10, 3], np.uint8))))
    with pytest.raises(DataError, match=r"t10k-labels.*holds the label 10"):
        mnist.recipe("mnist", source)


def test_files_of_full_length_must_be_the_published_ones(tmp_path: Path) -> None:
    """Fashion-MNIST has the same names and sizes."""
    source = made(tmp_path)
    _change(source, NAMES[2], gzip.compress(idx(np.zeros((10_000, 28, 28), np.uint8)), 1))
    with pytest.raises(DataError, match="is not the published file"):
        mnist.recipe("mnist", source)


def test_a_gz_that_expands_without_end_is_read_to_its_bound(tmp_path: Path) -> None:
    import tracemalloc

    source = made(tmp_path)
    block = gzip.compress(bytes(2**24), 9)
    with (source / f"{NAMES[3]}.gz").open("wb") as file:  # labels: at most 10,008 bytes, here 1 GB out of 1 MB
        file.write(gzip.compress(struct.pack(">2I", 2049, 10_000)))
        for _ in range(64):
            file.write(block)
    tracemalloc.start()
    with pytest.raises(DataError, match="but it holds more"):
        mnist.recipe("mnist", source)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


@given(
    content=st.binary(max_size=64) | st.binary(max_size=64).map(lambda tail: struct.pack(">4I", 2051, 1, 28, 28) + tail)
)
def test_whatever_the_bytes_are_the_error_is_one_of_ours(content: bytes) -> None:
    with pytest.raises(DataError, match="get it again"):
        mnist.parse(content, Path("file"), LARGEST)


@given(n=st.integers(0, 300))
def test_a_header_and_its_bytes_are_an_array_only_if_they_agree(n: int) -> None:
    content = struct.pack(">2I", 2049, 150) + bytes(range(250))[:n]
    if n == 150:
        assert mnist.parse(content, Path("file"), (10_000,)).tolist() == [*range(150)]
    else:
        with pytest.raises(DataError, match="fewer" if n < 150 else "more"):
            mnist.parse(content, Path("file"), (10_000,))


@given(damage=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4), cut=st.integers(0, 60))
def test_damaged_gzip_files_are_refused_or_whole(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, int]], cut: int
) -> None:
    packed = bytearray(gzip.compress(idx(np.arange(30, dtype=np.uint8)), mtime=0))
    for place, value in damage:
        packed[place % len(packed)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.gz"
    path.write_bytes(packed[: len(packed) - cut])
    from polydiff.data import source

    try:
        content = source.read(path, 100)
    except DataError as error:
        assert str(path) in str(error)
    else:
        # What unpacks to as much as was asked for, or more, is cut before its checksum; its length gives it away.
        assert len(content) == 100 or content in (idx(np.arange(30, dtype=np.uint8)), b"")


def test_the_real_set_is_complete_and_equal_to_an_independent_reading(data_source: Path) -> None:
    table = mnist.recipe("mnist", data_source)
    assert table.attributes["complete"] == [70_000, 70_000]
    label, train, test = table.columns["label"], table.rows("train"), table.rows("test")
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(label[train]).tolist() == counts
    assert np.bincount(label[test]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert label[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    for rows, part in ((train, "train"), (test, "t10k")):
        with gzip.open(data_source / "mnist" / f"{part}-images-idx3-ubyte.gz") as file:
            content = file.read()
        assert hashlib.md5(content).hexdigest() == mnist.MD5[f"{part}-images-idx3-ubyte"]  # noqa: S324
        assert table.arrays["image"][rows].tobytes() == content[16:]
    # The mean and deviation that every tutorial normalises with.
    grey = table.arrays["image"][train] / np.float32(255)
    assert grey.mean(dtype=np.float64) == pytest.approx(0.1307, abs=5e-5)
    assert grey.std(dtype=np.float64) == pytest.approx(0.3081, abs=5e-5)
