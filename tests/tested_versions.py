"""Writes mlxtune/machine/tested.txt: the versions that are installed here, of all that mlxtune needs, extras included.

    .venv/bin/python tests/tested_versions.py      after the tests have passed

pip reads the file as constraints: pip install mlxtune -c tested.txt. `mlxtune doctor` compares with it.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "mlxtune" / "machine" / "tested.txt"
# Extras that are for developers alone.
LEFT_OUT = ("dev",)
HEADING = """\
# The versions with which mlxtune's tests passed last. Written by tests/tested_versions.py; constraints for pip:
#   pip install mlxtune -c tested.txt
"""


def wanted(name: str, extras: frozenset[str], found: dict[str, str]) -> None:
    """Add a package and all that it needs here to `found`: name -> version; what is not installed is left out."""
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return
    known = canonicalize_name(name)
    if known in found and not extras:
        return
    found[known] = package.version
    for line in package.requires or []:
        need = Requirement(line)
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            wanted(need.name, frozenset(need.extras), found)


def text() -> str:
    """The file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = list(project["dependencies"])
    for extra, more in project["optional-dependencies"].items():
        needs += [] if extra in LEFT_OUT else more
    found: dict[str, str] = {}
    for need in map(Requirement, needs):
        wanted(need.name, frozenset(need.extras), found)
    return HEADING + "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(FILE)
