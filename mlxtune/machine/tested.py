"""The versions of other packages that mlxtune's tests passed with: tested.txt, which pip reads as constraints too."""

from __future__ import annotations

import re
from importlib import metadata, resources

FILE = "tested.txt"
DECISIVE = ("mlx", "mlx-lm", "transformers")  # whose numbers or functions mlxtune leans on most


def versions() -> dict[str, str]:
    """Package -> version, of tested.txt."""
    text = resources.files("mlxtune.machine").joinpath(FILE).read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


def untested() -> list[str]:
    """What differs of the packages that decide most, a sentence each: "mlx 0.33.0 is newer than 0.32.4, ..."."""
    known = versions()
    found = []
    for name in DECISIVE:
        try:
            here = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        order = _parts(here), _parts(known[name])
        if order[0] != order[1]:
            which = "newer" if order[0] > order[1] else "older"
            found.append(
                f"{name} {here} is {which} than {known[name]}, which mlxtune was tested with: mlxtune doctor --test "
                f"tries it here; pip install '{name}=={known[name]}' goes back"
            )
    return found


def _parts(version: str) -> tuple[int, ...]:
    """The numbers of a version, to be put in order: 0.32.4.dev1 -> (0, 32, 4). What follows them is no release."""
    released = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in released[0].split(".")) if released else ()
