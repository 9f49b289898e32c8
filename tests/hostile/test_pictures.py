"""Folders of pictures as people have them: odd, broken and malicious files are read rightly or skipped with a reason."""

import io
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from polydiff import data
from polydiff.core.errors import DataError
from polydiff.data import h5, imagefolder
from polydiff.data.pictures import Fit

PIXELS = np.random.RandomState(0).randint(256, size=(8, 8, 3)).astype(np.uint8)
FIT = Fit(height=8, width=8)


def bytes_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(PIXELS).convert(mode)


def read(path: Path, content: bytes, channels: int = 3) -> np.ndarray:
    path.write_bytes(content)
    return FIT.read(path, channels)


def png(width: int, height: int, depth: int = 8, kind: int = 2, rows: bytes = b"") -> bytes:
    """A PNG by its specification: signature, IHDR, one IDAT, IEND."""
    header = struct.pack(">2I5B", width, height, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel_whatever_the_name(tmp_path: Path, format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(read(tmp_path / "picture.txt", bytes_of(picture(), format, **options)), PIXELS)


def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(read(tmp_path / "a", png(8, 8, 16, 0, rows), 1)[..., 0], expected)
    tiff = bytes_of(Image.fromarray(values.astype(np.uint16)), "TIFF")
    np.testing.assert_array_equal(read(tmp_path / "a", tiff, 1)[..., 0], expected)
    colour = np.repeat(values[..., None], 3, 2)
    rows = b"".join(b"\0" + row.tobytes() for row in colour)
    found = read(tmp_path / "a", png(8, 8, 16, 2, rows)).astype(int)
    assert np.abs(found - expected[..., None]).max() <= 1, "three channels of 16 bits lose their low byte in Pillow"


def test_values_without_a_known_white_are_refused(tmp_path: Path) -> None:
    for array in (np.ones((8, 8), np.float32), np.ones((8, 8), np.int32)):
        with pytest.raises(DataError, match="32 bits a pixel"):
            read(tmp_path / "a", bytes_of(Image.fromarray(array), "TIFF"))


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    alpha = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8, 1)
    weight = alpha / 255
    expected = PIXELS * weight + 255 * (1 - weight)
    content = bytes_of(Image.fromarray(np.concatenate([PIXELS, alpha], 2)))
    np.testing.assert_allclose(read(tmp_path / "a", content), expected, atol=1)
    grey = np.concatenate([PIXELS[..., :1], alpha], 2)
    np.testing.assert_allclose(
        read(tmp_path / "a", bytes_of(Image.fromarray(grey, "LA")), 1), expected[..., :1], atol=1
    )
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 200, 100, 50])
    assert (read(tmp_path / "a", bytes_of(palette)) == (200, 100, 50)).all()
    assert (read(tmp_path / "a", bytes_of(palette, transparency=1)) == 255).all()
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    found = read(tmp_path / "a", bytes_of(Image.fromarray(values), transparency=7), 1)[..., 0]
    np.testing.assert_array_equal(found, np.where(values == 7, 255, values))


def test_cmyk_is_converted(tmp_path: Path) -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for content in (bytes_of(ink, "TIFF"), bytes_of(ink, "JPEG", quality=95)):
        found = read(tmp_path / "a", content)
        assert (found[..., 0] > 250).all() and (found[..., 1:] < 5).all(), "no cyan, all magenta and yellow: red"


def test_animations_give_their_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
        content = bytes_of(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (read(tmp_path / "a", content) == (255, 0, 0)).all(), format


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_as_their_camera_was_held(tmp_path: Path, orientation: int) -> None:
    """By the EXIF specification: which side of the scene row 0 and column 0 of the file show."""
    turned = [
        PIXELS,
        PIXELS[:, ::-1],
        PIXELS[::-1, ::-1],
        PIXELS[::-1],
        PIXELS.swapaxes(0, 1),
        PIXELS.swapaxes(0, 1)[:, ::-1],
        PIXELS.swapaxes(0, 1)[::-1, ::-1],
        PIXELS.swapaxes(0, 1)[::-1],
    ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read(tmp_path / "a", bytes_of(picture(), exif=exif)), turned[orientation - 1])


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (1, 1), (3, 300)])
def test_slivers_are_refused_for_what_they_are(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", size).save(path)
    for crop in ("center", "none"):
        with pytest.raises(
            DataError, match=f"{size[0]} x {size[1]} pixels would be enlarged more than 2 times to 8 x 8"
        ):
            Fit(height=8, width=8, crop=crop).read(path)
    assert Fit(height=1, width=1).read(path).shape == (1, 1, 3)
    assert Fit(height=8, width=8, enlarge=20.0).read(path).shape == (8, 8, 3)


def test_a_long_strip_is_read_in_its_middle(tmp_path: Path) -> None:
    strip = np.zeros((8, 20_000, 3), np.uint8)
    strip[:, 9996:10_004] = PIXELS
    np.testing.assert_array_equal(read(tmp_path / "a", bytes_of(Image.fromarray(strip))), PIXELS)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    tracemalloc.start()
    for width, height in ((2**13, 2**13 + 1), (60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(
            DataError, match=r"pixels, at most 67108864 are read|decompression bomb|damaged at its start"
        ):
            read(tmp_path / "a", png(width, height, rows=bytes(1000)))
    gif = (
        b"GIF89a"
        + struct.pack("<2H3B", 65535, 65535, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<4HB", 0, 0, 65535, 65535, 0)
    )
    with pytest.raises(DataError):
        read(tmp_path / "a", gif + b"\x02\x01\x44\x00;")
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated_files_are_refused(tmp_path: Path, format: str) -> None:
    noise = Image.fromarray(np.random.RandomState(1).randint(256, size=(64, 64, 3)).astype(np.uint8))
    content = bytes_of(noise, format)
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(DataError):
            read(tmp_path / "a", content[: int(share * len(content))])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"just text\n", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) show\n", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "not a picture"),
        (b"\xff\xd8\xff\xe0", "not a picture|truncated|broken"),
    ],
)
def test_other_files_are_not_pictures(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.png", content)


def _mixed() -> dict[bytes, bytes]:
    return {
        b"good.png": bytes_of(picture()),
        b"notes.txt": b"text",
        b"empty.jpg": b"",
        b"half.png": bytes_of(picture())[:-60],
        b"strip.png": bytes_of(Image.new("L", (20_000, 1))),
        b"odd \xff\xfe.png": bytes_of(picture()),
        "ünï\ncode.png".encode(): bytes_of(picture()),
    }


def test_a_folder_of_everything_is_read_and_the_rest_is_listed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("a", "b"):
        folder = source / name
        folder.mkdir(parents=True)
        for file, content in _mixed().items():
            Path(os.fsdecode(os.path.join(os.fsencode(folder), file))).write_bytes(content)  # noqa: PTH118
    (source / "a" / "loop").symlink_to(source)
    (source / "b" / "itself").symlink_to("itself")
    (source / "b" / "nowhere.png").symlink_to("nothing")
    (source / "b" / "linked.png").symlink_to("good.png")
    (source / ".thumbnails").mkdir()
    os.mkfifo(source / "b" / "pipe.png")  # opening it would wait for ever
    path = data.prepare("imagefolder", source, folder=tmp_path, name="mixed", size=8)
    reader = h5.Reader(path)
    ids = ["good.png", "odd \\xff\\xfe.png", "ünï\\ncode.png"]
    assert [*reader.columns["id"]] == [f"{x}/{i}" for x in "ab" for i in sorted([*ids, *["linked.png"] * (x == "b")])]
    listed = dict(line.split(": ", 1) for line in data.skipped_list(path).read_text(encoding="utf-8").splitlines())
    reasons = {
        ".thumbnails": "hidden folder",
        "a/loop": "a link to a folder that is read under another name",
        "b/itself": "Too many levels of symbolic links",
        "b/nowhere.png": "No such file or directory",
        "b/pipe.png": "neither a file nor a folder",
    }
    for name in "ab":
        reasons |= {
            f"{name}/empty.jpg": "empty file",
            f"{name}/strip.png": "20000 x 1 pixels would be enlarged more than 2 times to 8 x 8",
            f"{name}/notes.txt": "not a picture",
            f"{name}/half.png": "",
        }
    assert listed.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert listed[name].startswith(reason) and listed[name], name


def test_nothing_left_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no picture in .* can be read \(0 files skipped\)$"):
        imagefolder.recipe("c", tmp_path)
    for k in range(5):
        (tmp_path / f"{k}.txt").write_text("text")
    with pytest.raises(DataError, match=r"\(5 files skipped\); 0.txt: not a picture .*; 2.txt: [^;]*$") as caught:
        data.prepare("imagefolder", tmp_path, folder=tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def _as_nobody(source: Path, queue: Any) -> None:
    os.chdir(source)  # the folders above it belong to the one who runs the tests
    if os.geteuid() == 0:
        os.seteuid(65534)
    table = imagefolder.recipe("c", Path(), size=8)
    queue.put((table.columns["id"].tolist(), table.skipped))


def test_what_may_not_be_read_is_listed(tmp_path: Path) -> None:
    import multiprocessing

    for name in ("open.png", "closed.png", "folder/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes_of(picture()))
    tmp_path.chmod(0o755)
    for name in ("closed.png", "folder"):
        (tmp_path / name).chmod(0)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_as_nobody, args=(tmp_path, queue))
    child.start()
    child.join(timeout=30)
    (tmp_path / "folder").chmod(0o755)
    assert child.exitcode == 0
    ids, skipped = queue.get()
    assert ids == ["open.png"]
    assert skipped == [("closed.png", "Permission denied"), ("folder", "Permission denied")]


def test_a_full_temporary_folder_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

    (tmp_path / "a.png").write_bytes(bytes_of(picture()))
    monkeypatch.setattr(imagefolder.tempfile, "TemporaryFile", Full)
    with pytest.raises(DataError, match=r"temporary folder .* \(No space left on device\); set TMPDIR"):
        imagefolder.recipe("c", tmp_path, size=8)


def test_memory_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    content = bytes_of(Image.new("RGB", (64, 64), "red"), "JPEG")
    peaks = []
    for n in (256, 768):
        folder = tmp_path / str(n)
        folder.mkdir()
        for k in range(n):
            (folder / f"{k}.jpg").write_bytes(content)
        tracemalloc.start()
        table = imagefolder.recipe("c", folder, size=64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(table) == n
    assert peaks[1] - peaks[0] < 512 * 64 * 64 * 3 / 4, "the pictures themselves are on the disk"


GOOD: list[Callable[[], bytes]] = [
    lambda: bytes_of(picture()),
    lambda: bytes_of(picture(), "JPEG"),
    lambda: bytes_of(picture("P"), "GIF"),
    lambda: bytes_of(picture(), "TIFF", compression="tiff_lzw"),
    lambda: bytes_of(picture("RGBA"), "WEBP"),
    lambda: bytes_of(picture(), "BMP"),
]


@given(
    st.sampled_from(range(len(GOOD))), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_damaged_pictures_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: int, damage: list[tuple[float, int]]
) -> None:
    content = bytearray(GOOD[kind]())
    for place, value in damage:
        content[int(place * (len(content) - 1))] = value
    try:
        found = read(tmp_path_factory.getbasetemp() / "damaged", bytes(content))
    except DataError as error:
        assert str(error).strip() and "\n" not in str(error)
    else:
        assert found.shape == (8, 8, 3) and found.dtype == np.uint8
