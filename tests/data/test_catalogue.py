"""Data sets that installed packages add to the catalogue."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from polydiff import data
from polydiff.core.errors import ConfigError

PACKAGE = """
from polydiff.data import Entry
TIDE = Entry(modality="toy2d", recipe="polydiff.data.toy2d:recipe", about="high and low", embedded=True)
WRONG = {"modality": "toy2d"}
"""
POINTS = """[polydiff.data]
tide = polydiff_tide:TIDE
moons = polydiff_tide:TIDE
ebb = polydiff_tide:WRONG
flood = polydiff_flood:FLOOD
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "polydiff_tide.py").write_text(PACKAGE)
    information = tmp_path / "polydiff_tide-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: polydiff_tide\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    data.catalogue.cache_clear()
    yield
    data.catalogue.cache_clear()


def test_an_installed_package_adds_a_data_set_but_replaces_none() -> None:
    assert data.catalogue()["tide"].about == "high and low"
    assert data.catalogue()["moons"].about != "high and low"


def test_a_broken_one_is_left_out_with_one_line_each(capfd: pytest.CaptureFixture[str]) -> None:
    assert {"ebb", "flood"}.isdisjoint(data.catalogue())
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "data set 'ebb' (polydiff_tide:WRONG) cannot be used: it is a dict, not a polydiff.data.Entry" in lines[0]
    assert "data set 'flood' (polydiff_flood:FLOOD) cannot be used: No module named 'polydiff_flood'" in lines[1]
    with pytest.raises(ConfigError, match=r"unknown data set 'flood': .*tide"):
        data.locate("flood")
