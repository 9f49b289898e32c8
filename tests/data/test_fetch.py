"""Downloads, from a server on this machine that can misbehave."""

import dataclasses
import gzip
import hashlib
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.data.test_mnist import made

from polydiff import data
from polydiff.core.errors import DataError
from polydiff.data import h5, mnist
from polydiff.data.fetch import fetch

CONTENT = os.urandom(3_000_000)
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"  # noqa: S324


class Handler(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        if self.path == "/missing":
            self.send_error(404)
        elif self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header(
                "Location", {"there": "/file", "file": "file:///etc/passwd", "out": "http://0.0.0.0/x"}[name]
            )
            self.end_headers()
        else:
            content = self.files.get(name, CONTENT)
            self.send_response(200)
            if name != "endless":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: 1_000_000 if name == "broken" else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    Handler.files, Handler.asked = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_file_comes_whole_and_is_kept_if_its_digest_is_known(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        assert fetch("set", [f"{server}/file"], folder, [MD5]) == folder
    assert (folder / "file").read_bytes() == CONTENT
    assert Handler.asked == ["/file"]
    (folder / "file").write_bytes(CONTENT[:-1])
    fetch("set", [f"{server}/to/there"], folder)
    assert (folder / "there").read_bytes() == CONTENT
    fetch("set", [f"{server}/file"], folder, [f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"])
    assert sorted(path.name for path in folder.iterdir()) == ["file", "there"]
    assert (folder / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "the server says 404 Not Found"),
        ("broken", "it broke off after 1000000 of 3000000 bytes"),
        ("large", "3000002 bytes, at most 3000001 are taken"),
        ("endless", "more than 3000001 bytes"),
        ("to/file", "Redirection to url 'file:///etc/passwd' is not allowed"),
        ("to/out", "http://0.0.0.0/x is not an https address"),
        ("wrong", "what came has the digest md5:.*expected md5:"),
    ],
)
def test_what_goes_wrong_is_one_line_and_leaves_nothing(server: str, tmp_path: Path, path: str, message: str) -> None:
    Handler.files = {"large": CONTENT + b"!!", "endless": CONTENT + b"!!", "wrong": CONTENT[::-1]}
    with pytest.raises(DataError, match=rf"set: cannot download .*{message}.*polydiff data set source=PATH") as caught:
        fetch("set", [f"{server}/{path}"], tmp_path, [MD5], limit=len(CONTENT) + 1)
    assert "\n" not in str(caught.value)
    assert [*tmp_path.iterdir()] == []


def test_without_a_connection_and_with_an_address_that_is_not_permitted(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/file"
    for address, message in (
        (url, "refused"),
        ("https://set.invalid/file", "not known|resolution|unreachable|refused"),
        ("http://example.org/file", "not an https address"),
        ("file:///etc/passwd", "not an https address"),
    ):
        with pytest.raises(DataError, match=f"({message}).*give their folder: polydiff data set source=PATH"):
            fetch("set", [address], tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_a_public_set_is_downloaded_where_no_source_is_given(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{name}.gz" for name in mnist.MD5]
    source = made(tmp_path / "source")
    Handler.files = {name: (source / name).read_bytes() for name in names}
    digests = tuple(f"md5:{hashlib.md5(Handler.files[name]).hexdigest()}" for name in names)  # noqa: S324
    urls = tuple(f"{server}/{name}" for name in names)
    entry = dataclasses.replace(data.catalogue()["mnist"], urls=urls, digests=digests)
    monkeypatch.setattr(data, "catalogue", lambda: {"mnist": entry})
    reader = h5.Reader(data.prepare("mnist", folder=tmp_path / "cache"))
    assert reader.attributes["complete"] == [8, 70_000] and reader.attributes["source"] == " ".join(urls)
    data.prepare("mnist", folder=tmp_path / "cache")
    assert len(Handler.asked) == 4, "the second time the files are there"
    content = gzip.decompress((tmp_path / "cache" / "downloads" / "mnist" / names[1]).read_bytes())
    assert [*content[8:]] == reader.columns["label"][:5].tolist()


def test_every_address_of_the_catalogue_is_permitted_and_has_a_digest() -> None:
    for name, entry in data.catalogue().items():
        if not entry.embedded:
            assert len(entry.digests) == len(entry.urls), name
            assert all(url.startswith("https://") for url in entry.urls), name
