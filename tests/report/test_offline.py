"""The plain check for outside addresses finds every way a page has to reach out, and nothing else."""

import base64
import hashlib
import re

import pytest

from polydiff.core.report.offline import inline, outside_addresses, policy, spill

OUTSIDE = [
    '<img src="https://a.example/x.png">',
    "<img src='//a.example/x.png'>",
    "<img src=http://a.example/x.png>",
    '<img src="HtTpS://a.example/x.png">',
    '<img src=" https://a.example/x.png">',
    '<img src="ht&#10;tps://a.example/x.png">',
    '<img src="&#104;ttps://a.example/x.png">',
    r'<img src="\\a.example\x.png">',
    r'<img src="/\a.example/x.png">',
    '<img srcset="x.png 1x, https://a.example/x.png 2x">',
    '<video poster="https://a.example/x.png"></video>',
    '<audio><source src="https://a.example/x.wav"></audio>',
    '<form action="https://a.example/"></form>',
    '<button formaction="https://a.example/">x</button>',
    '<a href="https://a.example/">x</a>',
    '<a href="#x" ping="https://a.example/">x</a>',
    '<a href="javascript:alert(1)">x</a>',
    '<a href="file:///etc/hostname">x</a>',
    '<link rel="stylesheet" href="https://a.example/x.css">',
    '<script src="https://a.example/x.js"></script>',
    '<iframe src="https://a.example/"></iframe>',
    '<iframe srcdoc="&lt;img src=&quot;https://a.example/x.png&quot;&gt;"></iframe>',
    '<object data="https://a.example/x"></object>',
    '<embed src="https://a.example/x">',
    '<base href="https://a.example/">',
    '<meta http-equiv="Refresh" content="0; url=https://a.example/">',
    '<svg><image href="https://a.example/x.png"/></svg>',
    '<svg><use xlink:href="https://a.example/x.svg#a"/></svg>',
    '<p style="background: url(https://a.example/x.png)">x</p>',
    "<style>p { background: url( '//a.example/x.png' ) }</style>",
    '<style>@import "https://a.example/x.css";</style>',
    "<style>@font-face { src: URL(https://a.example/x.woff2) }</style>",
    '<script>fetch("https://a.example/x.json")</script>',
    "<script>new WebSocket('wss://a.example/')</script>",
    "<script>await import(`https://a.example/x.js`)</script>",
    '<script type="module">import x from "https://a.example/x.js"</script>',
    '<script>navigator.sendBeacon("//a.example/x", "")</script>',
]

INSIDE = [
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"></svg>',
    '<script>document.createElementNS("http://www.w3.org/2000/svg", "path")</script>',
    "<p>Read https://a.example/ or //a.example.</p>",
    '<img src="data:image/png;base64,AAAA" srcset="data:image/png;base64,AAAA 2x">',
    '<a href="#part-1">x</a><a href="samples/a%3Ab/">x</a><img src="index_files/x.png"><a href="">x</a>',
    "<style>p { background: url(data:image/png;base64,AAAA); fill: url(#gradient) }</style>",
    '<pre>fetch("https://a.example/")</pre>',
]


@pytest.mark.parametrize("html", OUTSIDE)
def test_an_outside_address_is_found(html: str) -> None:
    assert len(outside_addresses(f"<p>before</p>{html}<p>after</p>")) == 1


@pytest.mark.parametrize("html", INSIDE)
def test_what_stays_inside_is_left_alone(html: str) -> None:
    assert outside_addresses(html) == []


def test_the_policy_names_exactly_the_scripts() -> None:
    digest = base64.b64encode(hashlib.sha256(b"let a = 1").digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy({"one": "let a = 1"})
    assert "script-src 'none';" in policy({})
    assert "default-src 'none'" in policy({}) and "http" not in policy({}) and "*" not in policy({})


def test_an_inlined_script_cannot_close_its_tag() -> None:
    text = inline('const a = "</script><b>", b = "</SCRIPT>", c = "<!-- x";\r\n')
    assert re.search("</script|<!--", text, re.IGNORECASE) is None
    assert text.endswith(";\n") and r'"\x3C/script><b>"' in text


def test_a_heavy_page_gives_up_its_largest_pictures_first() -> None:
    small, large = bytes(range(90)), bytes(range(256)) * 40
    pictures = [f'<img src="data:image/png;base64,{base64.b64encode(b).decode()}">' for b in (small, large, small)]
    html = "".join(pictures)
    assert spill(html, limit=len(html)) == (html, {})
    light, files = spill(html, limit=2000)
    (name,) = files
    assert files[name] == large and name.endswith(".png")
    assert light == f'{pictures[0]}<img src="index_files/{name}">{pictures[2]}'
    lightest, both = spill(html, limit=10)
    assert sorted(both.values()) == sorted([small, large]) and "base64" not in lightest
