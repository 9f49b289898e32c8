"""The page takes what a run has, escapes every string of it, and is written whole or not at all."""

import base64
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

from polydiff.core.adapter import Fragment
from polydiff.core.errors import CheckpointError, PolydiffError
from polydiff.core.report import outside_addresses, page, report, write
from polydiff.modalities.image.view import view
from tests.report.made import items, make_run

HOSTILE = (
    """<script>window.hacked=1</script>"'><img src=x onerror="window.hacked=1"> {{7*7}} &lt;b&gt; </style></pre>"""
)


class Read(HTMLParser):
    """Tags with their attributes, and the text between them, as a browser understands them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def test_the_page_tells_the_run(run: Path) -> None:
    read = Read(page(run, [("Samples", view(items(20, states=4), items(100, first=200)))]))
    for fact in (
        *(
            "image-digits",
            "351,000",
            "2026-03-01 09:30 UTC",
            "2,000 of 2,000",
            "3 min 19 s",
            "dpmpp-2m, 20 steps, guidance 1.75",
            "torch 2.12.0",
        ),
        *("3.41", "3.1 to 3.8", "class accuracy", "step 2,000, 360 samples", "step 250", "One curve for each log-SNR"),
        *(
            "Nearest real neighbour",
            "From noise to sample",
            "git checkout 4f4ba39",
            "polydiff train experiment=image-digits",
        ),
        *("sampling.guidance=1.75", f"polydiff evaluate run={run}"),
    ):
        assert fact in read.text, fact
    sections = {attrs["id"]: attrs["aria-label"] for attrs in read.all("section")}
    targets = [str(attrs["href"])[1:] for attrs in read.all("a") if str(attrs["href"]).startswith("#")]
    assert list(sections) == targets and len(set(targets)) == 8
    links = [unquote(str(attrs["href"])) for attrs in read.all("a") if not str(attrs["href"]).startswith("#")]
    assert "samples/dpmpp-2m-20-seed0/" in links and all((run / link).exists() for link in links)
    assert all(attrs.get("alt") for attrs in read.all("img"))


def test_the_page_reaches_nothing_outside(run: Path) -> None:
    html = page(run, [("Samples", view(items(20, states=4), items(100)))])
    assert outside_addresses(html) == []
    # Plainer still: no address of any scheme but namespaces stands anywhere in the page.
    assert set(re.findall(r"\w+://[\w.]+", html)) <= {"http://www.w3.org"}
    planted = html.replace("</main>", '<img src="https://a.example/x.png"></main>')
    assert outside_addresses(planted) == ["https://a.example/x.png"]


@pytest.mark.parametrize("missing", ["everything", "evaluation", "previews", "metrics.jsonl", "checkpoints", "samples"])
def test_a_run_that_lacks_something_still_has_a_page(run: Path, missing: str) -> None:
    doomed = [p for p in run.iterdir() if p.name == missing or (missing == "everything" and p.name != "config.yaml")]
    for path in doomed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    html = write(run).read_text()
    assert "image-digits" in html and "How to reproduce" in html
    assert ("Key numbers" in html) == (missing not in ("everything", "evaluation"))
    assert ("Previews while training" in html) == (missing not in ("everything", "previews"))


@pytest.mark.parametrize(
    "content", ["", "{", "null", "[1, 2]", '"text"', "[" * 100_000, '{"metrics": 3}', "\0\xff" * 50]
)
def test_damaged_files_are_left_out(run: Path, content: str) -> None:
    for name in ("environment.json", "metrics.jsonl", "heldout.jsonl", "evaluation/metrics.json"):
        (run / name).write_text(content)
    (run / "checkpoints/step-00002000/state.json").write_text(content)
    (run / "samples/dpmpp-2m-20-seed0/samples.json").write_text(content)
    assert "image-digits" in page(run)


@pytest.mark.parametrize("date", [None, 5, "yesterday", "0001-01-01T00:00:00+09:00"])
def test_without_a_date_the_configuration_tells_when_it_was_written(run: Path, date: Any) -> None:
    (run / "environment.json").write_text(json.dumps({"date": date} if date else {}))
    os.utime(run / "config.yaml", (86400, 86400))
    assert "1970-01-02 00:00 UTC" in Read(page(run)).text


def test_strange_values_are_left_out(run: Path) -> None:
    lines = [
        {"step": 1, "loss": "high", "lr": True, "wall_s": None},
        {"step": "two", "loss": 1.0},
        {"step": 3, "loss": float("nan"), "log_snr": [1, 2], "items_per_s": float("inf")},
        {"step": 4, "loss": [1.0, None], "log_snr": [1.0, 2.0]},
        {"step": 5, "loss": [0.5, 0.25], "log_snr": None, "t": [0.1, 0.2]},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for name in ("metrics.jsonl", "heldout.jsonl"):
        (run / name).write_text(text)
    metrics = {
        "a": {"value": None},
        "b": 3,
        "c": {"value": float("nan")},
        "d": {"value": 7.25, "low": "x", "real": None},
    }
    (run / "evaluation/metrics.json").write_text(json.dumps({"metrics": metrics, "n": "many"}))
    html = page(run)
    drawn = re.sub('"data:[^"]*"', "", html.split("<main>")[1].split("config.yaml")[0])
    assert "7.25" in drawn and not re.search(r"\b(nan|inf|None)\b", drawn)
    assert "One curve for each t" in html


@pytest.mark.parametrize(("path", "told"), [("/data/digits.h5", False), ("/data/my-own.h5", True), (None, False)])
def test_the_command_names_what_was_chosen_and_no_more(run: Path, path: str | None, told: bool) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["path"] = path
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (command,) = re.findall(
        "polydiff train ([^\n]*?)polydiff", Read(page(run)).text.replace("# draw, measure and look\n", "")
    )
    assert "sampling.guidance=1.75" in command and "network.name" not in command
    assert ("data.path=/data/my-own.h5" in command) == told and ("data.path" in command) == told


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>'run' & \"co\"", name=HOSTILE, classes=[HOSTILE] * 10)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["name"] = config["network"]["name"] = config["sampling"]["solver"] = HOSTILE
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text(
        json.dumps({"commit": HOSTILE, "device": HOSTILE, "packages": {"torch": HOSTILE}})
    )
    (run / "evaluation/metrics.json").write_text(json.dumps({"solver": HOSTILE, "metrics": {HOSTILE: {"value": 1.0}}}))
    told = run / "samples" / HOSTILE.replace("/", "")
    told.mkdir()
    (told / "samples.json").write_text(json.dumps({"solver": HOSTILE, "steps": HOSTILE, "samples": []}))
    drawn = view([_named(item) for item in items(12, states=2)], [_named(item) for item in items(30)])
    html = write(run, [(HOSTILE, drawn)]).read_text()
    read = Read(html)
    assert read.text.count(HOSTILE) >= 12
    assert len(read.all("script")) == 1 and not any(name.startswith("on") for _, attrs in read.tags for name in attrs)
    assert all(str(attrs["src"]).startswith("data:image/png;base64,") for attrs in read.all("img"))
    assert outside_addresses(html) == []


def _named(item):  # type: ignore[no-untyped-def]
    item.meta["label"] = HOSTILE
    return item


def test_scripts_are_put_in_once_a_name(run: Path) -> None:
    library = "window.library = (window.library || 0) + 1;"
    fragments = [(f"Part {i}", Fragment("<p>x</p>", {"library": library})) for i in range(3)]
    html = page(run, fragments)
    assert html.count(library) == 1 and len(Read(html).all("script")) == 2


@pytest.mark.parametrize("html", ['<img src="https://a.example/x.png">', "<style>@import '//a.example/x.css'</style>"])
def test_a_view_that_reaches_outside_is_refused(run: Path, html: str) -> None:
    with pytest.raises(PolydiffError, match=r"'Samples' loads .*a\.example.* from outside"):
        write(run, [("Samples", Fragment(html))])
    assert not (run / "index.html").exists()


def test_a_heavy_page_puts_pictures_beside_it_and_takes_old_ones_away(run: Path) -> None:
    pictures = [os.urandom(30_000) for _ in range(3)]
    tags = [f'<img alt="x" src="data:image/png;base64,{base64.b64encode(p).decode()}">' for p in pictures]
    fragment = Fragment("".join(tags))
    whole = write(run, [("Samples", fragment)]).stat().st_size
    assert not (run / "index_files").exists()
    assert write(run, [("Samples", fragment)], limit=whole - 50_000).stat().st_size < whole - 50_000
    beside = [path.read_bytes() for path in (run / "index_files").iterdir()]
    assert len(beside) == 2 and set(beside) <= set(pictures)
    write(run, [("Samples", fragment)])
    assert list((run / "index_files").iterdir()) == []


def test_heavy_previews_are_shown_from_where_they_lie(run: Path) -> None:
    for path in (run / "previews").iterdir():
        path.write_bytes(path.read_bytes() + bytes(1_000_000))
    sources = [str(attrs["src"]) for attrs in Read(page(run)).all("img")]
    assert len(sources) == 9 and all((run / source).is_file() for source in sources)


def test_a_failed_write_leaves_the_old_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write(run).read_bytes()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write(run, [("Samples", Fragment("<p>new</p>"))])
    assert (run / "index.html").read_bytes() == old and not list(run.glob("*.tmp"))


def test_what_is_no_run_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="not a run folder"):
            report(folder)


def test_report_draws_from_a_trained_run(moons_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(moons_run, tmp_path / "moons"))
    read = Read(report(run, n=30, device="cpu").read_text())
    assert "Generated by class" in read.text and "8 of 8" in read.text and "upper" in read.text
    assert "step 40" in read.text or "40 of 40" in read.text


def test_report_without_the_data_still_shows_samples(
    moons_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(moons_run, tmp_path / "moons"))
    monkeypatch.setattr("polydiff.core.run.Run.dataset", _gone)
    read = Read(report(run, n=30, device="cpu").read_text())
    assert "Without real data beside the samples: moons.h5 is gone" in read.text
    assert "Generated by class" in read.text and "Real by class" not in read.text


def _gone(*_: object, **__: object) -> None:
    from polydiff.core.errors import DataError

    raise DataError("moons.h5 is gone")
