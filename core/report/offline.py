"""What keeps a page offline: find outside addresses, forbid them to the browser, move what is too heavy beside the page."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

LIMIT = 20_000_000  # bytes of one page before what it embeds moves to files beside it
FOLDER = "index_files"

FETCHED = frozenset(
    [
        "src",
        "href",
        "srcset",
        "action",
        "formaction",
        "poster",
        "data",
        "background",
        "ping",
        "cite",
        "manifest",
        "longdesc",
        "xlink:href",
        "imagesrcset",
    ]
)
_CSS = re.compile(r"""url\(\s*['"]?([^'")]*)|@import\s+['"]([^'"]*)""", re.IGNORECASE)
_CALL = re.compile(
    r"""\b(?:fetch|import|importScripts|open|sendBeacon|EventSource|WebSocket|Worker)\s*\(\s*['"`]"""
    r"""\s*((?:[a-z][a-z0-9+.-]*:)?//[^'"`]*)|\b(?:from|import)\s*['"]((?:https?:)?//[^'"]*)""",
    re.IGNORECASE,
)
_EMBEDDED = re.compile(r'(?<=src=")data:(\w+)/([\w.+-]+);base64,([A-Za-z0-9+/=]+)(?=")')
_EXTENSIONS = {"jpeg": "jpg", "svg+xml": "svg", "mpeg": "mp3", "x-wav": "wav", "gltf-binary": "glb"}


class _Addresses(HTMLParser):
    """Collects every address that a page may load from or lead to."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag if tag in ("style", "script") else ""
        given = {name: value or "" for name, value in attrs}
        for name, value in given.items():
            if name in ("srcset", "imagesrcset"):
                # A data: address holds commas of its own; only a comma followed by a space parts candidates there.
                self.found += [part.split()[0] for part in re.split(r",\s+", value) if part.strip()]
            elif name in FETCHED:
                self.found.append(value)
            elif name == "srcdoc":
                self.found += _addresses(value)
            elif name == "style":
                self._css(value)
        if tag == "meta" and given.get("http-equiv", "").lower() == "refresh":
            self.found.append(given.get("content", "").partition("=")[2].strip(" '\""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self._css(data)
        elif self.inside == "script":
            self.found += [first or second for first, second in _CALL.findall(data)]

    def _css(self, text: str) -> None:
        self.found += [first or second for first, second in _CSS.findall(text)]


def _addresses(html: str) -> list[str]:
    parser = _Addresses()
    parser.feed(html)
    parser.close()
    return parser.found


def outside_addresses(html: str) -> list[str]:
    """Addresses in a page that are neither ``data:`` or ``blob:``, nor a ``#fragment``, nor relative to the page.

    Looks at every attribute a browser loads from or navigates to, at ``url(...)`` and ``@import`` in styles, and at
    calls with a literal address in scripts. Namespace strings (``xmlns``) are names, not addresses.

    Args:
        html: a page or a piece of one.
    """
    outside = []
    for address in _addresses(html):
        # Browsers drop tabs and line breaks inside an address, strip the ends, and read a backslash as a slash.
        plain = re.sub(r"[\t\r\n]", "", address).strip("\0 \x1f").replace("\\", "/").lower()
        has_scheme = re.match(r"[a-z][a-z0-9+.-]*:", plain)
        if plain.startswith("//") or (has_scheme and not plain.startswith(("data:", "blob:"))):
            outside.append(address)
    return outside


def policy(scripts: Mapping[str, str]) -> str:
    """A content security policy under which a page reaches nothing outside and runs exactly ``scripts``.

    Scripts are allowed by their SHA-256, so a script that reached the page in any other way is not run.

    Args:
        scripts: texts as they stand between the script tags, by name.
    """
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts.values())
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    near = "'self' file: data: blob:"  # files beside the page: 'self' when it is served, file: when it is opened
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src {near}; media-src {near}; "
        "font-src data:; worker-src blob:; base-uri 'none'; form-action 'none'"
    )


def inline(script: str) -> str:
    """A script as it may stand between script tags: nothing in it closes the tag, line ends as a parser reads them."""
    text = script.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"<(?=/script|!--)", r"\\x3C", text, flags=re.IGNORECASE)


def spill(html: str, limit: int = LIMIT) -> tuple[str, dict[str, bytes]]:
    """Move embedded files out of a page that is too heavy, the largest first.

    Args:
        html: the page.
        limit: bytes the page may have.
    Returns:
        The page, and the files to put into ``FOLDER`` beside it by name; none if the page was light enough.
    """
    size = len(html.encode())
    if size <= limit:
        return html, {}
    moved: dict[str, bytes] = {}
    names: dict[str, str] = {}
    for match in sorted(_EMBEDDED.finditer(html), key=lambda match: -len(match[0])):
        if size <= limit:
            break
        if match[0] not in names:
            content = base64.b64decode(match[3])
            extension = _EXTENSIONS.get(match[2], re.sub(r"\W", "", match[2]))
            names[match[0]] = name = f"{hashlib.sha256(content).hexdigest()[:16]}.{extension}"
            moved[name] = content
        size -= len(match[0]) - len(f"{FOLDER}/{names[match[0]]}")
    return _EMBEDDED.sub(lambda m: f"{FOLDER}/{names[m[0]]}" if m[0] in names else m[0], html), moved


def embed(path: Path, kind: str = "image/png") -> str:
    """The content of a file as a ``data:`` address."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
