"""`make` finds a Python that works, or says in one line why none does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FINE = {"3.11": "python3.11", "3.12": "python3.12", "3.13": "python3.13", "3.14": "python3.14"}
# The system's own tools that the recipes call; everything else on the path is made by a test.
TOOLS = ("sh", "grep", "rm", "mkdir", "touch", "cat", "chmod")
make = shutil.which("make") or pytest.skip("make is not installed", allow_module_level=True)


class Machine:
    """A copy of the Makefile and a path with nothing on it but what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.tree, self.log = folder / "bin", folder / "tree", folder / "log"
        self.bin.mkdir()
        self.tree.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.tree)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        self.system("Linux")

    def program(self, name: str, script: str) -> None:
        """A program that notes how it was called, then runs `script`."""
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>"{self.log}"\n{script}\n')
        path.chmod(0o755)

    def system(self, name: str, release: str = "15.1") -> None:
        self.program("uname", f"echo {name}")
        self.program("ldconfig", "echo '	libopenblas.so.0 (libc6) => libopenblas.so.0'")
        self.program("chromium", "exit 0")
        if name == "Darwin":
            self.program("sw_vers", f"echo {release}")

    def python(self, name: str, version: str, machine: str = "arm64", venv: bool = True, installs: bool = True) -> None:
        """A Python that knows its version, whether it has venv, and how to make one whose pip only takes notes."""
        pip = f'#!/bin/sh\necho "pip: $*" >>"{self.log}"\nexit {0 if installs else 1}'
        self.program(
            name,
            f"""case "$1 $2" in
              *ensurepip*) exit {0 if venv else 1};;
              -c*) echo "{version.replace(".", " ")} {machine}";;
              "-m venv") mkdir -p "$3/bin"; cat >"$3/bin/python" <<'END'
{pip}
END
              chmod +x "$3/bin/python";;
            esac""",
        )

    def make(self, target: str = "machine") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [make, target], cwd=self.tree, env={"PATH": str(self.bin)}, capture_output=True, text=True, check=False
        )

    def choice(self) -> str:
        done = self.make()
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()

    def refusal(self, target: str = "machine") -> str:
        """The one line that says why not; beside it only make's own line on the failed recipe."""
        done = self.make(target)
        assert done.returncode != 0
        assert done.stdout == ""
        lines = [line for line in done.stderr.splitlines() if not re.match(r"\w*make(\[\d+\])?: \*\*\*", line)]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("mlxtune: ")
        return lines[0].removeprefix("mlxtune: ")

    def calls(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_oldest_supported_python_is_preferred(machine: Machine) -> None:
    machine.python("python3", "3.14")
    for version, name in reversed(FINE.items()):
        machine.python(name, version)
        assert machine.choice() == f"{name} on Linux"


def test_a_shim_that_exists_but_fails_is_passed_over(machine: Machine) -> None:
    machine.program("python3.11", "echo 'pyenv: python3.11: command not found' >&2; exit 127")
    machine.python("python3.12", "3.12")
    assert machine.choice() == "python3.12 on Linux"


def test_plain_python3_is_taken_when_its_version_fits(machine: Machine) -> None:
    machine.python("python3", "3.13")
    assert machine.choice() == "python3 on Linux"


def test_the_python_that_runs_this_test_is_understood(machine: Machine) -> None:
    machine.program("python3", f'case "$2" in *ensurepip*) exit 0;; esac; exec "{sys.executable}" "$@"')
    assert machine.choice() == "python3 on Linux"


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.15", "4.11"])
def test_a_python_that_is_too_old_or_too_new_is_refused_with_its_version(machine: Machine, version: str) -> None:
    machine.python("python3", version)
    assert machine.refusal() == f"Python 3.11 to 3.14 is needed; found only {version}"


def test_a_name_that_promises_more_than_the_version_is_not_believed(machine: Machine) -> None:
    machine.python("python3.11", "3.10")
    machine.python("python3.13", "3.13")
    assert machine.choice() == "python3.13 on Linux"


def test_no_python_at_all_is_refused(machine: Machine) -> None:
    assert machine.refusal() == "no Python found; install Python 3.11 to 3.14, or uv"


def test_uv_is_the_way_out_when_no_python_fits(machine: Machine) -> None:
    machine.program("uv", "exit 1")
    assert machine.choice() == "uv on Linux"
    machine.python("python3", "3.9")
    assert machine.choice() == "uv on Linux"
    machine.python("python3.12", "3.12", venv=False)
    assert machine.choice() == "uv on Linux"
    machine.python("python3.14", "3.14")
    assert machine.choice() == "python3.14 on Linux"


def test_a_python_without_venv_is_refused_with_the_package_to_install(machine: Machine) -> None:
    machine.python("python3", "3.12", venv=False)
    assert "python3 cannot make virtual environments; install python3-venv" in machine.refusal()
    machine.python("python3.13", "3.13")
    assert machine.choice() == "python3.13 on Linux"


def test_an_x86_python_on_macos_is_refused_and_uv_is_asked_for_an_arm64_one(machine: Machine) -> None:
    machine.system("Darwin")
    machine.python("python3", "3.12", machine="x86_64")
    assert machine.refusal().startswith("python3 is an x86_64 Python (Rosetta")
    machine.program("uv", 'for last; do :; done; [ "$1" = venv ] && mkdir -p "$last"; exit 0')
    assert machine.choice() == "uv on Darwin"
    assert machine.make("setup").returncode == 0
    wanted = re.search(r"^uv venv .*--python (\S+) \.venv$", machine.calls(), re.MULTILINE)
    assert wanted and wanted[1] == "cpython->=3.11,<3.15-macos-aarch64-none"
    machine.python("python3.13", "3.13", machine="arm64")
    assert machine.choice() == "python3.13 on Darwin"


def test_an_x86_python_on_linux_is_fine(machine: Machine) -> None:
    machine.python("python3", "3.12", machine="x86_64")
    assert machine.choice() == "python3 on Linux"


@pytest.mark.parametrize(("release", "fine"), [("13.7.1", False), ("12", False), ("14.0", True), ("26.1", True)])
def test_macos_must_be_14_or_later(machine: Machine, release: str, fine: bool) -> None:
    machine.system("Darwin", release)
    machine.python("python3", "3.12")
    if fine:
        assert machine.choice() == "python3 on Darwin"
    else:
        assert machine.refusal() == f"macOS 14 or later is needed for MLX; this is macOS {release}"


@pytest.mark.parametrize("system", ["FreeBSD", "MINGW64_NT-10.0"])
def test_other_systems_are_refused(machine: Machine, system: str) -> None:
    machine.system(system)
    machine.python("python3", "3.12")
    assert machine.refusal() == f"macOS or Linux is needed; this is {system}"


def test_setup_refuses_in_the_same_words_and_leaves_nothing(machine: Machine) -> None:
    assert machine.refusal("setup") == machine.refusal()
    assert not (machine.tree / ".venv").exists()


@pytest.mark.parametrize(("system", "extras"), [("Linux", "cpu,dev"), ("Darwin", "dev")])
def test_setup_asks_for_a_backend_on_linux_only_and_is_done_once(machine: Machine, system: str, extras: str) -> None:
    machine.system(system)
    machine.python("python3.12", "3.12")
    assert machine.make("setup").returncode == 0
    assert f"-e .[{extras}]\n" in machine.calls()
    before = machine.calls()
    assert machine.make("setup").returncode == 0
    assert machine.calls() == before


def test_setup_begins_again_after_an_install_that_failed(machine: Machine) -> None:
    machine.python("python3.12", "3.12", installs=False)
    assert machine.make("setup").returncode != 0
    assert not (machine.tree / ".venv" / ".ready").exists()
    machine.python("python3.12", "3.12")
    assert machine.make("setup").returncode == 0
    assert (machine.tree / ".venv" / ".ready").exists()


def test_setup_begins_again_when_the_dependencies_change(machine: Machine) -> None:
    machine.python("python3.12", "3.12")
    machine.make("setup")
    ready = machine.tree / ".venv" / ".ready"
    os.utime(ready, (1, 1))
    before = machine.calls()
    assert machine.make("setup").returncode == 0
    assert machine.calls().count("-m venv") == before.count("-m venv") + 1


def test_setup_with_uv_needs_no_other_python(machine: Machine) -> None:
    machine.program("uv", 'for last; do :; done; [ "$1" = venv ] && mkdir -p "$last"; exit 0')
    assert machine.make("setup").returncode == 0
    assert re.search(r"^uv venv .*--python >=3\.11,<3\.15 \.venv$", machine.calls(), re.MULTILINE)
    assert re.search(r"^uv pip install .*--python \.venv/bin/python -e \.\[cpu,dev\]$", machine.calls(), re.MULTILINE)


@pytest.mark.parametrize("root", [True, False])
def test_without_openblas_root_installs_it_and_others_are_told_in_one_line(machine: Machine, root: bool) -> None:
    machine.python("python3.12", "3.12")
    machine.program("ldconfig", "echo nothing")
    machine.program("id", f"echo {0 if root else 1000}")
    machine.program("apt-get", "exit 0")
    done = machine.make("setup")
    assert done.returncode == 0
    if root:
        assert "apt-get install -y -qq libopenblas0-pthread" in machine.calls()
        assert done.stderr == ""
    else:
        assert "apt-get" not in machine.calls()
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("mlxtune: libopenblas0-pthread")


def test_an_openblas_that_cannot_be_installed_stops_nothing(machine: Machine) -> None:
    machine.python("python3.12", "3.12")
    machine.program("ldconfig", "echo nothing")
    machine.program("id", "echo 0")
    machine.program("apt-get", "exit 100")
    done = machine.make("setup")
    assert done.returncode == 0
    assert done.stderr == "mlxtune: OpenBLAS could not be installed; float32 work will be some 30 times slower\n"


@pytest.mark.parametrize("root", [True, False])
def test_without_a_browser_root_installs_one_and_others_are_told_in_one_line(machine: Machine, root: bool) -> None:
    machine.python("python3.12", "3.12")
    (machine.bin / "chromium").unlink()
    machine.program("id", f"echo {0 if root else 1000}")
    machine.program("apt-get", "exit 0")
    done = machine.make("setup")
    assert done.returncode == 0
    if root:
        assert "apt-get install -y -qq --no-install-recommends chromium-headless-shell" in machine.calls()
        assert "openblas" not in machine.calls()
        assert done.stderr == ""
    else:
        assert "apt-get" not in machine.calls()
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("mlxtune: chromium-headless-shell is not")


def test_a_browser_that_is_there_or_that_cannot_be_installed_stops_nothing(machine: Machine) -> None:
    machine.python("python3.12", "3.12")
    machine.program("id", "echo 0")
    machine.program("apt-get", "exit 100")
    assert machine.make("setup").stderr == ""
    assert "apt-get" not in machine.calls()
    (machine.bin / "chromium").unlink()
    os.utime(machine.tree / ".venv" / ".ready", (1, 1))
    done = machine.make("setup")
    assert done.returncode == 0
    said = "mlxtune: chromium-headless-shell could not be installed; the tests of pages need a browser\n"
    assert done.stderr == said
    machine.system("Darwin")
    (machine.bin / "chromium").unlink()
    machine.python("python3.12", "3.12")
    os.utime(machine.tree / ".venv" / ".ready", (1, 1))
    assert machine.make("setup").stderr == ""
