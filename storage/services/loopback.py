"""TCP ports on loopback: choosing free ones, and finding out whether one is answered."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

HOST = "127.0.0.1"


def choose_ports(names: Sequence[str], preferred: Mapping[str, int]) -> dict[str, int]:
    """Choose a port for each of *names*: the preferred one where nobody has it, else any free one.

    All are held open until the last is chosen, so that they differ. Another process may take one
    before its server binds it; the server then fails to start, and the next try chooses anew.
    """
    chosen: dict[str, int] = {}
    held: list[socket.socket] = []
    try:
        for name in names:
            listener = _bind(preferred.get(name, 0)) or _bind(0)
            if listener is None:
                msg = "the kernel gives no free port on loopback"
                raise OSError(msg)
            held.append(listener)
            chosen[name] = listener.getsockname()[1]
    finally:
        for listener in held:
            listener.close()
    return chosen


def is_listening(port: int, timeout_s: float = 1.0) -> bool:
    """Tell whether somebody accepts connections on *port*."""
    try:
        with socket.create_connection((HOST, port), timeout=timeout_s):
            return True
    except OSError:
        return False


def _bind(port: int) -> socket.socket | None:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # As servers do: a port whose old connections linger in TIME_WAIT is free to them too.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(1)
    except OSError:
        listener.close()
        return None
    return listener
