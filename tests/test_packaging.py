"""The wheel holds what the checkout holds, and works where there is no checkout."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import alone
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import mlxtune
from mlxtune.config import resolve
from mlxtune.machine import tested

COMPUTING = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm"))
VERSION = f"mlxtune {mlxtune.__version__} ({COMPUTING})"

ROOT = Path(__file__).resolve().parent.parent
# Those below us. A folder on this path is not searched for .pth files, so the checkout is not found through it.
LIBRARIES = os.pathsep.join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    return alone.done(sys.executable, *command, cwd=cwd, **environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alone.wheel(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of mlxtune-convert."""
    return alone.wheel(ROOT / "convert", tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, as pip does it."""
    folder = tmp_path_factory.mktemp("install") / "site"
    pip = ("-m", "pip", "install", *alone.QUIET, "--no-deps", "--no-index", "--target", folder)
    _run(*pip, wheel, cwd=folder.parent)
    return folder


def _installed(site: Path, *command: str | Path) -> str:
    """Run with the installed wheel and the libraries below it. -S leaves the checkout out: no .pth file is read."""
    return _run("-S", *command, cwd=site.parent, PYTHONPATH=os.pathsep.join([str(site), LIBRARIES]))


def test_the_wheel_holds_every_file_of_both_packages_the_recipes_and_the_demo_data_and_nothing_else(
    wheel: Path,
) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mlxtune").rglob("*") if path.is_file()}
    expected |= _formats()
    expected |= {f"mlxtune/configs/{path.relative_to(ROOT / 'configs').as_posix()}" for path in RECIPES}
    expected = {name for name in expected if "__pycache__" not in name}
    assert {
        "mlxtune/demo/data/train.jsonl",
        "mlxtune/demo/data/valid.jsonl",
        "mlxtune/evaluate/suites/basics.jsonl",
        "mlxtune/evaluate/suites/general.jsonl",
        "mlxtune/evaluate/suites/safety.jsonl",
        "mlxtune/evaluate/suites/toxicity.json",
        "mlxtune_convert/peft/adapter_folder.py",
    } <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def _formats() -> set[str]:
    """The files of the file formats' package."""
    folder = ROOT / "convert"
    found = {path for path in (folder / "mlxtune_convert").rglob("*") if path.is_file()}
    return {path.relative_to(folder).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_small_wheel_holds_the_file_formats_alone_byte_for_byte_as_the_other_does(small: Path, wheel: Path) -> None:
    """So whichever of the two is installed last, the same code runs."""
    ours, theirs = zipfile.ZipFile(small), zipfile.ZipFile(wheel)
    names = {name for name in ours.namelist() if ".dist-info/" not in name}
    assert names == _formats()
    assert {name for name in names if ours.read(name) != theirs.read(name)} == set()
    assert (ROOT / "convert" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in ours.namelist())
    assert small.stat().st_size < wheel.stat().st_size / 2


def test_both_wheels_have_one_version_and_the_small_one_asks_for_a_part_of_what_the_other_does(
    small: Path, wheel: Path, tmp_path: Path
) -> None:
    python = alone.installed(tmp_path / "both", wheel, small)
    (site,) = tmp_path.glob("both/lib/*/site-packages")
    found = {one.metadata["Name"]: one for one in importlib.metadata.distributions(path=[str(site)])}
    assert {name: one.version for name, one in found.items()} == dict.fromkeys(
        ("mlxtune", "mlxtune-convert"), mlxtune.__version__
    )
    assert found["mlxtune"].metadata["Requires-Python"] == found["mlxtune-convert"].metadata["Requires-Python"]
    needs, small_needs = (
        {need.name.replace("_", "-"): need.specifier for need in map(Requirement, found[name].requires or [])}
        for name in ("mlxtune", "mlxtune-convert")
    )
    assert set(small_needs) == {"numpy", "safetensors", "ml-dtypes", "gguf", "click", "rich"}
    assert small_needs == {name: needs[name] for name in small_needs}
    for script, expected in (
        ("mlxtune", VERSION),
        ("mlxtune-convert", f"mlxtune-convert, version {mlxtune.__version__}"),
    ):
        assert alone.done(python.with_name(script), "--version", cwd=tmp_path, PYTHONPATH=LIBRARIES) == expected


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
    assert _installed(site, site / "bin" / "mlxtune", "--version") == VERSION
    assert _installed(site, "-m", "mlxtune", "--version") == VERSION
    for command in ([site / "bin" / "mlxtune-convert"], ["-m", "mlxtune_convert"]):
        assert _installed(site, *command, "--version") == f"mlxtune-convert, version {mlxtune.__version__}"


def test_the_checkout_and_the_wheel_find_the_same_recipes(site: Path) -> None:
    names = [path.stem for path in RECIPES]
    assert {"quick", "qlora", "lora"} <= set(names)
    assert resolve.recipe_folder() == ROOT / "configs"
    assert resolve.recipe_names() == names
    script = "from mlxtune.config import resolve\nprint(resolve.recipe_folder(), *resolve.recipe_names(), sep='\\n')"
    assert _installed(site, "-c", script).splitlines() == [str(site / "mlxtune" / "configs"), *names]
    show = "import sys\nfrom mlxtune.config.resolve import load\nfor name in sys.argv[1:]:\n    "
    show += "print(load(name).to_yaml())"
    assert _installed(site, "-c", show, *names) == "\n".join(resolve.load(name).to_yaml() for name in names).strip()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_comment_shows_how_to_use_it(recipe: Path) -> None:
    resolve.load(recipe)  # refuses unknown keys
    assert f"mlxtune train -c {recipe.stem} " in recipe.read_text(encoding="utf-8")


def test_three_recipes_at_least_are_shipped() -> None:
    assert len(RECIPES) >= 3


def test_the_metadata_say_what_is_needed_and_leave_the_backend_to_the_extras(site: Path) -> None:
    (found,) = importlib.metadata.distributions(path=[str(site)])
    assert (found.metadata["Name"], found.version) == ("mlxtune", mlxtune.__version__)
    pythons = SpecifierSet(found.metadata["Requires-Python"])
    assert [minor for minor in range(8, 15) if f"3.{minor}" in pythons] == [11, 12, 13, 14]
    assert set(found.metadata.get_all("Provides-Extra") or []) == {
        *("cpu", "cuda", "dev", "documents", "harness", "llama-cpp", "tensorboard", "trackio", "wandb")
    }
    assert {script.name: script.value for script in found.entry_points} == {
        "mlxtune": "mlxtune.cli:main",
        "mlxtune-convert": "mlxtune_convert.cli:main",
    }
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


def test_the_archives_are_as_the_package_index_and_pip_want_them(wheel: Path, small: Path, tmp_path: Path) -> None:
    """W009 (several packages at the top) is left out by name in pyproject.toml, with the reason; nothing else is."""
    for project in (ROOT, ROOT / "convert"):
        _run("-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=project)
    archives = [wheel, small, *tmp_path.iterdir()]
    assert len(archives) == 4
    said = _run("-m", "twine", "check", "--strict", *archives, cwd=tmp_path)
    assert said.count("PASSED") == 4 and "WARNING" not in said, said
    for built in (wheel, small):
        assert _run("-m", "check_wheel_contents", built, cwd=ROOT).endswith("OK")
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["check-wheel-contents"]
    assert options == {"ignore": ["W009"]}


def test_the_source_archive_holds_what_the_wheel_and_the_tests_need(tmp_path: Path) -> None:
    _run("-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=ROOT)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {"mlxtune/py.typed", "mlxtune/machine/tested.txt", "configs/qlora.yaml", "docs/python.md"} <= names
    assert {"tests/fixtures/imported/axolotl-1-qlora.yml", "convert/mlxtune_convert/py.typed"} <= names


def test_the_tested_versions_are_known_of_all_that_mlxtune_needs_and_within_its_bounds(site: Path) -> None:
    known = tested.versions()
    (found,) = importlib.metadata.distributions(path=[str(site)])
    base = [need for need in map(Requirement, found.requires or []) if "extra" not in str(need.marker or "")]
    assert len(base) > 10 and set(tested.DECISIVE) <= known.keys()
    for need in base:
        assert known[need.name.replace("_", "-").lower()] in need.specifier, need
    assert "tests/tested_versions.py" in (ROOT / "mlxtune" / "machine" / tested.FILE).read_text()
