"""What the written pages promise exists: commands, their options, files, make targets and cited papers."""

import ast
import importlib
import re
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

from polydiff.core.commands import VERBS, data
from polydiff.core.commands.compose import compose, jobs
from polydiff.core.commands.options import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("modalities/*/README.md")})
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)#\s]+)[^)]*\)")
CITATION = re.compile(r"\b([A-Z][\w'-]+)(?: et al\.?| (?:and|&) [A-Z][\w'-]+)?,? \(?((?:19|20)\d\d)(?!\.?\d)")


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every ``polydiff ...`` line in fenced blocks, without prompts and comments."""
    for _, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.lstrip("$ ").startswith("polydiff ") else []
            if words:
                yield words[words.index("polydiff") + 1 :]


LINES = [(page.relative_to(ROOT).as_posix(), words) for page in PAGES for words in command_lines(page.read_text())]


def test_the_readme_shows_every_verb_and_no_other() -> None:
    assert {words[0] for page, words in LINES if page == "README.md"} == set(VERBS)


@pytest.mark.parametrize(("page", "words"), LINES, ids=[f"{page}: {shlex.join(words)}" for page, words in LINES])
def test_a_command_line_is_one_polydiff_takes(page: str, words: list[str]) -> None:
    verb, *rest = words
    if page != "README.md" and any("experiment=" in word or "<" in word for word in rest):
        rest = []  # a guide may train what its reader is about to write
    if verb == "train":
        own = ("run=", "init=", "restart=")
        for job, _ in jobs([word for word in rest if word != "-m" and not word.startswith(own)]):
            assert not rest or compose(job)["adapter"]
    elif verb == "data":
        data._parse(rest)
    else:
        parse(importlib.import_module(f"polydiff.core.commands.{verb}").Options, rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if not re.match(r"[a-z]+:", link)]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_make_targets_are_real() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "bars"} <= targets
    for page in PAGES:
        text = page.read_text()
        code = [*(block for _, block in FENCE.findall(text)), *re.findall(r"`([^`\n]+)`", text)]
        assert set(re.findall(r"^make ([a-z]+)", "\n".join(code), re.MULTILINE)) <= targets, page


def plain(text: str) -> str:
    """Letters of a name without accents, whether written in TeX or in Unicode."""
    text = re.sub(r"\\(l)\b ?|\\['\"`^~]", r"\1", text)
    return re.sub(r"[^A-Za-z' -]", "", unicodedata.normalize("NFKD", text))


def bibliography() -> dict[str, dict[str, str]]:
    """Fields of every entry of references.bib by key."""
    text = (ROOT / "references.bib").read_text()
    entries = re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    assert len({key for key, _ in entries}) == len(entries) == text.count("\n@"), "a key twice, or an entry not read"
    return {key: dict(re.findall(r"^ +(\w+) += \{(.*)\},$", body, re.MULTILINE)) for key, body in entries}


def test_the_bibliography_is_complete() -> None:
    entries = bibliography()
    assert len(entries) >= 20
    assert [key for key, entry in entries.items() if not {"title", "author", "year"} <= set(entry)] == []
    assert len({entry["title"] for entry in entries.values()}) == len(entries)


def test_every_cited_paper_is_in_the_bibliography() -> None:
    known = set()
    for entry in bibliography().values():
        years = {entry["year"], *(f"20{number[:2]}" for number in [entry.get("eprint")] if number)}
        surnames = {plain(author.partition(",")[0]) for author in entry["author"].split(" and ")}
        surnames |= {name.split()[-1] for name in surnames}  # of De Bortoli the last word
        known |= {(surname, year) for surname in surnames for year in years}
    cited: dict[tuple[str, str], Path] = {}
    for path in (path for folder in ("core", "modalities") for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                _, source, text = (ast.get_docstring(node) or "").partition("Source:")
                cited |= {
                    (plain(name), year): path.relative_to(ROOT) for name, year in CITATION.findall(text) if source
                }
    assert len(cited) > 10
    assert {citation: path for citation, path in cited.items() if citation not in known} == {}
