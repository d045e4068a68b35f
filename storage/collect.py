"""The end of refs, images and blobs in Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

from cluster.audit import AuditEntry, Operation, deletion
from cluster.collect.ports import Doomed, Locals, LocalTree, Outcome, Removal
from cluster.collect.rounds import Round
from cluster.collect.sweep import Suspect
from cluster.digest import Digest
from cluster.graph import LocalOp, decode_definition
from cluster.job import JobId
from cluster.ref import BlobRecord, ImageRecord, RefId, RefRecord, RefUsage
from storage.audit import RedisAudit, noted
from storage.codec import Codec
from storage.keys import Keys
from storage.link import RedisLink
from storage.protocol import Argument
from storage.refs import BLOB, IMAGE
from storage.turns import turn

#: Seconds that a deletion waits for the replicas; where they don't have it all by then it is for another time.
_REPLICATED_S = 5.0
#: Keys looked at by one SCAN, and records by one call.
_BATCH = 500
#: Seconds for which it is remembered where a round stopped: longer than any round's interval.
_ROUND_KEPT_S = 400 * 24 * 3600

_ROUND: Codec[Round] = Codec("round", Round)


class RedisCollectStore:
    """Implements :class:`cluster.collect.ports.CollectStore`."""

    def __init__(self, link: RedisLink, keys: Keys, audit: RedisAudit | None = None) -> None:
        self._link = link
        self._keys = keys
        self._prefix = keys.prefix
        self._audit = audit

    async def now_wall_s(self) -> float:
        """Return Redis's time."""
        seconds, microseconds = await self._link.execute("TIME", may_repeat=True)
        return int(seconds) + int(microseconds) / 1e6

    async def usages(self) -> Mapping[RefId, RefUsage]:
        """Return when and how often each ref was used."""
        commands = [("ZRANGE", self._keys.refs_used, 0, -1, "WITHSCORES"), ("HGETALL", self._keys.refs_count)]
        used, counted = await self._link.execute_many(commands, may_repeat=True)
        counts = dict(zip(counted[::2], counted[1::2], strict=True))
        return {
            RefId(ref_id.decode()): RefUsage(last_used_wall_s=int(at) / 1000, usage_count=int(counts.get(ref_id, 0)))
            for ref_id, at in zip(used[::2], used[1::2], strict=True)
        }

    async def resolved(self) -> list[ImageRecord]:
        """Return every image by the digest of its manifest."""
        found = await self._link.execute("HVALS", self._keys.images_by_digest, may_repeat=True)
        return [IMAGE.decode(value) for value in found]

    async def blobs(self) -> list[BlobRecord]:
        """Return every blob that is present."""
        found: dict[Digest, BlobRecord] = {}
        async for keys in self._scan("blob:*"):
            values = await self._link.execute("MGET", *keys, may_repeat=True)
            records = [BLOB.decode(value) for value in values if value is not None]
            found.update({record.digest: record for record in records})
        return list(found.values())

    async def _scan(self, pattern: str) -> AsyncIterator[list[bytes]]:
        cursor = b"0"
        while True:
            # The hash tag's braces are no pattern of Redis's.
            command = ("SCAN", cursor, "MATCH", f"{self._prefix}:{pattern}", "COUNT", _BATCH)
            cursor, keys = await self._link.execute(*command, may_repeat=True)
            if keys:
                yield keys
            if int(cursor) == 0:
                return

    async def locals(self) -> Locals:
        """Return drivers' directories."""
        commands = [("ZRANGE", self._keys.local_used, 0, -1, "WITHSCORES"), ("HGETALL", self._keys.local_objects)]
        used, sizes = await self._link.execute_many(commands, may_repeat=True)
        if not used and not sizes:
            return Locals()
        digests = [Digest(digest.decode()) for digest in used[::2]]
        stands = [
            keys
            for start in range(0, len(digests), _BATCH)
            for keys in await self._link.execute_many(
                [("SMEMBERS", self._keys.local_stands(digest)) for digest in digests[start : start + _BATCH]],
                may_repeat=True,
            )
        ]
        in_jobs = await self._trees_in_jobs()
        return Locals(
            trees=tuple(
                LocalTree(
                    digest=digest,
                    last_used_wall_s=int(at) / 1000,
                    objects=frozenset(key.decode() for key in keys),
                    is_in_job=digest in in_jobs,
                )
                for digest, at, keys in zip(digests, used[1::2], stands, strict=True)
            ),
            objects={key.decode(): int(size) for key, size in zip(sizes[::2], sizes[1::2], strict=True)},
        )

    async def _trees_in_jobs(self) -> set[Digest]:
        found: set[Digest] = set()
        for job in await self._link.execute("ZRANGE", self._keys.jobs_held, 0, -1, may_repeat=True):
            key = self._keys.job(JobId(job.decode()))
            payload = await self._link.execute("HGET", key, "definition", may_repeat=True)
            if payload is not None:
                vertices = decode_definition(payload).vertices.values()
                found |= {vertex.op.tree for vertex in vertices if isinstance(vertex.op, LocalOp)}
        return found

    async def remove_tree(self, tree: LocalTree, *, grace_s: float) -> Removal:
        """Remove a driver's directory."""
        used_ms = _ms(tree.last_used_wall_s)
        reply = await self._link.run("local_remove", self._prefix, tree.digest, used_ms, _ms(grace_s), may_repeat=True)
        removal = _removal(reply)
        if removal.outcome is Outcome.REMOVED:
            self._note(AuditEntry(operation=Operation.PRUNE, digest=tree.digest, size_bytes=removal.freed_bytes))
        return removal

    def _note(self, *entries: AuditEntry) -> None:
        if self._audit is not None:
            self._audit.note(*entries)

    async def remove_local_object(self, key: str, *, grace_s: float) -> Removal:
        """Remove an object of drivers' files."""
        return _removal(await self._link.run("local_remove", self._prefix, "", 0, _ms(grace_s), key, may_repeat=True))

    async def tidy_locals(self) -> None:
        """Forget contents of drivers' files whose objects are gone."""
        cursor = b"0"
        while True:
            cursor = await self._link.run("local_tidy", self._prefix, cursor, _BATCH, may_repeat=True)
            if cursor == b"0":
                return

    async def index(self, records: Sequence[RefRecord]) -> None:
        """Note which refs stand on which, and use which blobs."""
        batches = (records[start : start + _BATCH] for start in range(0, len(records), _BATCH))
        for batch in batches:
            told = [part for record in batch for part in (record.id, record.parent or "", record.blob.digest)]
            await self._link.run("refs_index", self._prefix, *told, may_repeat=True)

    async def remove_ref(self, ref_id: RefId, images: Sequence[ImageRecord], *, grace_s: float) -> Removal:
        """Remove a ref, unless it is held or stood on."""
        names = {image.name for image in images}
        manifests = {image.manifest.digest for image in images}
        entry = AuditEntry(operation=Operation.PRUNE, ref=ref_id, image=min(names, default=""))
        noting = noted(self._audit, entry)
        arguments: list[Argument] = [ref_id, _ms(grace_s), *noting, len(names), *sorted(names), *sorted(manifests)]
        return _removal(await self._link.run("ref_remove", self._prefix, *arguments, may_repeat=True))

    async def remove_image(self, images: Sequence[ImageRecord], *, grace_s: float) -> Removal:
        """Remove an image that has no ref, under all its names."""
        names = sorted({image.name for image in images})
        manifest = images[0].manifest.digest
        entry = AuditEntry(operation=Operation.PRUNE, digest=manifest, image=min(names))
        arguments: list[Argument] = [manifest, _ms(grace_s), *noted(self._audit, entry), *names]
        return _removal(await self._link.run("image_remove", self._prefix, *arguments, may_repeat=True))

    async def condemn(self, digests: Sequence[Digest], *, grace_s: float) -> list[int | None]:
        """Turn blobs absent that nothing needs."""
        freed: list[int | None] = []
        for start in range(0, len(digests), _BATCH):
            batch = digests[start : start + _BATCH]
            found = await self._link.run("blobs_condemn", self._prefix, _ms(grace_s), *batch, may_repeat=True)
            freed += [None if size < 0 else size for size in found]
            self._note(
                *(
                    AuditEntry(operation=Operation.PRUNE, digest=digest, size_bytes=size)
                    for digest, size in zip(batch, found, strict=True)
                    if size >= 0
                )
            )
        return freed

    async def due(self, most: int) -> list[Doomed]:
        """Return objects that may be deleted now."""
        since = self._link.drops
        found = await self._link.run("objects_due", self._prefix, most, may_repeat=True)
        if not found or not await self._link.replicated(_REPLICATED_S, since=since):
            return []
        split = (text.decode().split(" ", 1) for text in found)
        return [Doomed(Digest(digest), key) for digest, key in split]

    async def deleted(self, doomed: Sequence[Doomed]) -> None:
        """Forget objects that are deleted."""
        if doomed:
            members = [f"{one.digest} {one.key}" for one in doomed]
            self._note(*map(deletion, doomed))
            await self._link.execute("ZREM", self._keys.deleting, *members, may_repeat=True)

    async def strays(self, suspects: Sequence[Suspect], *, stray_s: float) -> list[Suspect]:
        """Return those that nothing has named for long."""
        told = [part for one in suspects for part in (one.digest, one.key, one.upload_id)]
        places = await self._link.run("strays_note", self._prefix, _ms(stray_s), *told, may_repeat=True)
        return [suspects[place - 1] for place in places]

    async def put_off(self, doomed: Sequence[Doomed], *, by_s: float) -> None:
        """Have objects come again later."""
        if doomed:
            due_ms = round((await self.now_wall_s() + by_s) * 1000)
            told = [part for one in doomed for part in (due_ms, f"{one.digest} {one.key}")]
            await self._link.execute("ZADD", self._keys.deleting, "XX", *told, may_repeat=True)

    async def doomed(self) -> int:
        """Return how many objects are to be deleted."""
        count: int = await self._link.execute("ZCARD", self._keys.deleting, may_repeat=True)
        return count

    async def round(self, work: str) -> Round | None:
        """Return how far the last round of *work* has come."""
        value = await self._link.execute("GET", self._keys.round(work), may_repeat=True)
        return None if value is None else _ROUND.decode(value)

    async def keep_round(self, work: str, round_: Round) -> None:
        """Remember how far a round has come."""
        command = ("SET", self._keys.round(work), _ROUND.encode(round_), "EX", _ROUND_KEPT_S)
        await self._link.execute(*command, may_repeat=True)

    def turn(self, work: str) -> AbstractAsyncContextManager[bool]:
        """Take the turn for *work*."""
        return turn(self._link, self._keys, work)


def _removal(reply: list[bytes | int]) -> Removal:
    match reply:
        case [b"removed", int(freed)]:
            return Removal(Outcome.REMOVED, freed)
        case [bytes(outcome)]:
            return Removal(Outcome(outcome.decode()))
        case _:
            raise AssertionError(reply)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
