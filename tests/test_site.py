"""The documentation as a site: it builds without a warning, no link in it is dead, and it asks no other host."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

DOCS = Path(__file__).resolve().parent.parent / "docs"
_spec = importlib.util.spec_from_file_location("build_site", DOCS / "build_site.py")
assert _spec and _spec.loader
build_site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build_site)

LOADS = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}


class Page(HTMLParser):
    """What a page links to, what it loads, and the names in it that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names |= {given[key] or "" for key in ("id", "name") if key in given}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        if tag in LOADS and given.get(LOADS[tag]):
            self.loads.append(str(given[LOADS[tag]]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build_site.gather(folder)
    done = build_site.build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_every_page_becomes_one_of_the_site(pages: dict[Path, Page]) -> None:
    assert {path.name for path in pages} >= {name.replace(".md", ".html") for name in build_site.pages()}


def test_no_link_inside_the_site_is_dead(site: Path, pages: dict[Path, Page]) -> None:
    count = 0
    for path, page in pages.items():
        if path.name == "404.html":  # its links are those of wherever it is shown
            continue
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in pages and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in pages[target].names, f"{path.name}: {link}"
            count += 1
    assert count > 500


def outside(text: str) -> Iterator[str]:
    """What a style sheet loads from other hosts."""
    yield from re.findall(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)", text)


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert [one for one in page.loads if urlsplit(one).netloc] == [], path.name
        assert list(outside(path.read_text(encoding="utf-8"))) == [], path.name
    sheets = list(site.rglob("*.css"))
    assert sheets and [one for sheet in sheets for one in outside(sheet.read_text(encoding="utf-8"))] == []
    assert list(outside("src: url(https://fonts.example/a.woff2)")) == ["https://fonts.example/a.woff2"]


def test_every_page_stands_in_the_contents_once() -> None:
    settings = yaml.safe_load((DOCS / "mkdocs.yml").read_text(encoding="utf-8"))
    listed: list[str] = []
    for entry in settings["nav"]:
        for value in entry.values():
            listed += [value] if isinstance(value, str) else [name for part in value for name in part.values()]
    assert sorted(listed) == sorted(build_site.pages()), "docs/mkdocs.yml: nav"


def test_a_dead_link_a_dead_anchor_and_a_link_out_of_the_site_are_noticed(tmp_path: Path) -> None:
    for text in ("[x](nowhere.md)", "[x](data.md#nothing-of-that-name)"):
        folder = tmp_path / "dead"
        folder.mkdir()
        build_site.gather(folder)
        with (folder / "docs" / "index.md").open("a", encoding="utf-8") as page:
            page.write(f"\n{text}\n")
        done = build_site.build(folder)
        assert done.returncode != 0, text
        shutil.rmtree(folder)
    page = DOCS / "data.md"
    with pytest.raises(ValueError, match="no page of the site"):
        build_site.fitted_links("[x](../Makefile)", page)
