"""Commands as bytes, in Redis's protocol (RESP2)."""

from __future__ import annotations

from collections.abc import Iterable

import hiredis

Argument = str | bytes | int | float
Command = tuple[Argument, ...]


def pack(command: Command) -> bytes:
    """Return a command as it is sent."""
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its stub says a tuple of one
    return packed


def pack_all(commands: Iterable[Command]) -> bytes:
    """Return commands as they are sent together."""
    return b"".join([pack(command) for command in commands])
