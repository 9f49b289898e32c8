"""The page in headless Chromium: no outside request, no complaint, and what moves does move. Skips without Chromium."""

import base64
import os
import shutil
from pathlib import Path

import pytest

from polydiff.core.adapter import Fragment
from polydiff.core.report import write
from polydiff.modalities.image.view import view
from tests.report.browser import Browser
from tests.report.made import items

WIDER = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
SHOWN = (
    "[...document.querySelectorAll('.timeline figure')].filter(f => f.offsetParent).map(f => f.innerText || f.dataset)"
)
STEP = "document.querySelector('.timeline output').textContent"


@pytest.fixture(scope="module")
def opened(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("opened") / "run"))
    return write(run, [("Samples", view(items(70, states=8), items(200, first=300)))])


def test_the_browser_notices_outside_requests_and_errors(browser: Browser, tmp_path: Path) -> None:
    """The control: each fault planted in a page of its own is caught."""
    faults = {
        '<img src="https://a.example/x.png">': "https://a.example/x.png",
        "<style>body { background: url(http://a.example/y.png) }</style>": "http://a.example/y.png",
        "<script>fetch('https://a.example/z.json').catch(() => 0)</script>": "https://a.example/z.json",
    }
    page = tmp_path / "control.html"
    for html, address in faults.items():
        page.write_text(f"<!doctype html><body>{html}")
        assert browser.visit(page).outside == [address]
    for html in ("<script>console.error('planted')</script>", "<script>throw new Error('planted')</script>"):
        page.write_text(f"<!doctype html><body>{html}")
        visit = browser.visit(page)
        assert len(visit.complaints) == 1 and "planted" in visit.complaints[0] and visit.outside == []
    page.write_text("<!doctype html><link rel=icon href='data:,'><body>Nothing.")
    assert browser.visit(page).outside == browser.visited.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_is_quiet_and_fits(browser: Browser, opened: Path, width: int, scheme: str) -> None:
    browser.look(width, scheme=scheme)
    visit = browser.visit(opened)
    assert visit.asked and visit.outside == [] and visit.complaints == []
    assert browser.run(WIDER) is False
    assert browser.run("[...document.images].every(i => !i.offsetParent || i.naturalWidth > 0)") is True
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(18, 19, 22)") == (scheme == "dark")


def test_previews_follow_slider_keyboard_and_button(browser: Browser, opened: Path) -> None:
    browser.look(1280)
    browser.visit(opened)
    assert browser.run(STEP) == "step 2,000" and len(browser.run(SHOWN)) == 1
    browser.run("document.querySelector('.timeline input').focus()")
    browser.press("ArrowLeft")
    assert browser.run(STEP) == "step 1,750" and len(browser.run(SHOWN)) == 1
    browser.press("Home")
    assert browser.run(STEP) == "step 0"
    assert browser.run("document.querySelector('.timeline figure.on img').alt") == "Samples at step 0"
    browser.run("document.querySelector('.timeline button').click()")
    assert browser.run("document.querySelector('.timeline button').textContent") == "Pause"
    assert browser.run(f"new Promise(go => setTimeout(() => go({STEP}), 700))", wait=True) == "step 250"


def test_everything_can_be_reached_by_keyboard(browser: Browser, opened: Path) -> None:
    browser.look(1280)
    browser.visit(opened)
    names = []
    for _ in range(40):
        browser.press("Tab")
        names.append(browser.run("document.activeElement.tagName + ' ' + document.activeElement.className"))
    for name in ("A ", "DIV wide", "DIV iv-strips wide", "BUTTON ", "INPUT ", "SUMMARY ", "PRE commands"):
        assert name in names, name


def test_only_the_scripts_of_the_page_run(browser: Browser, opened: Path, tmp_path: Path) -> None:
    """Whatever slips into the markup is stopped by the page's own policy."""
    evil = "<script>window.hacked=1</script><img src='data:,' onerror='window.hacked=1'>"
    evil += "<img src='https://a.example/x.png'><iframe src='data:text/html,x'></iframe>"
    page = tmp_path / "evil.html"
    page.write_text(opened.read_text().replace("<main>", "<main>" + evil))
    visit = browser.visit(page)
    assert browser.run("window.hacked") is None and len(visit.complaints) >= 4
    assert browser.run(STEP) == "step 2,000"  # while its own script still runs


def test_scripts_of_a_view_run_once(browser: Browser, run_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    script = "window.count = (window.count || 0) + 1; window.text = '</script>' + '<!-- x';\r\n"
    visit = browser.visit(write(run, [(f"Part {i}", Fragment("<p>x</p>", {"one": script})) for i in range(2)]))
    assert visit.complaints == [] and browser.run("window.count") == 1
    assert browser.run("window.text") == "</script><!-- x"


def test_files_beside_a_heavy_page_are_shown(browser: Browser, run_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    grid = (run / "previews/step-00000000.png").read_bytes() + os.urandom(200_000)
    tag = f'<img id="far" alt="x" src="data:image/png;base64,{base64.b64encode(grid).decode()}">'
    visit = browser.visit(write(run, [("Samples", Fragment(tag))], limit=150_000))
    assert visit.complaints == [] and visit.outside == []
    assert any("index_files/" in address for address in visit.asked)
    assert browser.run("document.getElementById('far').naturalWidth") > 500
