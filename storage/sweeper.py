"""Sweeps the bucket of what no record names: objects of commits that were lost, losers' uploads, unfinished ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from cluster.collect.ports import CollectStore
from cluster.collect.sweep import SWEPT_PREFIX, Suspect, suspect
from cluster.ports import ContentStore

_BATCH = 500


async def sweep(store: CollectStore, objects: ContentStore, *, stray_s: float) -> int:
    """Abort uploads, and have objects deleted, that nothing has named for *stray_s* seconds; return how many.

    Stopped at any point, the next one goes on: the store remembers since when each was seen. Objects are deleted with
    those of blobs that ended (:meth:`cluster.collect.runner.Collector.delete_due`).
    """
    suspects = await asyncio.to_thread(_suspects, objects)
    count = 0
    while batch := await asyncio.to_thread(_next, suspects):
        for stray in await store.strays(batch, stray_s=stray_s):
            if stray.upload_id:
                await asyncio.to_thread(objects.abort_upload, stray.key, stray.upload_id)
            count += 1
    return count


def _suspects(objects: ContentStore) -> Iterator[Suspect]:
    uploads = (suspect(key, upload_id) for key, upload_id in objects.list_uploads(SWEPT_PREFIX))
    whole = (suspect(found.key) for found in objects.objects(SWEPT_PREFIX))
    return (one for one in chain(uploads, whole) if one is not None)


def _next(suspects: Iterator[Suspect]) -> Sequence[Suspect]:
    return list(islice(suspects, _BATCH))
