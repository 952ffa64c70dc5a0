"""A box of Linux: namespaces, without any program's help.

The server is a bare Python process that shuts itself up once: a file system of its own, in which only Python and the
system's libraries are, none of them writable; no network; no other processes. For each program it forks two boxes, each
with processes of its own, so that whatever was started ends with them, and an empty folder that is gone with them.
A fork costs 2 ms where a new Python costs 20.

Who is not root needs user namespaces for it, which a container or a distribution may forbid: then there is no
sandbox.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxtune.evaluate.checks.sandbox import boxes

# From <sched.h>, <sys/mount.h>, <sys/prctl.h>: numbers of the kernel's interface, which never change.
NEW_FILES, NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x20000, 0x10000000, 0x20000000, 0x40000000
NEW_IPC, NEW_HOSTNAME = 0x8000000, 0x4000000
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH, AT_RECURSIVE, AT_FDCWD = 2, 0x8000, -100
DROP_CAPABILITY, NO_NEW_PRIVILEGES, DIE_WITH_PARENT = 24, 38, 1
CAPABILITIES_VERSION = 0x20080522
MOUNT_SETATTR = 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOBODY = 65534  # the user that programs are where the server is root
FOLDER = "/box"  # where a program may write
SIZE = "size=16m,nr_inodes=256,mode=777"  # of that folder
SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store")
GRACE = 5  # seconds after its time that a box is ended, should nobody have done it

_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, result: int) -> None:
    """Raise OSError where a call of the system failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str, flags: int, settings: str = "") -> None:
    texts = [text.encode() or None for text in (source, target, kind)]
    _call(f"mount {target}", _libc.mount(*texts, ctypes.c_ulong(flags), settings.encode() or None))


def shut_up() -> None:
    """Leave everything but Python and the system's libraries. Raises OSError where the system does not allow it."""
    flags = NEW_FILES | NEW_NETWORK | NEW_IPC | NEW_HOSTNAME
    user, group = os.geteuid(), os.getegid()
    if user != 0 or _libc.unshare(flags) != 0:
        _call("unshare", _libc.unshare(flags | NEW_USER))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount("", "/", "", RECURSIVE | PRIVATE)
    # Any folder will do to put the new file system on, for nobody else sees it there: this one is surely here.
    new = str(Path(__file__).resolve().parent)
    shown = _shown()
    _mount("tmpfs", new, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    for path in shown:
        _show(path, new)
    for path in SYSTEM:
        if os.path.realpath(path) != path and not os.path.exists(new + path):  # /lib, which is /usr/lib
            os.makedirs(os.path.dirname(new + path), exist_ok=True)
            os.symlink(os.path.realpath(path), new + path)
    os.mkdir(new + FOLDER)
    _mount("", new, "", REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES)
    os.chdir(new)
    _call("pivot_root", _libc.syscall(PIVOT_ROOT[platform.machine()], b".", b"."))
    _call("umount", _libc.umount2(b".", DETACH))
    os.chdir("/")
    sys.path[:] = [os.path.realpath(path) for path in sys.path]


def _shown() -> list[str]:
    """What programs may read: the standard library, and the libraries of the system that it may need."""
    wanted = [*SYSTEM, *sys.path]
    found: list[str] = []
    for path in sorted({os.path.realpath(path) for path in wanted if os.path.exists(path)}):
        if not any(path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found


def _show(path: str, new: str) -> None:
    """Put one path into the new file system, with all that is mounted below it, read-only."""
    target = new + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT))
    _mount(path, target, "", BIND | RECURSIVE)
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SUID | NO_DEVICES, 0, 0, 0)
    _call(
        f"mount_setattr {path}",
        _libc.syscall(MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, ctypes.sizeof(attributes)),
    )


def _give_up_rights() -> None:
    """Become a user without any, for good."""
    for capability in range(64):  # the kernel has some 41
        _libc.prctl(DROP_CAPABILITY, capability, 0, 0, 0)
    if os.geteuid() == 0:
        with suppress(OSError):  # in a user namespace nobody else is known
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0)
    _call("capset", _libc.capset(header, (ctypes.c_uint32 * 6)()))
    _call("prctl", _libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))


def _keep_open(*handles: int) -> None:
    """Close every other one, but for 0, 1 and 2."""
    start = 3
    for handle in sorted(handle for handle in handles if handle > 2):
        os.closerange(start, handle)
        start = handle + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX") if start < 1024 else start + 1024)


class Boxes:
    """Starts the boxes of one program. faults: a pipe for what went wrong in starting them."""

    def __init__(self, seconds: float, faults: int) -> None:
        self.seconds, self.faults = seconds, faults

    def start(self, part: str, given: int, handles: Sequence[int]) -> Callable[[], None]:
        """As `boxes.Start`. A keeper is forked, which forks the box and ends it: when it is told to, when this process
        is gone, or when its time is over. The box is the first process of a namespace, with which all others end.
        """
        leash_read, leash_write = os.pipe()
        keeper = os.fork()
        if keeper == 0:
            try:
                _keep_open(given, leash_read, self.faults, *handles)
                self._keep(part, given, handles, leash_read)
            except BaseException:
                os.write(self.faults, traceback.format_exc(limit=-1).encode())
            os._exit(0)
        os.close(leash_read)

        def end() -> None:
            os.close(leash_write)
            os.waitpid(keeper, 0)

        return end

    def _keep(self, part: str, given: int, handles: Sequence[int], leash: int) -> None:
        _call("unshare", _libc.unshare(NEW_PROCESSES))
        if part == "program":  # tests write nothing; a file system costs a third of the time
            _call("unshare", _libc.unshare(NEW_FILES))
            _mount("tmpfs", FOLDER, "tmpfs", NO_SUID | NO_DEVICES | NO_EXEC, SIZE)
        box = os.fork()
        if box == 0:
            try:
                os.dup2(given, 0)
                os.dup2(2, 1)  # what programs print goes nowhere
                os.chdir(FOLDER)
                boxes.limit(self.seconds)
                _give_up_rights()
            except BaseException:
                os.write(self.faults, traceback.format_exc(limit=-1).encode())
                os._exit(1)
            _keep_open(*handles)
            os.environ.clear()
            os.environ.update(HOME=FOLDER, TMPDIR=FOLDER, LANG="C.UTF-8")
            boxes.play(part, handles)
            os._exit(0)
        _keep_open(leash, self.faults)
        select.select([leash], [], [], self.seconds + GRACE)
        os.kill(box, 9)
        os.waitpid(box, 0)


def _run_one() -> None:
    """One program: read it, then its tests when its box has begun; say what became of it."""
    asked = json.loads(_line())
    faults_read, faults_write = os.pipe()
    os.set_blocking(faults_read, False)

    def tests() -> str:
        _say({"begun": True})
        return str(json.loads(_line())["tests"])

    outcome = boxes.judged(Boxes(asked["seconds"], faults_write).start, asked["program"], tests, asked["seconds"])
    with suppress(BlockingIOError):
        fault = os.read(faults_read, 4096).decode(errors="replace").strip().splitlines()
        if fault:
            _say({"fault": fault[-1]})
            return
    _say({"passed": outcome.passed, "reason": outcome.reason})


def _line() -> bytes:
    """The next line of what the server is asked. No more is sent before it is answered."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            os._exit(0)
        line += part
    return line


def _say(value: dict[str, Any]) -> None:
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def serve() -> None:
    """Shut up, say so, and run programs until nobody asks any more. A fork does it, whose memory goes with it."""
    _libc.prctl(DIE_WITH_PARENT, 9, 0, 0, 0)
    try:
        shut_up()
    except (OSError, KeyError, AttributeError) as error:
        _say({"fault": f"{error}"})
        return
    _say({"begun": True})
    while True:
        select.select([0], [], [])
        runner = os.fork()
        if runner == 0:
            _libc.prctl(DIE_WITH_PARENT, 9, 0, 0, 0)  # and with it go the leashes of its boxes
            try:
                _run_one()
            except BaseException as error:
                _say({"fault": f"{type(error).__name__}: {error}"})
            os._exit(0)
        _, status = os.waitpid(runner, 0)
        if status != 0:
            _say({"fault": "a process was killed"})
