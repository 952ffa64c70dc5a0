"""Build the documentation as a site: `make site`, or `python docs/build_site.py FOLDER`.

Zensical wants its settings, the pages and the result below one folder, and every page inside `docs_dir`. Here some
pages stand elsewhere (CONTRIBUTING.md), and nothing is to be written beside the sources. So all of them are copied into
a folder that goes away again, their links made to fit: in docs/architecture.md

    [CONTRIBUTING.md](../CONTRIBUTING.md)    becomes    [CONTRIBUTING.md](contributing.md)

A link to something that is no page of the site is an error, as is any warning of Zensical (`--strict`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Pages that stand elsewhere -> their names on the site.
ELSEWHERE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    ".github/SECURITY.md": "security.md",
    "tests/families.md": "families.md",
    "benchmarks/results.md": "measurements.md",
    "README.md": "index.md",  # as a link's target only: the site has a front page of its own
}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=[)\s])")


def pages() -> dict[str, Path]:
    """Every page of the site: its name there -> the file it is made of."""
    found = {name: ROOT / source for source, name in ELSEWHERE.items() if source != "README.md"}
    return found | {path.name: path for path in sorted(DOCS.glob("*.md"))}


def fitted_links(text: str, source: Path) -> str:
    """The text of a page with its links to other pages as they are on the site. source: where the page stands.

    Raises ValueError for a link to what is not on the site.
    """

    def fitted(match: re.Match[str]) -> str:
        target, anchor = match.group(1), match.group(2) or ""
        if target.startswith(("https://", "http://", "mailto:")):
            return match.group()
        file = Path(os.path.normpath(source.parent / target))
        if file.is_relative_to(DOCS) and file.is_file():
            return f"{file.relative_to(DOCS).as_posix()}{anchor}"
        name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else target
        if name not in ELSEWHERE:
            raise ValueError(f"{source.relative_to(ROOT)}: a link to {target}, which is no page of the site")
        return f"{ELSEWHERE[name]}{anchor}"

    return LINK.sub(fitted, text)


def gather(folder: Path) -> None:
    """Put mkdocs.yml, the pages and their pictures into a folder, as Zensical wants them."""
    shutil.copy(DOCS / "mkdocs.yml", folder)
    (folder / "docs").mkdir()
    for name, source in pages().items():
        (folder / "docs" / name).write_text(fitted_links(source.read_text(encoding="utf-8"), source), encoding="utf-8")
    shutil.copytree(DOCS / "pictures", folder / "docs" / "pictures")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build what was gathered in a folder into folder/site; its status is not 0 where there was a warning."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(folder / "mkdocs.yml")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def main(out: Path) -> None:
    if out.exists() and not (out / "sitemap.xml").is_file():
        sys.exit(f"{out} is there, and is no site: name another folder")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        gather(folder)
        done = build(folder)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(folder / "site", out)
    print(f"{out / 'index.html'}: the site (its search needs a server: python -m http.server --directory {out})")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "build" / "site")
