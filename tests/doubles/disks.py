"""Disks for tests: small file systems of their own, to be filled, and one that is made up."""

import asyncio
import os
import subprocess
from contextlib import asynccontextmanager, contextmanager

from cluster.disk_room import BoundlessDisk

MIB = 1024**2


@contextmanager
def small_disk(path, size_bytes):
    """Mount a file system in memory of *size_bytes* at *path*, made if missing."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "small-disk", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@contextmanager
def small_ext4(path, size_bytes):
    """Mount an ext4 of *size_bytes*, in a file beside it, at *path*."""
    path.mkdir(parents=True, exist_ok=True)
    image = path.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def free_bytes(path):
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def fill(path, *, leaving_bytes):
    """Write a file to *path*'s disk that leaves so much free; return it."""
    squatter = path / "squatter"
    with squatter.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_bytes(path) - leaving_bytes)
    return squatter


class CrowdedDisk(BoundlessDisk):
    """A disk that has no room until it is told; knows what waits for it, and for how long each was to wait."""

    def __init__(self):
        self.room = asyncio.Event()
        self.error = None
        self.waiting = []
        self.waits_s = []

    @asynccontextmanager
    async def reserved(self, what, parts, on_wait, *, wait_s=None):
        self.waiting.append(what)
        self.waits_s.append(wait_s)
        try:
            if not self.room.is_set():
                await on_wait(f"no room for {what}")
            await self.room.wait()
            if self.error:
                raise self.error
            yield
        finally:
            self.waiting.remove(what)
