"""Whether a process asks the network for anything: who has a name, or whoever is at an address."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

LOOK_UPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
CALLS = ("socket.connect", "socket.sendto", "socket.sendmsg")  # their first two arguments: the socket, the address


def forbid(record: int) -> None:
    """From now on every such call of this process, whichever library makes it, fails.

    Each is written to a file too, since libraries go on without a network in silence. record: that file, open.
    Connections inside this machine without an address (AF_UNIX) are none.
    """

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in LOOK_UPS and event not in CALLS:
            return
        if event in CALLS and arguments[0].family not in (socket.AF_INET, socket.AF_INET6):
            return
        asked = arguments[0] if event in LOOK_UPS else arguments[1]
        os.write(record, f"{event} of {asked} ".encode())
        raise OSError(f"no network: {event} of {asked}")

    sys.addaudithook(hear)
