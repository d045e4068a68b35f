"""Whose bucket it is: each farm that uses one leaves a mark there, an empty object ``farms/NAME-ID``.

What another farm records isn't known here: where there is another's mark, no object that looks like nobody's may be
touched. The ID is of the farm's records, so two farms of one name are two. A farm whose Redis was lost is another one
from then on: its old mark stands until somebody deletes it.
"""

from __future__ import annotations

import asyncio
import secrets

from cluster.ports import ContentStore
from storage.keys import Keys
from storage.link import RedisLink

_PREFIX = "farms/"


async def others_in_bucket(link: RedisLink, keys: Keys, objects: ContentStore) -> list[str]:
    """Leave this farm's mark in the bucket, if it isn't there; return the marks of others, sorted."""
    await link.execute("SET", keys.mark, secrets.token_hex(8), "NX", may_repeat=True)
    own = f"{_PREFIX}{keys.farm}-{(await link.execute('GET', keys.mark, may_repeat=True)).decode()}"

    def look() -> list[str]:
        marks = {found.key for found in objects.objects(_PREFIX)}
        if own not in marks:
            objects.put(own, b"")
        return sorted(marks - {own})

    return await asyncio.to_thread(look)
