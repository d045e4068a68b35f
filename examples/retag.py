"""Give an image other names in repositories of its registry: ``python retag.py SOURCE TARGET…``.

Manifest and configuration are read; the layers stay where they are and are mounted there.
"""

import asyncio
import sys

from lazyfarm import Farm


async def retag(source: str, *targets: str) -> None:
    """Push *source* to each of *targets*, all at once."""
    async with await Farm.connect() as farm:
        ref = await farm.pull(source)
        for pushed in await asyncio.gather(*(farm.push(ref, target) for target in targets)):
            sent = sum(layer.bytes for layer in pushed.layers)
            print(f"{pushed.target}@{pushed.digest}: {sent} bytes of layers sent")


if __name__ == "__main__":
    asyncio.run(retag(*sys.argv[1:]))
