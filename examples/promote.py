"""Bring an image from one registry to another: ``python promote.py SOURCE TARGET``.

A layer that the target has is not touched; one that nobody has fetched yet is sent on while it arrives.
Run again after a failure, it goes on where it was.
"""

import asyncio
import sys

from lazyfarm import Farm


async def promote(source: str, target: str) -> None:
    """Push *source* to *target*, and check that it is the same image there."""
    async with await Farm.connect() as farm:
        ref = await farm.pull(source)
        pushed = await farm.push(ref, target)
        for layer in pushed.layers:
            print(f"{layer.digest[:19]}  {layer.how}, {layer.bytes} bytes")
        there = await farm.pull(target)
        if there.digest != ref.digest:
            sys.exit(f"{target} is {there.digest}, not {ref.digest}: somebody else has pushed to it")
        print(f"{pushed.target}@{pushed.digest}")


if __name__ == "__main__":
    asyncio.run(promote(*sys.argv[1:]))
