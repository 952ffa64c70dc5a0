"""Documents as headings and paragraphs.

    # Returns                      Block("Returns", level=1)
    Within 30 days of delivery.    Block("Within 30 days of delivery.")

Markdown, plain text, HTML and tables (CSV, TSV) are read with the standard library; PDF and Word documents by packages
of the extra `documents`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.errors import UserError

HEADING = re.compile(r"(#{1,6})\s+(.+?)\s*#*")  # of Markdown
UNDERLINE = re.compile(r"(=+|-+)\s*")  # below a heading of Markdown
FENCE = re.compile(r"\s*(```|~~~)")  # around code
PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")


@dataclass(frozen=True)
class Block:
    """A heading or a paragraph."""

    # On one or several lines; not empty.
    text: str
    # Of a heading, 1 the highest; 0: a paragraph.
    level: int = 0


@dataclass(frozen=True)
class Document:
    """One file."""

    # Its path below the folder that was named, or its name.
    name: str
    # In their order.
    blocks: list[Block]


def find(paths: Sequence[Path]) -> tuple[list[tuple[str, Path]], list[str]]:
    """((name, file) of every document, what must be said of what else there is). paths: files, and folders, which are
    searched with all their folders. Raises UserError for a path that is not there, or is of no known type, and where
    there is no document at all.
    """
    found: dict[Path, str] = {}
    notes = []
    for path in paths:
        if path.is_file():
            _require_known(path)
            found.setdefault(path.resolve(), path.name)
            continue
        if not path.is_dir():
            raise UserError(f"no document {path}", "Name files, or folders of them.")
        others = 0
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if not file.is_file() or any(part.startswith(".") for part in Path(name).parts):
                continue
            if file.suffix.lower() in READERS:
                found.setdefault(file.resolve(), name)
            else:
                others += 1
        if others:
            notes.append(f"{path}: {others} files are of other types, and not read ({', '.join(READERS)} are)")
    if not found:
        raise UserError(f"{paths[0]} has no documents", f"They end with {', '.join(READERS)}.")
    _make_unique(found)
    return [(name, file) for file, name in found.items()], notes


def _make_unique(names: dict[Path, str]) -> None:
    """Give files of one name as many of the folders that they are in as tell them apart: whole paths differ."""
    while True:
        counts = Counter(names.values())
        alike = [file for file, name in names.items() if counts[name] > 1]
        if not alike:
            return
        for file in alike:
            parts = len(Path(names[file]).parts) + 1
            names[file] = Path(*file.parts[-parts:]).as_posix()


def read(name: str, file: Path) -> Document:
    """Raises UserError for a file that cannot be read, holds no text, or needs a package that is not there."""
    _require_known(file)
    try:
        blocks = list(READERS[file.suffix.lower()](file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if not any(block.level == 0 for block in blocks):
        raise UserError(f"{file} holds no text", "Leave it out; a scanned document must be turned into text first.")
    return Document(name, blocks)


def _require_known(file: Path) -> None:
    if file.suffix.lower() not in READERS:
        raise UserError(
            f"{file}: unknown kind of document {file.suffix or '(none)'}", f"Known are {', '.join(READERS)}."
        )


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not a text file (invalid UTF-8 at byte {error.start})", "Save it as UTF-8."
        ) from error


def paragraphs(text: str) -> Iterator[Block]:
    """Of plain text: an empty line stands between two."""
    for part in PARAGRAPH.split(text.strip()):
        if part.strip():
            yield Block(part.strip())


def markdown(text: str) -> Iterator[Block]:
    """Headings with # or underlined; code between fences stays one paragraph. The settings that a page may begin with,
    between lines of ---, are left out.
    """
    lines = text.splitlines()
    if lines and lines[0].strip() == "---" and "---" in (line.strip() for line in lines[1:]):
        lines = lines[[line.strip() for line in lines].index("---", 1) + 1 :]
    waiting: list[str] = []  # lines of the paragraph so far
    in_code = False
    for line in lines:
        is_fence = FENCE.match(line) is not None
        heading = HEADING.fullmatch(line.strip())
        if in_code or is_fence:
            waiting.append(line)
            in_code = in_code != is_fence
        elif heading is not None:
            yield from _joined(waiting)
            waiting = []
            yield Block(heading[2], len(heading[1]))
        elif len(waiting) == 1 and UNDERLINE.fullmatch(line.strip()) and not waiting[0].lstrip().startswith(("|", "-")):
            yield Block(waiting.pop().strip(), 1 if line.strip().startswith("=") else 2)
        elif line.strip():
            waiting.append(line)
        else:
            yield from _joined(waiting)
            waiting = []
    yield from _joined(waiting)


def _joined(lines: Sequence[str]) -> Iterator[Block]:
    text = "\n".join(lines).strip()
    if text:
        yield Block(text)


class _Page(HTMLParser):
    """Takes the headings and paragraphs out of a page.

    End tags may be missing, by right (</head>) or by mistake. What is not read ends with the element that it stands in,
    and where a page's own text begins:

        <div><nav>Menu</div><p>Read.              </div> ends the nav too
        <nav>Menu<main><p>Read.</main>            so does <main>
    """

    UNREAD = ("script", "style", "noscript", "template", "nav", "svg", "title")
    HOLDERS = ("html", "head", "body", "header", "footer", "aside", "main", "article", "section", "div", *UNREAD)
    BEGINNINGS = ("body", "main", "article")  # of a page's own text: no menu holds them, and no title
    BREAKS = (
        "p",
        "div",
        "li",
        "tr",
        "section",
        "article",
        "pre",
        "blockquote",
        "table",
        "ul",
        "ol",
        "dt",
        "dd",
        "main",
    )

    def __init__(self, read_too: Sequence[str] = ()) -> None:
        """read_too: elements of UNREAD that are read."""
        super().__init__(convert_charrefs=True)
        self._not_read = [tag for tag in self.UNREAD if tag not in read_too]
        self.blocks: list[Block] = []
        self._text: list[str] = []
        self._level = 0  # of the heading that is open
        self._open: list[str] = []  # those of HOLDERS that are open, the outermost first

    def unread(self) -> list[str]:
        """Elements that are open and are not read."""
        return [tag for tag in self._open if tag in self._not_read]

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        is_heading = re.fullmatch("h[1-6]", tag) is not None
        if tag in self.BEGINNINGS:
            self._close("nav")
        if is_heading or tag in self.BREAKS or tag in self.BEGINNINGS:
            self._close("title")
        if tag in self.HOLDERS:
            self._open.append(tag)
        if is_heading:
            self.end()
            self._level = int(tag[1])
        elif tag in self.BREAKS:
            self.end()
        elif tag == "br":
            self._text.append("\n")
        elif tag in ("td", "th"):
            self._text.append(" | " if "".join(self._text).strip() else "")

    def handle_endtag(self, tag: str) -> None:
        self._close(tag)
        if tag in self.BREAKS or re.fullmatch("h[1-6]", tag):
            self.end()

    def handle_data(self, data: str) -> None:
        if not self.unread():
            self._text.append(data)

    def _close(self, tag: str) -> None:
        """The innermost element of that name, with all that it holds; nothing where none is open."""
        if tag in self._open:
            last = len(self._open) - 1 - self._open[::-1].index(tag)
            del self._open[last:]

    def end(self) -> None:
        """Of the block that is open."""
        lines = [" ".join(line.split()) for line in "".join(self._text).split("\n")]
        text = " ".join(line for line in lines if line)
        if text:
            self.blocks.append(Block(text, self._level))
        self._text, self._level = [], 0


def html(text: str) -> list[Block]:
    """Without what a browser does not show, and without menus. One that never ends is read after all: what stands
    behind it would be lost.
    """
    read_too: list[str] = []
    while True:
        page = _Page(read_too)
        page.feed(text)
        page.close()
        page.end()
        endless = [tag for tag in page.unread() if tag not in ("script", "style")]
        if not endless:
            return page.blocks
        read_too += endless


def _table(file: Path) -> Iterator[Block]:
    """A paragraph for each row: "name: value" on each line."""
    for row in raw_rows(file):
        if isinstance(row, Bad):
            raise UserError(f"{file} {row.place}: {row.reason}", "Mend the table, or leave it out.")
        lines = [f"{name}: {value}" for name, value in row[1].items() if value not in (None, "")]
        yield from _joined(lines)


def _pdf(file: Path) -> Iterator[Block]:
    """The text of its pages. A line ends where it does on the page; paragraphs are seldom told apart."""
    try:
        import pypdf
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise _missing(file, "pypdf") from error
    try:
        reader = pypdf.PdfReader(file)
        for page in reader.pages:
            yield from paragraphs(page.extract_text())
    except (PyPdfError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: not a PDF that can be read ({error})", "Save it as text, or leave it out.") from error


def _docx(file: Path) -> Iterator[Block]:
    """Headings by their style; the rows of tables, cells between |."""
    try:
        import docx
        from docx.opc.exceptions import PackageNotFoundError
        from docx.table import Table
    except ImportError as error:
        raise _missing(file, "python-docx") from error
    try:
        document = docx.Document(str(file))
    except (PackageNotFoundError, ValueError, KeyError) as error:
        raise UserError(f"{file}: not a Word document that can be read", "Save it anew as .docx.") from error
    for part in document.iter_inner_content():
        if isinstance(part, Table):
            for row in part.rows:
                yield from _joined([" | ".join(cell.text.strip() for cell in row.cells)])
            continue
        style = str(part.style.name) if part.style is not None else ""
        heading = re.fullmatch(r"Heading (\d)", style)
        if part.text.strip():
            yield Block(part.text.strip(), int(heading[1]) if heading else 0)


def _missing(file: Path, package: str) -> UserError:
    return UserError(f"{file}: to read it, the package {package} is needed", "pip install 'mlxtune[documents]'")


# The end of a file's name -> what reads it.
READERS: dict[str, Callable[[Path], Any]] = {
    ".md": lambda file: markdown(_text_of(file)),
    ".markdown": lambda file: markdown(_text_of(file)),
    ".txt": lambda file: paragraphs(_text_of(file)),
    ".html": lambda file: html(_text_of(file)),
    ".htm": lambda file: html(_text_of(file)),
    ".csv": _table,
    ".tsv": _table,
    ".pdf": _pdf,
    ".docx": _docx,
}
