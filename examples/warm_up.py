"""Bring images to every node before anybody asks for them: ``python warm_up.py IMAGE…``, at night, from cron.

Each layer is fetched once for the whole farm, and held for a day: whatever is pruned meanwhile, these stay.
"""

import asyncio
import sys

from lazyfarm import Farm

_DAY_S = 24 * 3600.0


async def warm_up(*images: str) -> None:
    """Extract *images* everywhere; each that fails is told of, and none stops another."""
    async with await Farm.connect() as farm:

        async def warm(image: str) -> str:
            ref = await farm.pull(image)
            extracted = await ref.extract_everywhere()
            await farm.pin(ref, ttl_s=_DAY_S, labels={"why": "warm-up", "image": image})
            fetched = sum(layer.bytes_fetched for each in extracted for layer in each.layers)
            return f"on {len(extracted)} nodes, {fetched} bytes fetched"

        done = await asyncio.gather(*map(warm, images), return_exceptions=True)
    for image, outcome in zip(images, done, strict=True):
        print(f"{image}: {outcome}")
    sys.exit(any(isinstance(outcome, BaseException) for outcome in done))


if __name__ == "__main__":
    asyncio.run(warm_up(*sys.argv[1:]))
