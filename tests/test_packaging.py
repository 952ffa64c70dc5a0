"""The wheel holds what the checkout holds, and works where there is no checkout."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import mlxtune
from mlxtune import config

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    _run("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, as pip does it."""
    folder = tmp_path_factory.mktemp("install") / "site"
    quiet = ("--quiet", "--disable-pip-version-check", "--root-user-action=ignore")
    _run("-m", "pip", "install", *quiet, "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder.parent)
    return folder


def _installed(site: Path, *command: str | Path) -> str:
    """Run with the installed wheel and the libraries below it. -S leaves the checkout out: no .pth file is read."""
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return _run("-S", *command, cwd=site.parent, PYTHONPATH=os.pathsep.join([str(site), *libraries]))


def test_the_wheel_holds_every_file_of_both_packages_the_recipes_and_the_demo_data_and_nothing_else(
    wheel: Path,
) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mlxtune").rglob("*") if path.is_file()}
    formats = ROOT / "convert"
    expected |= {path.relative_to(formats).as_posix() for path in formats.rglob("*") if path.is_file()}
    expected |= {f"mlxtune/configs/{path.relative_to(ROOT / 'configs').as_posix()}" for path in RECIPES}
    expected = {name for name in expected if "__pycache__" not in name}
    assert {"mlxtune/demo/data/train.jsonl", "mlxtune/demo/data/valid.jsonl", "mlxtune_convert/peft.py"} <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_an_install_imports_both_packages_from_the_wheel_and_has_no_package_named_convert(site: Path) -> None:
    script = (
        "import importlib.util, mlxtune, mlxtune_convert\n"
        "print(mlxtune.__file__)\nprint(mlxtune_convert.__file__)\nprint(importlib.util.find_spec('convert'))"
    )
    assert _installed(site, "-c", script).splitlines() == [
        str(site / "mlxtune" / "__init__.py"),
        str(site / "mlxtune_convert" / "__init__.py"),
        "None",
    ]


def test_the_installed_command_runs(site: Path) -> None:
    assert _installed(site, site / "bin" / "mlxtune", "--version") == f"mlxtune, version {mlxtune.__version__}"
    assert _installed(site, "-m", "mlxtune", "--version") == f"mlxtune, version {mlxtune.__version__}"


def test_the_checkout_and_the_wheel_find_the_same_recipes(site: Path) -> None:
    names = [path.stem for path in RECIPES]
    assert {"quick", "qlora", "lora"} <= set(names)
    assert config.recipe_folder() == ROOT / "configs"
    assert config.recipe_names() == names
    script = "from mlxtune import config\nprint(config.recipe_folder(), *config.recipe_names(), sep='\\n')"
    assert _installed(site, "-c", script).splitlines() == [str(site / "mlxtune" / "configs"), *names]
    load = "import sys\nfrom mlxtune import config\nfor name in sys.argv[1:]:\n    print(config.load(name).to_yaml())"
    assert _installed(site, "-c", load, *names) == "\n".join(config.load(name).to_yaml() for name in names).strip()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_comment_shows_how_to_use_it(recipe: Path) -> None:
    config.load(recipe)  # refuses unknown keys
    assert f"mlxtune train -c {recipe.stem} " in recipe.read_text(encoding="utf-8")


def test_three_recipes_at_least_are_shipped() -> None:
    assert len(RECIPES) >= 3


def test_the_metadata_say_what_is_needed_and_leave_the_backend_to_the_extras(site: Path) -> None:
    (found,) = importlib.metadata.distributions(path=[str(site)])
    assert (found.metadata["Name"], found.version) == ("mlxtune", mlxtune.__version__)
    pythons = SpecifierSet(found.metadata["Requires-Python"])
    assert [minor for minor in range(8, 15) if f"3.{minor}" in pythons] == [11, 12, 13, 14]
    assert set(found.metadata.get_all("Provides-Extra") or []) == {
        *("cpu", "cuda", "dev", "llama-cpp", "tensorboard", "trackio", "wandb")
    }
    assert [(script.name, script.value) for script in found.entry_points] == [("mlxtune", "mlxtune.cli:main")]
    needs = [Requirement(line) for line in found.requires or []]
    base = [need for need in needs if not need.marker or "extra" not in str(need.marker)]
    names = {need.name for need in base}
    assert "mlx" in names and not any(need.extras for need in base)
    assert not names & {
        "mlx-cpu",
        "mlx-cuda",
        "mlx-cuda-13",
        "mlx-metal",
        "torch",
        "peft",
        "pytest",
        "ruff",
        "xllamacpp",
    }
    bounds = {need.name: need.specifier for need in base}
    assert all(not bounds[name].contains("0.33.0") and bounds[name].contains("0.32.9") for name in ("mlx", "mlx-lm"))
    for extra, backend in (("cpu", "cpu"), ("cuda", "cuda13")):
        chosen = [need for need in needs if need not in base and need.marker and need.marker.evaluate({"extra": extra})]
        assert [(need.name, need.extras) for need in chosen] == [("mlx", {backend})]
        assert chosen[0].specifier == bounds["mlx"]
