"""Sweeps the bucket of what no record names, and finds records whose objects are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice

from cluster.collect.pace import Pace
from cluster.collect.ports import CollectStore
from cluster.collect.rounds import Round, due_round
from cluster.collect.sweep import QUARANTINE_S, SWEPT_PREFIXES, Suspect, suspect
from cluster.digest import Digest
from cluster.faultpoints import FaultPoint, ahit
from cluster.ports import ContentStore, RefStore
from cluster.ref import BlobRecord

#: Which round it is.
WORK = "sweep"
_BATCH = 500
#: Objects that S3 lists in one request.
_LISTED = 1000
#: Seconds between two looks at an object that isn't there: a store may be late to tell of what it has.
_SURE_S = 1.0


async def due_sweep(store: CollectStore, *, every_s: float) -> Round | None:
    """Return the sweep to begin or to go on with; None where none is due."""
    return due_round(await store.round(WORK), now_wall_s=await store.now_wall_s(), every_s=every_s)


async def sweep(store: CollectStore, objects: ContentStore, current: Round, *, stray_s: float, pace: Pace) -> int:
    """Abort uploads, and have objects deleted, that nothing has named for *stray_s* seconds; return how many.

    Stopped at any point, the next one goes on: the store remembers since when each was seen, and how far the round has
    come. Objects are deleted with those of blobs that ended (:meth:`cluster.collect.runner.Collector.delete_due`).

    Args:
        store: Judges what is found.
        objects: The bucket.
        current: Where to go on.
        stray_s: Seconds for which one must have been seen and named by nothing.
        pace: Of requests to the bucket.
    """
    # Read at each call: what is first seen as a stray in this one is judged by a later one, which reads what was
    # recorded meanwhile.
    built = {blob.key: blob.digest for blob in await store.blobs()}
    count = 0
    if not current.after:
        uploads = await asyncio.to_thread(_uploads, objects)
        for start in range(0, len(uploads), _BATCH):
            for stray in await _strays(store, uploads[start : start + _BATCH], stray_s):
                await ahit(FaultPoint.SWEEP_JUDGED)
                await asyncio.to_thread(objects.abort_upload, stray.key, stray.upload_id)
                await asyncio.sleep(pace.wait_s(1, asyncio.get_running_loop().time()))
                count += 1
    found = _objects(objects, current.after)
    while keys := await asyncio.to_thread(lambda: list(islice(found, _BATCH))):
        suspects = [one for key in keys if (one := suspect(key, built=built)) is not None]
        count += len(await _strays(store, suspects, stray_s))
        await ahit(FaultPoint.SWEEP_JUDGED)
        current = replace(current, after=keys[-1])
        await store.keep_round(WORK, current)
        await asyncio.sleep(pace.wait_s(len(keys) / _LISTED, asyncio.get_running_loop().time()))
    await store.tidy_locals()
    await store.keep_round(WORK, replace(current, is_done=True))
    return count


async def _strays(store: CollectStore, suspects: Sequence[Suspect], stray_s: float) -> list[Suspect]:
    over: list[Suspect] = []
    for is_quarantined, some in groupby(suspects, lambda one: one.is_quarantined):
        over += await store.strays(list(some), stray_s=QUARANTINE_S if is_quarantined else stray_s)
    return over


def _uploads(objects: ContentStore) -> list[Suspect]:
    found = (suspect(key, upload_id) for prefix in SWEPT_PREFIXES for key, upload_id in objects.list_uploads(prefix))
    return [one for one in found if one is not None]


def _objects(objects: ContentStore, after: str) -> Iterator[str]:
    """List the keys that come after *after*, sorted."""
    for prefix in SWEPT_PREFIXES:
        if after.startswith(prefix) or prefix > after:
            for found in objects.objects(prefix, after if after.startswith(prefix) else ""):
                yield found.key


async def make_missing_lazy(refs: RefStore, objects: ContentStore, digests: Sequence[Digest], *, pace: Pace) -> int:
    """Turn present blobs lazy whose objects are gone; return how many. A blob that is recorded anew stays."""
    count = 0
    for digest in digests:
        (blob,) = await refs.blobs([digest])
        if blob is not None and await _is_gone(objects, blob, pace):
            await asyncio.sleep(_SURE_S)
            if await _is_gone(objects, blob, pace):
                count += await refs.mark_absent(blob, f"object {blob.key} is gone")
    return count


async def _is_gone(objects: ContentStore, blob: BlobRecord, pace: Pace) -> bool:
    is_gone = await asyncio.to_thread(objects.head, blob.key) is None
    await asyncio.sleep(pace.wait_s(1, asyncio.get_running_loop().time()))
    return is_gone
