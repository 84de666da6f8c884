"""Ports on which the ranks of a run meet, where several processes must know one before any of them listens."""

from __future__ import annotations

import random
import socket
from pathlib import Path

HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Of Linux: from and to which port it gives those who ask for any, so that one found free there is soon another's."""
FIRST = 10000
"""Below are ports of known services."""
_DRAWN = random.SystemRandom()  # a fork has the states of other generators


def handed_out() -> range:
    """Ports that processes get by asking for any."""
    first, last = map(int, HANDED_OUT.read_text().split()) if HANDED_OUT.exists() else (32768, 60999)
    return range(first, last + 1)


def free_port() -> int:
    """One on which nobody listens, and that nobody is handed out.

    Raises:
        OSError: all are taken.
    """
    others = handed_out()
    ports = [port for port in range(FIRST, 65536) if port not in others] or [*others]
    for port in _DRAWN.sample(ports, len(ports)):
        if _is_free(port):
            return port
    raise OSError(f"no port from {FIRST} is free")


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does, after a run that ended just now
        try:
            tried.bind(("", port))
        except OSError:
            return False
    return True
