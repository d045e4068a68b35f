"""Find what makes an image big: ``python biggest_files.py IMAGE``. A Ray Data job over the files of its layers.

The image is extracted on every node, each layer fetched once for all of them; then Ray spreads its directories over
the cluster, and each task reads the tree of the node that it runs on.
"""

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import ray

from lazyfarm import Farm


def files(row: dict[str, list[str] | str]) -> Iterator[dict[str, str | int]]:
    """Yield each file below a directory of the image, with its size in bytes."""
    # One of the nodes' trees is on this machine.
    root = next(Path(root) for root in row["roots"] if Path(root).is_dir())
    for directory, _, names in os.walk(root / row["directory"]):
        for name in names:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                yield {"bytes": path.stat().st_size, "file": str(path.relative_to(root))}


async def biggest_files(image: str, count: int = 10) -> None:
    """Print the *count* biggest files of an image."""
    async with await Farm.connect() as farm:
        ref = await farm.pull(image)
        roots = [extracted.path for extracted in await ref.extract_everywhere()]
        rows = [{"directory": entry.name, "roots": roots} for entry in os.scandir(roots[0]) if entry.is_dir()]
        found = ray.data.from_items(rows).flat_map(files).sort("bytes", descending=True)
        for row in await asyncio.to_thread(found.take, count):
            print(f"{row['bytes']:>12,}  {row['file']}")


if __name__ == "__main__":
    asyncio.run(biggest_files(*sys.argv[1:]))
