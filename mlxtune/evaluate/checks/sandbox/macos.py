"""A box of macOS: a profile for `sandbox-exec`, which the system has had since 2007 and which Chromium and Bazel use.

It denies everything, then allows what a bare Python needs: to be started, to read itself and the system's libraries,
and to write into one folder. No other process can be started, so that nothing is left when this one is ended. Apple
calls the command deprecated. Whether it holds here is tried each time that a sandbox is opened (`sandbox`).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

PROGRAM = "/usr/bin/sandbox-exec"
SYSTEM = (
    "/usr/lib",
    "/usr/share",
    "/System",
    "/Library/Frameworks",
    "/private/var/db/dyld",
    "/private/var/db/timezone",
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def is_here() -> bool:
    return sys.platform == "darwin" and shutil.which(PROGRAM) is not None


def profile(python: str, readable: list[str], folder: str) -> str:
    """Rules in the language of sandbox-exec: the last one that fits counts.

    python: the folder of the only program that may be started; readable: folders; folder: the one that may be
    written to. All are real paths, without links, for that is how the kernel sees them.
    """
    folders = [*SYSTEM, *readable, folder]
    return "\n".join(
        (
            "(version 1)",
            "(deny default)",
            f"(allow process-exec (subpath {_text(python)}))",
            "(deny process-fork)",
            "(allow signal (target self))",
            "(allow process-info* (target self))",
            "(allow sysctl-read)",
            '(allow mach-lookup (global-name "com.apple.system.notification_center"))',
            "(allow file-read-metadata)",
            f'(allow file-read* (literal "/") {" ".join(f"(subpath {_text(one)})" for one in folders)})',
            f"(allow file-read* file-write-data {' '.join(f'(literal {_text(one)})' for one in DEVICES)})",
            f"(allow file-write* (subpath {_text(folder)}))",
            "(deny network*)",
        )
    )


def command(folder: str) -> list[str]:
    """What is put before the command of a box whose folder this is."""
    python = os.path.realpath(sys.base_prefix)  # a framework's Python starts another one that lies inside
    cellars = [parent for parent in Path(python).parents if parent.name == "Cellar"]
    libraries = [place for cellar in cellars for place in (cellar, cellar.parent / "opt", cellar.parent / "lib")]
    readable = [str(place) for place in libraries]  # of Homebrew's Python
    readable += sorted({os.path.realpath(path) for path in (sys.base_prefix, sys.prefix, os.path.dirname(__file__))})
    return [PROGRAM, "-p", profile(python, readable, os.path.realpath(folder))]


def _text(path: str) -> str:
    """A path as the language quotes it."""
    return json.dumps(path, ensure_ascii=False)
