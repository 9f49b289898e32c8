"""CIFAR-10's binary version: plane order, classes, archives, and what is refused."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polydiff import data
from polydiff.core.errors import DataError
from polydiff.data import cifar10, h5

META = b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"


def batch(n: int, seed: int = 0) -> bytes:
    """Records whose red plane is the row, green the column and blue the record's number."""
    row, column = np.mgrid[:32, :32]
    labels = np.random.RandomState(seed).randint(10, size=n)
    records = [bytes([label, *row.ravel(), *column.ravel(), *[k % 256] * 1024]) for k, label in enumerate(labels)]
    return b"".join(records)


def made(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"data_batch_1": batch(4), "data_batch_3": batch(2, 1), "test_batch": batch(3, 2)} | files
    for name, value in content.items():
        (folder / f"{name}.bin").write_bytes(value)
    (folder / "batches.meta.txt").write_bytes(META)
    return folder


def packed(path: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), kind
            archive.addfile(member, io.BytesIO(content))
    return path


def test_planes_rows_and_classes_are_where_they_belong(tmp_path: Path) -> None:
    source = made(tmp_path / "source" / "cifar-10-batches-bin")
    reader = h5.Reader(data.prepare("cifar10", source.parent, folder=tmp_path))
    assert reader.attributes["complete"] == [9, 60_000]
    assert reader.names == {"label": META.decode().split()}
    assert reader.columns["split"].tolist() == ["train"] * 6 + ["test"] * 3
    assert reader.columns["id"][[0, 4, 8]].tolist() == ["data_batch_1-0000", "data_batch_3-0000", "test_batch-0002"]
    expected = [np.random.RandomState(seed).randint(10, size=n) for seed, n in enumerate((4, 2, 3))]
    np.testing.assert_array_equal(reader.columns["label"], np.concatenate(expected))
    image = reader.item(5)["image"]
    assert image[7, 20].tolist() == [7, 20, 1], "row in red, column in green, record in blue"


def test_the_archive_is_read_as_it_is_and_equals_the_folder(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    members = {f"cifar-10-batches-bin/{path.name}": path.read_bytes() for path in source.iterdir()}
    archive = packed(tmp_path / "cifar-10-binary.tar.gz", {**members, "cifar-10-batches-bin/readme.html": b"read me"})
    digests = {
        h5.Reader(data.prepare("cifar10", given, folder=tmp_path / str(k))).attributes["sha256"]
        for k, given in enumerate((source, archive, tmp_path))
    }
    assert len(digests) == 1, "the folder, the archive and the folder with the archive"


def test_class_names_are_optional_but_must_be_ten(tmp_path: Path) -> None:
    source = made(tmp_path)
    (source / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    assert list(cifar10.recipe("c", source).names["label"]) == [*"abcdefghij"]
    (source / "batches.meta.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(DataError, match="names 2 classes, expected 10"):
        cifar10.recipe("c", source)
    (source / "batches.meta.txt").unlink()
    assert cifar10.recipe("c", source).names["label"][3:6] == ["cat", "deer", "dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (batch(2)[:-1], "data_batch_1.bin: 6145 bytes are not 1 to 10000 records of 3073"),
        (batch(2) + b"\0", "6147 bytes"),
        (b"", "0 bytes"),
        (bytes(10_001 * 3073), "more than 30730000 bytes"),
        (batch(2) + bytes([10]) + bytes(3072), "record 2 has the label 10"),
        (bytes([9]) + bytes(3072) + bytes([10]) + bytes(3072), "record 1 has the label 10"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path: Path, content: bytes, message: str) -> None:
    source = made(tmp_path, data_batch_1=content)
    with pytest.raises(DataError, match=message):
        cifar10.recipe("c", source)


def test_sources_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"source=.*nothing cannot be read .*give the folder that holds data_batch_1.bin"
    ):
        cifar10.recipe("c", tmp_path / "nothing")
    with pytest.raises(DataError, match=r"has no data_batch_1.bin, nor has a folder in it"):
        cifar10.recipe("c", tmp_path)
    for name in "ab":
        made(tmp_path / name)
    with pytest.raises(DataError, match=r"/a, .*/b all hold such files; give one of them"):
        cifar10.recipe("c", tmp_path)
    for path in (tmp_path / "a").glob("data_batch*"):
        path.unlink()
    with pytest.raises(DataError, match="has no training batch"):
        cifar10.recipe("c", tmp_path / "a")


def test_archives_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    for content in (b"", b"text", gzip.compress(b"text" * 999), packed(path, {"a": batch(9)}).read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz"):
            cifar10.recipe("c", path)
    packed(path, {"data_batch_1.bin": b""}, tarfile.SYMTYPE)
    with pytest.raises(DataError, match="has no training batch"):
        cifar10.recipe("c", path)
    packed(path, {"data_batch_1.bin": bytes(31_000_000)})
    with pytest.raises(DataError, match=r"data_batch_1.bin has 31000000 bytes, expected one of at most 30730001"):
        cifar10.recipe("c", path)
    packed(path, {"a/test_batch.bin": batch(1), "b/test_batch.bin": batch(1)})
    with pytest.raises(DataError, match="is there twice"):
        cifar10.recipe("c", path)
    packed(path, {"data_batch_1.bin": batch(1)})
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(DataError, match="CRC"):
        cifar10.recipe("c", path)


def test_an_archive_that_expands_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header may claim 8 GB of name for itself, which a careless reader would hold in memory."""
    monkeypatch.setattr(cifar10, "RECORDS", 10)
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 8 * 2**30 - 1
    path = tmp_path / "cifar-10-binary.tar.gz"
    block = gzip.compress(bytes(2**20))
    with path.open("wb") as file:
        file.write(gzip.compress(header.tobuf(tarfile.GNU_FORMAT)))
        for _ in range(20):
            file.write(block)
    with pytest.raises(DataError, match="unpacks to more than"):
        cifar10.recipe("c", path)


@given(content=st.binary(max_size=3100) | st.integers(0, 3073 * 2 + 5).map(lambda n: batch(3)[:n]))
def test_whatever_the_bytes_are_they_are_records_or_refused(content: bytes) -> None:
    try:
        images, labels = cifar10.parse(content, Path("file"))
    except DataError as error:
        assert str(error).startswith("file: ")
    else:
        assert len(content) == 3073 * len(images) > 0 and set(labels) <= {*range(10)}


@given(damage=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_archives_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, int]]
) -> None:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("x/data_batch_1.bin", "é" * 60 + "/test_batch.bin"):
            member = tarfile.TarInfo(name)
            member.size = 3073
            archive.addfile(member, io.BytesIO(batch(1)))
    content = bytearray(tar.getvalue())
    for place, value in damage:
        content[place % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.tar.gz"
    path.write_bytes(gzip.compress(content, 1))
    try:
        table = cifar10.recipe("c", path)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert len(table) in (1, 2)


def test_the_real_set_equals_an_independent_reading(data_source: Path) -> None:
    table = cifar10.recipe("cifar10", data_source)
    assert table.names["label"] == META.decode().split()
    image, label, folder, seen = table.arrays["image"], table.columns["label"], data_source / "cifar-10-batches-bin", 0
    for path in (*sorted(folder.glob("data_batch_*.bin")), folder / "test_batch.bin"):
        content = path.read_bytes()
        n = len(content) // 3073
        np.testing.assert_array_equal(label[seen : seen + n], np.frombuffer(content, np.uint8)[::3073])
        for k in (0, 1, n // 2, n - 1):
            assert np.moveaxis(image[seen + k], -1, 0).tobytes() == content[3073 * k + 1 : 3073 * (k + 1)]
        seen += n
    assert table.attributes["complete"] == [seen, 60_000] and len(table) == seen
    assert np.bincount(label[table.rows("test")]).tolist() == [1000] * 10
    train = image[table.rows("train")[::5]].reshape(-1, 3) / np.float32(255)
    # The constants that every CIFAR-10 recipe normalises with: the channels are R, G, B in this order.
    np.testing.assert_allclose(train.mean(0, dtype=np.float64), [0.4914, 0.4822, 0.4465], atol=5e-3)
    np.testing.assert_allclose(train.std(0, dtype=np.float64), [0.2470, 0.2435, 0.2616], atol=5e-3)
