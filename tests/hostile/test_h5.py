"""Files made to harm or broken by accident: each is one DataError that names the file, before anything is read."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from polydiff.core.errors import DataError
from polydiff.data import Table, h5
from polydiff.modalities.image.dataset import Images


def good(n: int = 8) -> Table:
    return Table(
        arrays={"image": np.random.RandomState(0).randint(0, 256, (n, 4, 4, 1)).astype(np.uint8)},
        columns={
            "id": np.array([str(i) for i in range(n)]),
            "split": np.array(["train"] * n),
            "label": np.arange(n) % 2,
        },
        names={"label": ["even", "odd"]},
        attributes={"name": "made", "modality": "image", "sigma_data": 0.5},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return h5.write(tmp_path / "made.h5", good())


def external_link(file: h5py.File) -> None:
    del file["x/image"]
    file["x/image"] = h5py.ExternalLink("/etc/hostname", "/x")


def soft_link(file: h5py.File) -> None:
    file["x/other"] = h5py.SoftLink("/columns/label")


def linked_group(file: h5py.File) -> None:
    file.move("x", "hidden")
    file["x"] = h5py.ExternalLink("elsewhere.h5", "/x")


def external_storage(file: h5py.File) -> None:
    del file["x/image"]
    file.create_dataset("x/image", (8, 4, 4, 1), "u1", external=[("/etc/passwd", 0, 128)])


def virtual(file: h5py.File) -> None:
    del file["x/image"]
    layout = h5py.VirtualLayout((8, 4, 4, 1), "u1")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (8, 4, 4, 1))
    file.create_virtual_dataset("x/image", layout)


def store(file: h5py.File, name: str, shape: tuple, dtype: object, **options: object) -> None:
    del file[name]
    file.create_dataset(name, shape, dtype, **options)


HUGE = (8, 2**20, 2**10, 1)
ATTACKS: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "external link": (external_link, "ExternalLink"),
    "soft link": (soft_link, "SoftLink"),
    "linked group": (linked_group, "ExternalLink"),
    "external storage": (external_storage, "another file"),
    "virtual data set": (virtual, "another file"),
    "declares 8 GiB it does not have": (
        lambda f: store(f, "x/image", HUGE, "u1", chunks=(1, 64, 64, 1), fletcher32=True),
        "declares 8589934592 bytes",
    ),
    "compressed zeros, 268 MB": (
        lambda f: store(
            f, "x/image", (8, 2**15, 2**10, 1), "u1", chunks=(1, 2**10, 2**10, 1), compression="gzip", fletcher32=True
        ),
        "no other filter",
    ),
    "giant chunk": (
        lambda f: store(
            f, "x/image", (8, 4, 4, 1), "u1", chunks=(2**29, 4, 1, 1), maxshape=(None,) * 4, fletcher32=True
        ),
        "declares",
    ),
    "column of 2^40 rows": (
        lambda f: store(f, "columns/id", (2**40,), "S8", chunks=(1024,), fletcher32=True),
        "declares 8796093022208 bytes",
    ),
    "no checksum": (lambda f: store(f, "x/image", (8, 4, 4, 1), "u1"), "fletcher32"),
    "text of any length": (
        lambda f: store(f, "columns/id", (8,), h5py.string_dtype()),
        "only numbers and fixed-length strings",
    ),
    "ragged type": (
        lambda f: store(f, "x/image", (8,), h5py.vlen_dtype(np.uint8)),
        "only numbers and fixed-length strings",
    ),
    "references": (
        lambda f: store(f, "x/image", (8,), h5py.ref_dtype),
        "only numbers and fixed-length strings",
    ),
    "compound type": (
        lambda f: store(f, "x/image", (8,), [("a", "f4"), ("b", "u1")], chunks=(8,), fletcher32=True),
        "only numbers and fixed-length strings",
    ),
    "text as values": (
        lambda f: store(f, "x/image", (8,), "S4", data=[b"abcd"] * 8, chunks=(8,), fletcher32=True),
        "only numbers",
    ),
    "a group as array": (lambda f: f["x"].create_group("nested"), "not an array"),
    "an array as group": (lambda f: (f.__delitem__("x"), f.create_dataset("x", HUGE, "u1")), "not a group"),
    "no x": (lambda f: f.__delitem__("x"), "expected x or items"),
    "no columns": (lambda f: f.__delitem__("columns"), "expected x or items"),
    "no split": (lambda f: f.__delitem__("columns/split"), "id and split"),
    "empty x": (lambda f: f.__delitem__("x/image"), "no items"),
    "unknown member": (lambda f: f.create_group("payload"), "payload"),
    "no format_version": (lambda f: f.attrs.__delitem__("format_version"), "format_version is None"),
    "later format_version": (lambda f: f.attrs.__setitem__("format_version", 2), "format_version is 2"),
    "no sigma_data": (lambda f: f.attrs.__delitem__("sigma_data"), "sigma_data"),
    "sigma_data nan": (lambda f: f.attrs.__setitem__("sigma_data", float("nan")), "not a positive number"),
    "sigma_data text": (lambda f: f.attrs.__setitem__("sigma_data", np.bytes_(b"1")), "not a positive number"),
    "object attribute": (lambda f: f.attrs.__setitem__("name", "text of any length"), "attribute 'name'"),
    "label without name": (
        lambda f: f["columns/label"].attrs.__setitem__("names", np.array([b"only"])),
        "0..1 but has 1 names",
    ),
    "fewer rows than columns": (
        lambda f: store(
            f, "x/image", (7, 4, 4, 1), "u1", data=np.ones((7, 4, 4, 1)), chunks=(7, 4, 4, 1), fletcher32=True
        ),
        "7 rows, expected 8",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_each_attack_is_refused_by_name(path: Path, attack: str) -> None:
    change, message = ATTACKS[attack]
    h5.Reader(path).close()
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=message) as caught:
        h5.Reader(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "prepare it again as it was made" in str(caught.value)


def test_offsets_that_lie_are_refused(tmp_path: Path) -> None:
    columns = {"id": np.array(["a", "b"]), "split": np.array(["train", "train"])}
    table = Table({"v": np.zeros(5)}, columns, offsets=np.array([0, 2, 5]), attributes=good().attributes)
    path = h5.write(tmp_path / "made.h5", table)
    for lie in ([0, 2, 6], [0, 7, 5], [-1, 2, 5], [1, 2, 5], [0, 0, 5], [0, 2**62, 5]):
        with h5py.File(path, "r+") as file:
            file["offsets"][:] = lie
        with pytest.raises(DataError, match=r"offsets must rise|expected"):
            h5.Reader(path)


def test_values_that_are_not_finite_are_refused_when_read(tmp_path: Path) -> None:
    table = Table({"v": np.zeros(3)}, {n: good(3).columns[n] for n in ("id", "split")}, attributes=good().attributes)
    path = h5.write(tmp_path / "made.h5", table)
    with h5py.File(path, "r+") as file:
        file["x/v"][1] = np.inf
    reader = h5.Reader(path)
    assert reader.item(0)["v"] == 0
    with pytest.raises(DataError, match="not finite in rows 1 to 1"):
        reader.item(1)


def test_changed_values_with_a_new_checksum_fail_the_digest(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["x/image"][3, 0, 0, 0] ^= 1
    with pytest.raises(DataError, match="digest"):
        h5.Reader(path).verify()


def test_missing_empty_foreign_and_truncated_files(path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file; prepare it with: polydiff data digits, or"):
        h5.Reader(tmp_path / "digits.h5")
    with pytest.raises(DataError, match="no such file; prepare it with: polydiff data imagefolder source=PATH, or"):
        h5.Reader(tmp_path / "imagefolder.h5")
    with pytest.raises(DataError, match="no such file; prepare it again as it was made"):
        h5.Reader(tmp_path / "pets.h5")
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 4, len(whole) // 2, 3 * len(whole) // 4, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="truncated or altered"):
            h5.Reader(path)
    path.write_bytes(b"PNG, in truth" * 100)
    with pytest.raises(DataError, match="truncated or altered"):
        h5.Reader(path)
    with pytest.raises(DataError, match="truncated or altered"):
        h5.Reader(tmp_path)


def test_a_flipped_bit_anywhere_is_an_error_or_harmless(path: Path) -> None:
    """Never other data: every 7th byte of the file, one bit each."""
    whole = path.read_bytes()
    reference, expected, refused = h5.Reader(path), good().arrays["image"], 0
    reference.close()
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            reader = h5.Reader(path)
        except DataError:
            refused += 1
            continue
        try:
            np.testing.assert_array_equal(reader.block(np.arange(8))["image"], expected)
            assert reader.attributes == reference.attributes and reader.names == reference.names
        except DataError:
            refused += 1
        finally:
            reader.close()
    assert refused > len(whole) // 7 // 2


def test_a_flipped_bit_in_an_image_is_found_when_it_is_read(tmp_path: Path) -> None:
    table = good(64)
    images = np.random.RandomState(1).randint(0, 256, (64, 64, 64, 1)).astype(np.uint8)
    path = h5.write(tmp_path / "made.h5", Table({"image": images}, table.columns, table.names, None, table.attributes))
    whole = bytearray(path.read_bytes())
    place = whole.index(images[40].tobytes()[:64]) + 1000
    whole[place] ^= 16
    path.write_bytes(whole)
    data = Images(path, memory_mb=0)
    assert data[39].x.shape == (1, 64, 64)
    with pytest.raises(DataError, match=r"made\.h5"):
        data[40]


def test_a_file_of_another_modality_is_refused(tmp_path: Path) -> None:
    table = good()
    other = Table(table.arrays, table.columns, table.names, None, {**table.attributes, "modality": "audio"})
    with pytest.raises(DataError, match="holds 'audio' data"):
        Images(h5.write(tmp_path / "made.h5", other))
