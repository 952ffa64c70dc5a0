"""The machine around a run: sleep, battery, low power, disk, and other programs that hold its memory."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mlxtune_convert.sizes import size

LOW_DISK = 10 << 30  # bytes; a 7B model takes half of it in 4 bits
LOW_BATTERY = 20  # percent
POWER = Path("/sys/class/power_supply")  # Linux
# Programs that keep a language model in memory, by how their command line begins, as `ps` prints it.
HOLDERS = {
    "Ollama": re.compile(r"(\S*/)?ollama(\s|$)|\S*/Ollama\.app/"),
    "LM Studio": re.compile(r"\S*/LM Studio|\S*/\.lmstudio/"),
    "llama-server": re.compile(r"(\S*/)?llama-server(\s|$)"),
    "mlx_lm.server": re.compile(r"(\S+\s+)?(-m\s+)?(\S*/)?mlx_lm(\.server|\s+server)(\s|$)"),
}
HELD = 1 << 29  # bytes; a program that holds less has no model loaded
FOR_SYSTEM = 4 << 30  # bytes that macOS and what is open on it want


def can_keep_awake() -> bool:
    """Whether `kept_awake` does anything here."""
    return sys.platform == "darwin" and shutil.which("caffeinate") is not None


@contextlib.contextmanager
def kept_awake() -> Iterator[bool]:
    """A Mac does not go to sleep inside, nor after this process dies; closing its lid still makes it. Yields whether
    that was possible.
    """
    if not can_keep_awake():
        yield False
        return
    holder = subprocess.Popen(["caffeinate", "-i", "-w", str(os.getpid())])
    try:
        yield True
    finally:
        holder.terminate()
        holder.wait()


def battery() -> int | None:
    """Percent left when the machine runs on its battery; None when it is plugged in or has none."""
    if sys.platform == "darwin":
        printed = _output_of("pmset", "-g", "batt")
        percent = re.search(r"(\d+)%", printed)
        return int(percent[1]) if percent and "'Battery Power'" in printed else None
    for supply in sorted(POWER.glob("BAT*")):
        with contextlib.suppress(OSError, ValueError):
            if (supply / "status").read_text().strip() == "Discharging":
                return int((supply / "capacity").read_text())
    return None


def low_power() -> bool | None:
    """Whether macOS's Low Power Mode is on, which slows the GPU; None where the system has none."""
    if sys.platform != "darwin":
        return None
    # Macs with three modes write powermode: 0 automatic, 1 low, 2 high.
    modes = re.findall(r"^\s*(?:lowpowermode|powermode)\s+(\d+)", _output_of("pmset", "-g"), re.MULTILINE)
    return "1" in modes if modes else None


def holders() -> dict[str, int]:
    """Bytes that other programs with a language model in memory hold now, by the program's name; largest first."""
    found: dict[str, int] = {}
    for line in _output_of("ps", "-axww", "-o", "rss=,command=").splitlines():
        kilobytes, _, command = line.strip().partition(" ")
        for name, begins in HOLDERS.items():
            if kilobytes.isdigit() and begins.match(command.strip()):
                found[name] = found.get(name, 0) + int(kilobytes) * 1024
                break
    return dict(sorted(((name, held) for name, held in found.items() if held >= HELD), key=lambda one: -one[1]))


def listed(held: dict[str, int]) -> str:
    """Of `holders`, for a sentence."""
    return ", ".join(f"{name} {size(count)}" for name, count in held.items())


def warnings(folder: Path | None = None, needed: int = LOW_DISK) -> list[str]:
    """What could end a long run or slow it: the battery, Low Power Mode, and a disk with fewer than `needed` bytes free
    where `folder` is (None: nothing is written here).
    """
    out = []
    left = battery()
    if left is not None:
        low = ", and it is low" if left < LOW_BATTERY else ""
        out.append(f"this machine runs on its battery ({left}%{low}): plug it in, or it may end the run")
    if low_power():
        out.append("Low Power Mode is on: the GPU runs at a part of its speed (System Settings, Battery)")
    if folder is None:
        return out
    free = shutil.disk_usage(folder).free
    if free < needed:
        out.append(f"only {size(free)} of disk are free at {folder.absolute()}")
    return out


def crowded(needed: int, memory: int) -> list[str]:
    """A warning when what the run needs does not fit beside what `holders` hold. needed: its predicted peak in bytes,
    or what it needs at least; memory: all that the machine has.
    """
    held = holders()
    if not held or needed + sum(held.values()) + FOR_SYSTEM <= memory:
        return []
    return [
        f"memory is tight: {listed(held)} beside the {size(needed)} of this run, "
        f"of {size(memory)}: unload the model there, or the run may be slow or end"
    ]


def _output_of(*command: str) -> str:
    """What a program of the system prints; nothing where there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout
    except OSError:
        return ""
