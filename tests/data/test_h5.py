"""The file layout: what is written is what is read, and a target is never left half written."""

import multiprocessing
import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from polydiff.core.errors import DataError
from polydiff.data import Table, h5

ATTRIBUTES = {"name": "made", "modality": "image", "sigma_data": 0.5, "complete": [6, 7], "licence": "CC BY 4.0, é"}


def fixed(**changes) -> Table:
    random = np.random.RandomState(0)
    table = {
        "arrays": {"image": random.randint(0, 256, (6, 3, 4, 1)).astype(np.uint8), "y": random.uniform(size=(6,))},
        "columns": {
            "id": np.array(["a", "b", "c", "d", "é", "f, g"]),
            "split": np.array(["train", "test", "train", "train", "test", "train"]),
            "label": np.array([0, 1, 2, 0, 1, 2]),
            "weight": np.linspace(0, 1, 6),
        },
        "names": {"label": ["null", "eins", "zwei"]},
        "attributes": ATTRIBUTES,
    }
    return Table(**{**table, **changes})


def ragged(lengths=(3, 1, 5)) -> Table:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    xyz = np.random.RandomState(1).standard_normal((offsets[-1], 3)).astype(np.float32)
    n = len(lengths)
    return Table(
        arrays={"xyz": xyz, "kind": np.arange(offsets[-1], dtype=np.int8)},
        columns={"id": np.array([f"p{i}" for i in range(n)]), "split": np.array(["train"] * n)},
        offsets=offsets,
        attributes={**ATTRIBUTES, "modality": "pointcloud"},
    )


def test_items_of_one_size_come_back_exactly(tmp_path: Path) -> None:
    table = fixed()
    reader = h5.Reader(h5.write(tmp_path / "made.h5", table))
    assert len(reader) == 6 and reader.offsets is None
    assert reader.shapes == {"image": (3, 4, 1), "y": ()}
    assert {key: reader.attributes[key] for key in ATTRIBUTES} == ATTRIBUTES
    assert reader.attributes["format_version"] == 1
    for name, values in table.columns.items():
        np.testing.assert_array_equal(reader.columns[name], values)
    assert reader.names == {"label": ["null", "eins", "zwei"]}
    for i in range(6):
        np.testing.assert_array_equal(reader.item(i)["image"], table.arrays["image"][i])
        assert reader.item(i)["y"] == table.arrays["y"][i]
    rows = reader.rows("train")
    np.testing.assert_array_equal(rows, [0, 2, 3, 5])
    np.testing.assert_array_equal(reader.block(rows)["image"], table.arrays["image"][rows])
    reader.verify()


def test_ragged_items_come_back_exactly(tmp_path: Path) -> None:
    table = ragged()
    reader = h5.Reader(h5.write(tmp_path / "made.h5", table))
    assert len(reader) == 3 and reader.shapes == {"xyz": (-1, 3), "kind": (-1,)}
    np.testing.assert_array_equal(reader.offsets, [0, 3, 4, 9])
    np.testing.assert_array_equal(reader.item(1)["xyz"], table.arrays["xyz"][3:4])
    np.testing.assert_array_equal(reader.item(2)["kind"], [4, 5, 6, 7, 8])
    for index in (-1, 3):
        with pytest.raises(IndexError):
            reader.item(index)
    reader.verify()


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    """Read with h5py alone: paths, chunks, checksums, fixed-length text."""
    large = np.zeros((3, 64, 64, 3), np.uint8)
    columns = {"id": np.array(["a", "b", "c"]), "split": np.array(["train"] * 3), "label": np.array([0, 1, 1])}
    with h5py.File(h5.write(tmp_path / "f.h5", fixed(arrays={"image": large}, columns=columns))) as file:
        assert sorted(file) == ["columns", "x"]
        assert file["x/image"].chunks == (1, 64, 64, 3)
        assert file["columns/id"].dtype == np.dtype("S1")
        info = h5py.check_string_dtype(file["columns/split"].dtype)
        assert (info.encoding, info.length) == ("utf-8", 5)
        assert [name.decode() for name in file["columns/label"].attrs["names"]] == ["null", "eins", "zwei"]
        arrays = [file["x/image"], *file["columns"].values()]
        assert all(array.fletcher32 and array.compression is None for array in arrays)
    with h5py.File(h5.write(tmp_path / "r.h5", ragged())) as file:
        assert sorted(file) == ["columns", "items", "offsets"]
        assert file["items/xyz"].shape == (9, 3) and file["offsets"].dtype == np.int64
    with h5py.File(h5.write(tmp_path / "s.h5", fixed())) as file:  # small samples share a chunk
        assert file["x/image"].chunks == (6, 3, 4, 1)


def test_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    digest = fixed().sha256()
    assert h5.Reader(h5.write(tmp_path / "a.h5", fixed())).attributes["sha256"] == digest
    assert fixed(attributes={"name": "other"}).sha256() == digest
    swapped = {**fixed().arrays, "y": fixed().arrays["y"].astype(">f8")}
    assert fixed(arrays=swapped).sha256() == digest, "byte order is not content"
    changed = {**fixed().arrays, "y": fixed().arrays["y"] + 1e-16}
    assert fixed(arrays=changed).sha256() != digest
    assert fixed(names={"label": ["null", "one", "zwei"]}).sha256() != digest


def test_arrays_larger_than_a_block_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polydiff.data.table.BLOCK_BYTES", 30)
    whole = fixed().sha256()
    path = h5.write(tmp_path / "made.h5", fixed())
    monkeypatch.undo()
    np.testing.assert_array_equal(h5.Reader(path).block(np.arange(6))["image"], fixed().arrays["image"])
    assert whole == fixed().sha256()


def test_big_endian_arrays_are_read_in_native_order(tmp_path: Path) -> None:
    values = np.arange(6, dtype=">f4")
    read = h5.Reader(h5.write(tmp_path / "made.h5", fixed(arrays={"y": values}))).block(np.arange(6))["y"]
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, np.arange(6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"id": np.array(["a"] * 6), "split": np.array(["train"] * 6)}, "names": {}}, "same id"),
        ({"columns": {"id": np.array(list("abcdef"))}, "names": {}}, "id and split"),
        ({"columns": {**fixed().columns, "label": np.array([0, 1, 3, 0, 1, 2])}}, "0..3 but has 3 names"),
        ({"columns": {**fixed().columns, "label": np.zeros(6)}}, "needs integers"),
        ({"names": {"label": ["same", "same", "zwei"]}}, "must differ"),
        ({"columns": {**fixed().columns, "weight": np.zeros(5)}}, "shape"),
        ({"arrays": {"image": np.zeros((5, 2))}}, "5 rows, expected 6"),
        ({"arrays": {"y": np.array([0, 1, np.nan, 3, 4, 5])}}, "not finite"),
        ({"arrays": {}}, "no items"),
        ({"arrays": {"image": np.zeros((6, 0))}}, "no items"),
        ({"offsets": np.array([0, 1, 2, 3, 4, 5, 5])}, "offsets"),
        ({"attributes": {"name": "x", "modality": "image"}}, "sigma_data"),
    ],
)
def test_content_that_breaks_a_rule_is_not_written(tmp_path: Path, changes: dict, message: str) -> None:
    path = h5.write(tmp_path / "made.h5", fixed())
    before = path.read_bytes()
    with pytest.raises(DataError, match=message):
        h5.write(path, fixed(**changes))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["made.h5"]


def _write_on_a_small_disk(path: Path, limit: int, queue) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        h5.write(path, fixed(arrays={"image": np.ones((6, 100, 100, 1), np.uint8)}))
    except DataError as error:
        queue.put(str(error))


@pytest.mark.parametrize("limit", [0, 100, 5_000, 40_000, 61_000])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, limit: int) -> None:
    """In a process of its own: the HDF5 library kills the one in which a file cannot be closed, unless it is told a lie."""
    path = h5.write(tmp_path / "made.h5", fixed())
    before = path.read_bytes()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    writer = context.Process(target=_write_on_a_small_disk, args=(path, limit, queue))
    writer.start()
    writer.join(timeout=30)
    assert writer.exitcode == 0
    assert queue.get().startswith(f"cannot write {path}: File too large; free space")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["made.h5"]


def test_what_killed_processes_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    old, young, other = (tmp_path / f"{name}.tmp" for name in ("a.h5.12-ab", "a.h5.13-cd", "b.h5.12-ab"))
    for path in (old, young, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (0, 0))
    h5.write(tmp_path / "a.h5", fixed())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", young.name, other.name]


def test_a_folder_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="POLYDIFF_DATA"):
        h5.write(tmp_path / "file" / "made.h5", fixed())


def test_an_empty_split_names_the_ones_there_are(tmp_path: Path) -> None:
    reader = h5.Reader(h5.write(tmp_path / "made.h5", fixed()))
    with pytest.raises(DataError, match=r"'valid'; it has: test \(2\), train \(4\)"):
        reader.rows("valid")


def _sum(reader: h5.Reader, queue) -> None:
    queue.put(sum(int(reader.item(i)["image"].sum()) for i in range(len(reader))))


def test_a_forked_worker_opens_the_file_itself(tmp_path: Path) -> None:
    reader = h5.Reader(h5.write(tmp_path / "made.h5", fixed()))
    reader.item(0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_sum, args=(reader, queue))
    worker.start()
    assert queue.get(timeout=30) == int(fixed().arrays["image"].sum())
    worker.join()
    assert reader.item(0)["image"].sum() == fixed().arrays["image"][0].sum(), "the parent's handle still reads"


def test_pickling_drops_the_handle(tmp_path: Path) -> None:
    reader = h5.Reader(h5.write(tmp_path / "made.h5", fixed()))
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301 - made here
    assert copy._file is None
    reader.close()
    np.testing.assert_array_equal(copy.item(3)["image"], reader.item(3)["image"])
