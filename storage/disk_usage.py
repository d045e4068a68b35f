"""What files take on a disk."""

from __future__ import annotations

import os
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
