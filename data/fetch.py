"""Downloading the public files of a data set: https only, to a temporary file first, bounded, checked."""

from __future__ import annotations

import hashlib
import http.client
import os
import secrets
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit

from polydiff.core.errors import DataError
from polydiff.data.source import reason

BLOCK = 2**20
SECONDS = 60.0  # without a byte
MAX_BYTES = 2**33


def fetch(name: str, urls: Sequence[str], folder: Path, digests: Sequence[str] = (), limit: int = MAX_BYTES) -> Path:
    """Have the files of a data set in a folder; those that are there with the right digest are kept.

    Args:
        name: the data set, for messages.
        urls: of the files, https (or http on this machine).
        folder: where to put them, made if missing.
        digests: ``md5:...`` or ``sha256:...`` of each file, or none at all, which downloads again every time.
        limit: largest size of a file.
    Returns:
        The folder.
    Raises:
        DataError: no connection, another answer than the whole file, a wrong digest, too large, a full disk.
    """
    for url, digest in zip(urls, digests or [""] * len(urls), strict=True):
        path = folder / unquote(PurePosixPath(urlsplit(url).path).name)
        if digest and path.is_file() and _digest(path, digest) == digest:
            continue
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _stream(url, temporary, limit)
            if digest and (found := _digest(temporary, digest)) != digest:
                raise ValueError(f"what came has the digest {found}, expected {digest}")
            temporary.replace(path)
        except (URLError, http.client.HTTPException, OSError, ValueError) as error:
            raise DataError(
                f"{name}: cannot download {url} ({_why(error)}); get the files by another way and give their folder: "
                f"polydiff data {name} source=PATH"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
    return folder


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects that stay on permitted addresses."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """As the parent, after a look at the new address."""
        _permit(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _stream(url: str, path: Path, limit: int) -> None:
    from tqdm import tqdm

    _permit(url)
    request = urllib.request.Request(url, headers={"User-Agent": "polydiff"})  # noqa: S310  permitted above
    with urllib.request.build_opener(_Redirects).open(request, timeout=SECONDS) as answer, path.open("xb") as file:
        total = int(answer.headers.get("Content-Length") or 0)
        if total > limit:
            raise ValueError(f"{total} bytes, at most {limit} are taken")
        with tqdm(total=total or None, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1], disable=None) as bar:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
                if file.tell() > limit:
                    raise ValueError(f"more than {limit} bytes, at most {limit} are taken")
        if total and file.tell() != total:
            raise ValueError(f"it broke off after {file.tell()} of {total} bytes")


def _permit(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")):
        raise ValueError(f"{url} is not an https address")


def _digest(path: Path, like: str) -> str:
    kind = like.partition(":")[0]
    with path.open("rb") as file:
        return f"{kind}:{hashlib.file_digest(file, partial(hashlib.new, kind, usedforsecurity=False)).hexdigest()}"


def _why(error: BaseException) -> str:
    if isinstance(error, HTTPError):
        return f"the server says {error.code} {error.reason}"
    if isinstance(error, URLError):
        return reason(error.reason) if isinstance(error.reason, BaseException) else str(error.reason)
    return reason(error)
