"""The machine around a run: sleep, battery, disk."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LOW_DISK = 10 << 30  # bytes; a 7B model takes half of it in 4 bits
LOW_BATTERY = 20  # percent
POWER = Path("/sys/class/power_supply")  # Linux


@contextlib.contextmanager
def kept_awake() -> Iterator[bool]:
    """A Mac does not go to sleep inside, nor after this process dies. Yields whether that was possible."""
    if sys.platform != "darwin" or not shutil.which("caffeinate"):
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
        said = subprocess.run(["pmset", "-g", "batt"], capture_output=True, text=True, check=False).stdout
        percent = re.search(r"(\d+)%", said)
        return int(percent[1]) if percent and "'Battery Power'" in said else None
    for supply in sorted(POWER.glob("BAT*")):
        with contextlib.suppress(OSError, ValueError):
            if (supply / "status").read_text().strip() == "Discharging":
                return int((supply / "capacity").read_text())
    return None


def warnings(folder: Path, needed: int = LOW_DISK) -> list[str]:
    """What could end a long run: the battery, and a disk with fewer than `needed` bytes free where `folder` is."""
    out = []
    left = battery()
    if left is not None:
        low = ", and it is low" if left < LOW_BATTERY else ""
        out.append(f"this machine runs on its battery ({left}%{low}): plug it in, or it may end the run")
    free = shutil.disk_usage(folder).free
    if free < needed:
        out.append(f"only {free / (1 << 30):.1f} GiB of disk are free at {folder.absolute()}")
    return out
