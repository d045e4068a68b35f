"""Verified fake of :class:`storage.collect.RedisCollectStore`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from cluster.audit import AuditEntry, Operation, deletion
from cluster.collect.ports import Doomed, Locals, LocalTree, Outcome, Removal
from cluster.collect.rounds import Round
from cluster.collect.sweep import NAMELESS, Suspect
from cluster.config import AuditConfig
from cluster.digest import Digest
from cluster.lease import LeaseId, blob_resource, image_resource, object_resource, ref_resource
from cluster.ref import BlobRecord, ImageRecord, RefId, RefRecord, RefUsage
from storage.memory import Memory


class MemoryCollectStore:
    """Fake over a :class:`storage.memory.Memory`, which needs no index: it looks at every record.

    What decides that something stays is in small methods of its own, so that tests can break one at a time.
    """

    def __init__(self, memory: Memory, audit: AuditConfig | None = None) -> None:
        self._memory = memory
        self._audited = audit.most_entries if audit else 0

    async def now_wall_s(self) -> float:
        """Return the memory's time."""
        return self._memory.now_s()

    async def usages(self) -> Mapping[RefId, RefUsage]:
        """Return when and how often each ref was used."""
        return dict(self._memory.usages)

    async def resolved(self) -> list[ImageRecord]:
        """Return every image by the digest of its manifest."""
        return list(self._memory.images_by_digest.values())

    async def blobs(self) -> list[BlobRecord]:
        """Return every blob that is present."""
        return list(self._memory.blobs.values())

    async def locals(self) -> Locals:
        """Return nothing: drivers' directories are kept in Redis alone."""
        return Locals()

    async def remove_tree(self, tree: LocalTree, *, grace_s: float) -> Removal:  # noqa: ARG002 - as above
        """Find none."""
        return Removal(Outcome.MISSING)

    async def remove_local_object(self, key: str, *, grace_s: float) -> Removal:  # noqa: ARG002 - as above
        """Find none."""
        return Removal(Outcome.MISSING)

    async def tidy_locals(self) -> None:
        """Do nothing: there are none."""

    async def index(self, records: Sequence[RefRecord]) -> None:
        """Do nothing: there is no index."""

    async def remove_ref(self, ref_id: RefId, images: Sequence[ImageRecord], *, grace_s: float) -> Removal:
        """Remove a ref, unless it is held or stood on."""
        memory = self._memory
        record = memory.records.get(ref_id)
        if record is None:
            return Removal(Outcome.MISSING)
        names = {image.name for image in images if _top(memory.images.get(image.name)) == ref_id}
        if self._is_held(ref_resource(ref_id)) or any(self._is_held(image_resource(name)) for name in names):
            return Removal(Outcome.HELD)
        if self._is_stood_on(ref_id):
            return Removal(Outcome.STOOD_ON)
        del memory.records[ref_id]
        memory.usages.pop(ref_id, None)
        memory.images_by_ref.pop(ref_id, None)
        freed = self._condemn(record.blob.digest, grace_s) or 0
        if not self._is_used(record.blob.digest):
            memory.providers.pop(record.blob.digest, None)
        gone = [memory.images.pop(name) for name in names]
        manifests = {image.manifest.digest for image in images} | {image.manifest.digest for image in gone}
        known = [memory.images_by_digest.get(manifest) for manifest in manifests]
        documents = {i.manifest.digest: i for i in (*gone, *known) if i is not None and i.ref == ref_id}
        for manifest in documents:
            memory.images_by_digest.pop(manifest, None)
        self._note(AuditEntry(operation=Operation.PRUNE, ref=ref_id, image=min(names, default="")))
        return Removal(Outcome.REMOVED, freed + sum(self._release(i, grace_s) for i in documents.values()))

    async def remove_image(self, images: Sequence[ImageRecord], *, grace_s: float) -> Removal:
        """Remove an image that has no ref, under all its names."""
        memory = self._memory
        manifest = images[0].manifest.digest
        found = [memory.images.get(image.name) for image in images]
        named = [image for image in found if image is not None and image.manifest.digest == manifest]
        known = memory.images_by_digest.get(manifest)
        image = known or next(iter(named), None)
        if image is None:
            return Removal(Outcome.MISSING)
        if any(self._is_held(image_resource(one.name)) for one in named):
            return Removal(Outcome.HELD)
        if image.ref is not None and image.ref in memory.records:
            return Removal(Outcome.STOOD_ON)
        for one in named:
            memory.images.pop(one.name, None)
        memory.images_by_digest.pop(manifest, None)
        self._note(AuditEntry(operation=Operation.PRUNE, digest=manifest, image=min(i.name for i in images)))
        return Removal(Outcome.REMOVED, self._release(image, grace_s))

    def _note(self, entry: AuditEntry) -> None:
        self._memory.note(entry, most=self._audited)

    async def condemn(self, digests: Sequence[Digest], *, grace_s: float) -> list[int | None]:
        """Turn blobs absent that nothing needs."""
        freed = [self._condemn(digest, grace_s) for digest in digests]
        for digest, size in zip(digests, freed, strict=True):
            if size is not None:
                self._note(AuditEntry(operation=Operation.PRUNE, digest=digest, size_bytes=size))
        return freed

    async def due(self, most: int) -> list[Doomed]:
        """Return objects that may be deleted now."""
        memory = self._memory
        due = sorted((at_s, doomed) for doomed, at_s in memory.deleting.items() if at_s <= memory.now_s())
        for _, doomed in due:
            if (blob := memory.blobs.get(doomed.digest)) is not None and blob.key == doomed.key:
                del memory.deleting[doomed]
        return [doomed for _, doomed in due if doomed in memory.deleting][:most]

    async def deleted(self, doomed: Sequence[Doomed]) -> None:
        """Forget objects that are deleted."""
        for one in doomed:
            self._memory.deleting.pop(one, None)
            self._note(deletion(one))

    async def strays(self, suspects: Sequence[Suspect], *, stray_s: float) -> list[Suspect]:
        """Return those that nothing has named for long."""
        memory, now_s = self._memory, self._memory.now_s()
        over = []
        for one in suspects:
            doomed = Doomed(one.digest, one.key)
            if self._is_named(one):
                memory.strays.pop(one, None)
                continue
            if not one.upload_id and doomed in memory.deleting:
                continue
            if memory.strays.setdefault(one, now_s) + stray_s <= now_s:
                del memory.strays[one]
                if not one.upload_id:
                    memory.deleting[doomed] = now_s
                over.append(one)
        return over

    def _is_named(self, one: Suspect) -> bool:
        if one.digest == NAMELESS:
            return self._is_held(object_resource(one.key))
        memory, work = self._memory, f"blob:{one.digest}"
        flight, blob = memory.flights.get(work), memory.blobs.get(one.digest)
        upload, until_s = memory.uploads.get(work, (None, 0.0))
        return (
            (flight is not None and flight.expires_s > memory.now_s())
            or (
                upload is not None
                and until_s > memory.now_s()
                and upload.key == one.key
                and one.upload_id in ("", upload.upload_id)
            )
            or (not one.upload_id and blob is not None and blob.key == one.key)
        )

    async def put_off(self, doomed: Sequence[Doomed], *, by_s: float) -> None:
        """Have objects come again later."""
        for one in doomed:
            if one in self._memory.deleting:
                self._memory.deleting[one] = self._memory.now_s() + by_s

    async def doomed(self) -> int:
        """Return how many objects are to be deleted."""
        return len(self._memory.deleting)

    async def round(self, work: str) -> Round | None:
        """Return how far the last round of *work* has come."""
        return self._memory.rounds.get(work)

    async def keep_round(self, work: str, round_: Round) -> None:
        """Remember how far a round has come."""
        self._memory.rounds[work] = round_

    @asynccontextmanager
    async def turn(self, work: str) -> AsyncIterator[bool]:
        """Take the turn for *work*."""
        if work in self._memory.turns:
            yield False
            return
        self._memory.turns.add(work)
        try:
            yield True
        finally:
            self._memory.turns.discard(work)

    # -- what decides; tests break these one at a time ----------------------------------------------------

    def _is_held(self, resource: str) -> bool:
        memory = self._memory
        return any(resource in lease.resources and memory.is_live(lease.id) for lease in memory.leases.values())

    def _is_stood_on(self, ref_id: RefId) -> bool:
        return any(record.parent == ref_id for record in self._memory.records.values())

    def _is_used(self, digest: Digest) -> bool:
        return any(record.blob.digest == digest for record in self._memory.records.values())

    def _condemn(self, digest: Digest, grace_s: float) -> int | None:
        memory = self._memory
        blob = memory.blobs.get(digest)
        if blob is None or self._is_held(blob_resource(digest)) or self._is_used(digest):
            return None
        del memory.blobs[digest]
        memory.deleting[Doomed(digest, blob.key)] = memory.now_s() + grace_s
        return blob.size_bytes

    def _release(self, image: ImageRecord, grace_s: float) -> int:
        """Let go of an image's documents, unless another image has them; return the bytes that are freed by it."""
        manifest = image.manifest.digest
        if manifest in self._memory.images_by_digest:
            return 0
        self._memory.leases.pop(LeaseId(f"image:{manifest}"), None)
        return sum(self._condemn(digest, grace_s) or 0 for digest in (manifest, image.config.digest))


def _top(image: ImageRecord | None) -> RefId | None:
    return None if image is None else image.ref
