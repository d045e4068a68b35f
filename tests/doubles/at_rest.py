"""Where secrets could come to rest: searches that find them, and name the place."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

MIB = 1024**2
#: Runs a Redis command.
Execute = Callable[..., Awaitable[Any]]


async def in_redis(execute: Execute, secrets: set[bytes]) -> list[str]:
    """Return what of Redis holds a secret: keys, and values in their serialized form."""
    found = []
    cursor = b"0"
    while True:
        cursor, keys = await execute("SCAN", cursor, "COUNT", 1000)
        values = await asyncio.gather(*(_value(execute, key) for key in keys))
        for key, value in zip(keys, values, strict=True):
            kept = key + b"\0" + value
            found += [key.decode(errors="replace") for secret in secrets if secret in kept]
        if int(cursor) == 0:
            return found


async def _value(execute: Execute, key: bytes) -> bytes:
    read = {
        b"string": ("GET", key),
        b"hash": ("HGETALL", key),
        b"set": ("SMEMBERS", key),
        b"zset": ("ZRANGE", key, 0, -1),
        b"list": ("LRANGE", key, 0, -1),
        b"stream": ("XRANGE", key, "-", "+"),
    }
    kind = await execute("TYPE", key)
    return b"" if kind == b"none" else repr(await execute(*read[kind])).encode()


def in_files(root: Path, secrets: set[bytes]) -> list[str]:
    """Return the files under *root*, and behind its links to directories, that hold a secret."""
    found = []
    for where, directories, files in os.walk(root, followlinks=True):
        # Mounted and unpacked layers, and Swift's own copy of them: what the test made.
        directories[:] = [name for name in directories if name not in ("mnt", "fs", "sockets")]
        for name in files:
            path = Path(where, name)
            if path.is_file() and path.stat().st_size < 64 * MIB:
                data = path.read_bytes()
                found += [str(path) for secret in secrets if secret in data]
    return found


def in_processes(pids: set[int], secrets: set[bytes]) -> list[str]:
    """Return the processes whose command line or environment holds a secret."""
    found = []
    for pid in pids:
        for what in ("cmdline", "environ"):
            try:
                data = Path(f"/proc/{pid}/{what}").read_bytes()
            except OSError:
                continue  # it has ended meanwhile
            found += [f"{what} of {pid}" for secret in secrets if secret in data]
    return found


def in_gcs(pids: set[int], secrets: set[bytes]) -> list[str]:
    """Return where the memory of the GCS holds a secret; what can't be read is left out."""
    (gcs,) = _of_name(pids, "gcs_server")
    return _in_memory(gcs, secrets)


def in_object_stores(pids: set[int], secrets: set[bytes]) -> list[str]:
    """Return where the nodes' object stores hold a secret: objects that are there, and what is left of freed ones."""
    raylets = _of_name(pids, "raylet")
    assert raylets
    return [place for raylet in raylets for place in _in_memory(raylet, secrets, of="plasma")]


def _of_name(pids: set[int], name: str) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == name]


def _in_memory(pid: int, secrets: set[bytes], *, of: str = "") -> list[str]:
    """Return the writable parts of a memory that hold a secret; of what is mapped from *of*, if that is said."""
    found = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights, *_ = line.split()
            start, end = (int(edge, 16) for edge in span.split("-"))
            if not rights.startswith("rw") or end - start > 512 * MIB or of not in line:
                continue
            try:
                memory.seek(start)
                data = memory.read(end - start)
            except (OSError, ValueError):
                continue
            found += [f"{line}" for secret in secrets if secret in data]
    return found
