"""Any folder of pictures as a data set: one sub-folder a class, equal sizes, what cannot be read listed with a reason."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple

import numpy as np

from polydiff.core.errors import ConfigError, DataError, unknown
from polydiff.data.pictures import CROPS, Fit, decoders
from polydiff.data.source import check_folder, reason
from polydiff.data.table import Table

SPLITS = {"train": "train", "test": "test", "valid": "valid", "val": "valid", "validation": "valid"}
CLASSES = {
    "top": "the first folder below the root, whatever is nested in it",
    "path": "all folders between the root and the picture, as in cats/tabby",
    "none": "no classes",
}
AT_ONCE = 256  # pictures, small by then, that wait to be stored
THREADS = 4  # a decoded file may take 268 MB


class Found(NamedTuple):
    """A regular file: its path below the root, and that path as text."""

    path: PurePath
    id: str


def recipe(
    name: str,
    source: Path,
    *,
    size: int | Sequence[int] = 64,
    crop: str = "center",
    channels: int | None = None,
    classes: str = "top",
    test: float = 0.1,
    enlarge: float = 2.0,
) -> Table:
    """Read all pictures below a folder, in the order of their paths; how one is read is said in ``Fit``.

    Splits: if the folder has a sub-folder ``train`` and no others than ``test`` and ``valid`` (or ``val``,
    ``validation``), these are the splits, and where only one of the two is there it is ``test``. Otherwise a picture is
    for testing if SHA-256 of its path below the root, read as a fraction in [0, 1), is below ``test``. So a picture
    stays where it is when others are added. If that would leave a split empty, the picture next to the limit is moved.

    Decoded pictures wait in an unnamed temporary file (in TMPDIR), not in memory.

    Args:
        name: the data set's name.
        source: the folder. Folders that are links are followed, each folder is read once.
        size: side of the result in pixels, or [height, width].
        crop: a key of ``CROPS``.
        channels: 3, 1 (luma of ITU-R BT.601), or None: 1 if in every picture red, green and blue are equal.
        classes: a key of ``CLASSES``. Pictures in the root have none; where others have, they are skipped. A single
            class is no choice and is left out.
        test: share of the test split, where the folders do not say it.
        enlarge: see ``Fit``.
    Returns:
        ``image`` (N, height, width, channels) uint8, ``id`` the path below the root, ``label`` if there are classes.
    Raises:
        ConfigError: an option that cannot be used.
        DataError: no such folder, no picture in it can be read, or the temporary file does not fit on the disk.
    """
    sides = list(size) if isinstance(size, Sequence) and not isinstance(size, str) else [size, size]
    if len(sides) != 2:
        raise ConfigError(f"size={size}: one side, or [height,width]")
    fit = Fit(height=sides[0], width=sides[1], crop=crop, enlarge=enlarge)
    if channels is not None and (type(channels) is not int or channels not in (1, 3)):
        raise ConfigError(f"channels={channels}: must be 1, 3 or null")
    if classes not in (*CLASSES,):  # a tuple, because lists have no hash
        raise unknown("classes", str(classes), CLASSES)
    if isinstance(test, bool) or not isinstance(test, int | float) or not 0 <= test < 1:
        raise ConfigError(f"test={test}: a share, 0 or more and less than 1")
    check_folder(name, source, "a folder of pictures")

    skipped: list[tuple[str, str]] = []
    files, folders = _walk(source, skipped)
    named = _named_splits(folders)
    classed, rest = _placed(files, skipped, named, classes)
    store = _Store(name, source, fit, channels)
    if found := store.fill(classed, skipped):
        store.refuse(rest, skipped, "in no class folder, others are; classes=none takes all")
    else:
        found = store.fill(rest, skipped)
    skipped.sort()
    if not found:
        first = "".join(f"; {file}: {why}" for file, why in skipped[:3])
        raise DataError(f"{name}: no picture in {source} can be read ({len(skipped)} files skipped){first}")

    image, ids = store.array(len(found)), [file.id for file in found]
    splits = [named[file.path.parts[0]] for file in found] if named else _shared(ids, test)
    labels = np.array([_class(file, bool(named), classes) for file in found])
    texts, indices = np.unique(labels, return_inverse=True)
    columns: dict[str, Any] = {"id": np.array(ids), "split": np.array(splits)}
    if has_classes := len(texts) > 1:
        columns["label"] = indices.astype(np.int64)
    rule = "by the folders" if named else f"{100 * test:g} % by hash of the path"
    about = (
        f"{len(found)} pictures of {fit.height}x{fit.width}x{image.shape[-1]}: {CROPS[crop]}, Lanczos, over white; "
        f"{len(texts) if has_classes else 'no'} classes{'' if has_classes or not texts[0] else f' (all in {texts[0]})'}; "
        f"test split {rule}"
    )
    return Table(
        arrays={"image": image},
        columns=columns,
        names={"label": texts.tolist()} if has_classes else {},
        attributes={"units": "grey level 0..255", "normalisation": "x / 127.5 - 1", "preparation": about},
        skipped=skipped,
    )


def _walk(root: Path, skipped: list[tuple[str, str]]) -> tuple[list[Found], list[str]]:
    """All regular files, sorted, and the names of the folders at the top; everything else goes to ``skipped``."""
    files, top, seen = [], [], {_identity(root.stat())}
    waiting = [PurePath()]
    while waiting:
        folder = waiting.pop()
        try:
            # Links last: a folder that is there and linked as well is read under its own name.
            entries = sorted(os.scandir(root / folder), key=lambda entry: (entry.is_symlink(), os.fsencode(entry.name)))
        except OSError as error:
            skipped.append((_text(folder), reason(error)))
            continue
        below = []
        for entry in entries:
            path = folder / entry.name
            try:
                status = entry.stat()
            except OSError as error:
                skipped.append((_text(path), reason(error)))
                continue
            if stat.S_ISREG(status.st_mode):
                files.append(Found(path, _text(path)))
            elif not stat.S_ISDIR(status.st_mode):
                skipped.append((_text(path), "neither a file nor a folder"))
            elif entry.name.startswith("."):
                skipped.append((_text(path), "hidden folder"))
            elif _identity(status) in seen:
                skipped.append((_text(path), "a link to a folder that is read under another name"))
            else:
                seen.add(_identity(status))
                below.append(path)
        top += [path.name for path in below if not folder.parts]
        waiting += reversed(below)
    return sorted(files, key=lambda file: os.fsencode(file.path)), top


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _text(path: PurePath) -> str:
    """A path as text that a file and a screen can hold, whatever bytes its names are made of."""
    text = os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _named_splits(folders: list[str]) -> dict[str, str]:
    """Split by folder at the top, or nothing where the folders there are not splits."""
    if "train" not in folders or len(folders) < 2 or not {*folders} <= SPLITS.keys():
        return {}
    named = {folder: SPLITS[folder] for folder in folders}
    return named if "test" in named.values() else {**dict.fromkeys(named, "test"), "train": "train"}


def _class(file: Found, named: bool, classes: str) -> str:
    parts = PurePath(file.id).parts[int(named) : -1]
    return "/".join({"top": parts[:1], "path": parts, "none": ()}[classes])


def _placed(
    files: list[Found], skipped: list[tuple[str, str]], named: dict[str, str], classes: str
) -> tuple[list[Found], list[Found]]:
    """The files in a class and those in none, without those in no split and those whose id is another's too."""
    classed: list[Found] = []
    rest: list[Found] = []
    seen: set[str] = set()
    for file in files:
        if named and len(file.path.parts) < 2:
            skipped.append((file.id, "beside the folders of the splits"))
        elif file.id in seen:
            skipped.append((file.id, "another file's path reads the same"))
        else:
            (classed if _class(file, bool(named), classes) else rest).append(file)
            seen.add(file.id)
    return classed, rest


def _shared(ids: list[str], test: float) -> list[str]:
    place = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 for text in ids]
    is_test = [where < test for where in place]
    if test and len(ids) > 1 and len({*is_test}) == 1:
        edge = place.index(max(place) if is_test[0] else min(place))
        is_test[edge] = not is_test[edge]
    return ["test" if chosen else "train" for chosen in is_test]


class _Store:
    """Pictures one after another in an unnamed temporary file."""

    def __init__(self, name: str, root: Path, fit: Fit, channels: int | None):
        self.name, self.root, self.fit, self.channels, self.is_grey = name, root, fit, channels, True
        self.file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  the array that maps it outlives every scope

    def fill(self, files: list[Found], skipped: list[tuple[str, str]]) -> list[Found]:
        """Decode and store what can be read, and return that; the rest goes to ``skipped``."""
        found = []
        try:
            for file, picture in self._pictures(files):
                if isinstance(picture, str):
                    skipped.append((file.id, picture))
                    continue
                self.is_grey = self.is_grey and bool((picture == picture[:, :, :1]).all())
                self.file.write(picture.tobytes())
                found.append(file)
            self.file.flush()
        except OSError as error:
            raise DataError(
                f"{self.name}: the pictures do not fit into the temporary folder {tempfile.gettempdir()} "
                f"({reason(error)}); set TMPDIR to a folder with more space"
            ) from error
        return found

    def refuse(self, files: list[Found], skipped: list[tuple[str, str]], why: str) -> None:
        """Put files into ``skipped``: the pictures among them for the reason given, others for their own."""
        for file, picture in self._pictures(files):
            skipped.append((file.id, picture if isinstance(picture, str) else why))

    def array(self, n: int) -> np.ndarray:
        """The ``n`` pictures stored, (n, height, width, channels), mapped from the file."""
        shape = (n, self.fit.height, self.fit.width, self.channels or 3)
        stored = np.memmap(self.file, np.uint8, "r", shape=shape)
        return stored[..., :1] if self.channels is None and self.is_grey else stored

    def _pictures(self, files: list[Found]) -> Iterator[tuple[Found, np.ndarray | str]]:
        from tqdm import tqdm

        bar = tqdm(total=len(files), desc=self.name, unit=" files", disable=None)
        with decoders(), ThreadPoolExecutor(THREADS) as pool, bar:
            for start in range(0, len(files), AT_ONCE):
                some = files[start : start + AT_ONCE]
                yield from zip(some, pool.map(self._picture, some), strict=True)
                bar.update(len(some))

    def _picture(self, file: Found) -> np.ndarray | str:
        try:
            return self.fit.read(self.root / file.path, self.channels or 3)
        except DataError as error:
            return str(error)
