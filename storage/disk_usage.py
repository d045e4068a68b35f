"""What files take on a disk."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

#: Bytes of a block as ``st_blocks`` counts them, whatever the file system's own are.
_BLOCK_BYTES = 512


def disk_bytes(root: Path) -> int:
    """Return the bytes that a directory and all in it take, as ``du`` does: a file with several names counts once.

    What goes meanwhile, or may not be looked into, isn't counted. Blocks that a file system shares between files count
    for each of them.
    """
    total = os.lstat(root).st_blocks
    linked: set[tuple[int, int]] = set()
    pending = [os.fsencode(root)]
    while pending:
        try:
            listing = list(os.scandir(pending.pop()))
        except (FileNotFoundError, PermissionError):
            continue
        for item in listing:
            try:
                status = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if item.is_dir(follow_symlinks=False):
                pending.append(item.path)
            elif status.st_nlink > 1:
                if (status.st_dev, status.st_ino) in linked:
                    continue
                linked.add((status.st_dev, status.st_ino))
            total += status.st_blocks
    return total * _BLOCK_BYTES


def kept_disk_bytes(root: Path, kept: Path, mark: str) -> int:
    """Return :func:`disk_bytes`, measured once for each *mark*, in which the directory does not change.

    Args:
        root: The directory.
        kept: A file of its own, where what was measured is kept. On a full disk it isn't, and is measured again.
        mark: One word.
    """
    with suppress(OSError, ValueError):
        size, measured = kept.read_text().split()
        if measured == mark:
            return int(size)
    measured_bytes = disk_bytes(root)
    new = kept.with_name(f"{kept.name}.{secrets.token_hex(4)}")
    try:
        new.write_text(f"{measured_bytes} {mark}")
        new.rename(kept)
    except OSError:
        with suppress(OSError):
            new.unlink()
    return measured_bytes
