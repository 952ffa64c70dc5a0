"""`mlxtune-convert` alone: its wheel in a virtual environment that has what the wheel asks for, and neither MLX nor
PyTorch nor mlxtune. No network: the libraries are links to those of the environment that the tests run in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import click
import gguf
import ml_dtypes
import numpy
import rich
import safetensors
import tiny
import yaml
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (numpy, safetensors, ml_dtypes, gguf, click, rich, yaml)  # gguf needs yaml
QUIET = ("--quiet", "--disable-pip-version-check", "--root-user-action=ignore")


def done(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command that must end well; return what it prints."""
    result = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def wheel(project: Path, folder: Path) -> Path:
    """Build the wheel of a project's folder into a new folder."""
    done(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=project)
    (built,) = folder.iterdir()
    return built


def links(folder: Path) -> Path:
    """A folder of links to the libraries, and to the folders of compiled parts that lie beside some of them."""
    folder.mkdir()
    for library in LIBRARIES:
        package = Path(str(library.__file__)).parent
        for path in (package, package.with_name(f"{package.name}.libs")):
            if path.is_dir():
                (folder / path.name).symlink_to(path)
    return folder


def installed(folder: Path, *wheels: Path) -> Path:
    """A new virtual environment with these wheels and nothing else. Returns its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    done(sys.executable, "-m", "pip", "--python", python, "install", *QUIET, "--no-deps", "--no-index", *wheels)
    return python


def environment(root: Path) -> Path:
    """A virtual environment with the wheel installed, as pip does it. Returns its Python."""
    python = installed(root / "venv", wheel(ROOT / "convert", root / "dist"))
    site = Path(done(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    (site / "libraries.pth").write_text(f"{links(root / 'libraries')}\n")
    return python


def command(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the installed script."""
    script = python.with_name("mlxtune-convert")
    # Its own folder: nothing of the checkout is to be found from there.
    return subprocess.run(
        [str(script), *map(str, arguments)], capture_output=True, text=True, check=False, cwd=python.parent, timeout=120
    )


def refused(python: Path, out: Path, *arguments: str | Path, expected: tuple[str, ...]) -> None:
    """The script must refuse in one clear line and leave no trace of `out`."""
    tiny.one_clear_line(command(python, *arguments), *expected)
    tiny.nothing_written(out)


def same(one: Path, other: Path) -> None:
    """Two folders hold the same tensors and configurations."""
    files = [path.name for path in one.iterdir() if path.suffix in (".safetensors", ".json")]
    assert any(name.endswith(".safetensors") for name in files)
    for name in files:
        if name.endswith(".json"):
            assert json.loads((one / name).read_text()) == json.loads((other / name).read_text()), name
            continue
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys(), name
        for key, array in left.items():
            assert (array.dtype, array.shape) == (right[key].dtype, right[key].shape), key
            assert array.tobytes() == right[key].tobytes(), key
