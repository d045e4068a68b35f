"""Push: an image to a repository, by mount or not at all where that will do. BuildKit's ``util/push``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from cluster import tracing
from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.errors import (
    BlobDamagedError,
    BlobNotFoundError,
    ClusterError,
    OtherDigestError,
    RegistryError,
    UnavailableError,
    first_error,
)
from cluster.faultpoints import FaultPoint, ahit
from cluster.fetch.access import AccessControl
from cluster.fetch.extract import LocalBlob
from cluster.fetch.runner import Caller, Unlazier
from cluster.messages import LayerPush, PushResult
from cluster.ports import Authorizer, ByteStream, ProgressStore, RefStore
from cluster.progress import LayerPhase, ProgressItem
from cluster.provider import ProviderHandle
from cluster.ref import BlobRecord, ImageRecord
from cluster.reference import ImageReference

#: Layers from this size on are forwarded while they arrive: smaller ones are here before there is a piece to send.
_FORWARD_FROM_BYTES = 16 * 1024**2


class PushTarget(Protocol):
    """The registry client's pushing half."""

    async def blob_exists(self, handle: ProviderHandle, digest: Digest, authorizer: Authorizer) -> int | None:
        """HEAD a blob."""
        ...

    async def mount_blob(
        self, target: ProviderHandle, digest: Digest, from_repository: str, authorizer: Authorizer
    ) -> bool:
        """Mount a blob from another repository of the registry; False where it won't, for whatever reason."""
        ...

    async def upload_blob(
        self,
        target: ProviderHandle,
        descriptor: Descriptor,
        open_stream: Callable[[], AbstractContextManager[ByteStream]],
        authorizer: Authorizer,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Upload a blob in bounded memory."""
        ...

    async def forward_blob(
        self,
        target: ProviderHandle,
        descriptor: Descriptor,
        open_stream: Callable[[], AbstractContextManager[ByteStream]],
        authorizer: Authorizer,
        on_progress: Callable[[int], None] | None = None,
        *,
        verified: Callable[[], Awaitable[None]],
    ) -> None:
        """Upload a blob in pieces while it arrives; it is there only once *verified* has returned. One try."""
        ...

    async def push_manifest(
        self, target: ProviderHandle, reference: str, media_type: str, data: bytes, authorizer: Authorizer
    ) -> Digest:
        """Put a manifest under a tag or digest."""
        ...


class StoredBlobs(Protocol):
    """Reads blobs that are present."""

    def stream(self, blob: BlobRecord) -> AbstractContextManager[ByteStream]:
        """Open a blob in the content store; raises BlobDamagedError in place of its end if its bytes are others."""
        ...

    async def read(self, blob: BlobRecord) -> bytes:
        """Return a small blob whole."""
        ...


class ArrivingBlob(LocalBlob, Protocol):
    """A blob whose bytes arrive on this node."""

    @property
    def origins(self) -> frozenset[str]:
        """Return ``registry/repository`` of each place that some of its bytes may be from; "" for one not known."""
        ...


class ArrivingBlobs(Protocol):
    """What arrives on this node."""

    async def follow(self, digest: Digest) -> ArrivingBlob:
        """Wait until the blob's bytes arrive here; for ever where nobody brings them."""
        ...


class Pusher:
    """Pushes images whose manifests and configs are in the content store."""

    def __init__(
        self,
        *,
        target: PushTarget,
        unlazier: Unlazier,
        refs: RefStore,
        blobs: StoredBlobs,
        arriving: ArrivingBlobs,
        progress: ProgressStore,
        access: AccessControl,
        spawn: Callable[[Awaitable[None]], object],
    ) -> None:
        self._target = target
        self._unlazier = unlazier
        self._refs = refs
        self._blobs = blobs
        self._arriving = arriving
        self._progress = progress
        self._access = access
        self._spawn = spawn

    async def push(
        self,
        image: ImageRecord,
        reference: ImageReference,
        caller: Caller,
        providers: Mapping[Digest, Sequence[ProviderHandle]],
        *,
        plain_http: bool,
    ) -> PushResult:
        """Push *image* as *reference*: layers first, all at once, then config and manifest.

        Each layer: is there (HEAD), or mounted from a repository of the same registry that has it, or,
        only now, unlazied and uploaded. Non-distributable layers are left where they are.

        Raises:
            OtherDigestError: *reference* has a digest that is not the image's; nothing was moved.
            RegistryError: the target says no. UnavailableError: it says nothing.
            NeedsRemoteProvidersError: a layer must be uploaded and can't be had.
        """
        if reference.digest not in (None, image.manifest.digest):
            raise OtherDigestError(reference.name, image.manifest.digest)
        target = reference.handle(plain_http=plain_http)
        unique = list({layer.digest: layer for layer in image.layers}.values())
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self.place_layer(layer, target, caller, providers.get(layer.digest, ())))
                    for layer in unique
                ]
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        pushed = [task.result() for task in tasks]
        manifest = await self._read(image.manifest.digest)
        await self._config(image.config, target, caller)
        digest = await self.finish(
            image.manifest, manifest, target, reference.selector, caller, placed=(*unique, image.config)
        )
        return PushResult(target=reference.name, digest=digest, layers=tuple(pushed))

    async def place_layer(
        self, layer: Descriptor, target: ProviderHandle, caller: Caller, providers: Sequence[ProviderHandle]
    ) -> LayerPush:
        """Bring one layer to *target* as :meth:`push` does, and tell of its end; raises likewise."""
        try:
            with tracing.span("push layer", {tracing.BLOB: layer.digest, "lazyfarm.target": target.source}) as span:
                done = await self._place(layer, target, caller, providers)
                span.put({"lazyfarm.how": done.how, "lazyfarm.pushed_bytes": done.bytes})
        except asyncio.CancelledError:
            self._spawn(self._tell(caller, layer, LayerPhase.CANCELLED, ""))
            raise
        except ClusterError as exc:
            await self._tell(caller, layer, LayerPhase.FAILED, str(exc))
            raise
        await self._tell(caller, layer, LayerPhase.DONE, done.how)
        return done

    async def finish(
        self,
        manifest: Descriptor,
        data: bytes,
        target: ProviderHandle,
        selector: str,
        caller: Caller,
        *,
        placed: Sequence[Descriptor],
    ) -> Digest:
        """Put a manifest under a tag or digest, and record *target* as a source of it and of all that was *placed*."""
        await ahit(FaultPoint.PUSH_MANIFEST_BEFORE)
        digest = await self._target.push_manifest(target, selector, manifest.media_type, data, caller.authorizer)
        there = [descriptor.digest for descriptor in (*placed, manifest) if not descriptor.is_foreign]
        await asyncio.gather(*(self._refs.add_providers(one, [target]) for one in there))
        await self._access.record(caller.authorizer, target, there)
        return digest

    async def _place(
        self, layer: Descriptor, target: ProviderHandle, caller: Caller, providers: Sequence[ProviderHandle]
    ) -> LayerPush:
        if layer.is_foreign:
            return LayerPush(digest=layer.digest, how="foreign", bytes=0)
        if await self._target.blob_exists(target, layer.digest, caller.authorizer) is not None:
            return LayerPush(digest=layer.digest, how="exists", bytes=0)
        await ahit(FaultPoint.PUSH_MOUNT_BEFORE)
        for source in providers:
            is_mountable = source.kind == "registry" and source.registry == target.registry and source != target
            # A repository that this token can't read must not fail the push (BuildKit #2530, #3509).
            if is_mountable and await self._mounted(target, layer.digest, source.repository, caller):
                return LayerPush(digest=layer.digest, how="mounted", bytes=0)
        (present,) = await self._refs.blobs([layer.digest])
        if present is None and layer.size_bytes >= _FORWARD_FROM_BYTES:
            if await self._unlazy_and_forward(layer, target, caller):
                return LayerPush(digest=layer.digest, how="uploaded", bytes=layer.size_bytes)
        else:
            await self._unlazier.unlazy(layer, caller)
        await ahit(FaultPoint.PUSH_UPLOAD_BEFORE)
        if not await self._upload(layer, target, caller):
            # Its object had gone behind our back: it is lazy again, and comes from its provider.
            await self._unlazier.unlazy(layer, caller)
            if not await self._upload(layer, target, caller):
                raise BlobDamagedError(layer.digest, "it was lost twice while it was being pushed")
        return LayerPush(digest=layer.digest, how="uploaded", bytes=layer.size_bytes)

    async def _unlazy_and_forward(self, layer: Descriptor, target: ProviderHandle, caller: Caller) -> bool:
        """Make a layer present, sending its bytes on as they arrive; False where that came to nothing.

        Then it can be uploaded from the content store. The flight never waits for the target: what arrives lies on
        this node's disk until it is sent.

        Raises:
            ClusterError: as :meth:`Unlazier.unlazy`.
        """
        began = asyncio.Event()
        forwarding = asyncio.create_task(self._forward(layer, target, caller, began))
        try:
            await self._unlazier.unlazy(layer, caller)
            # Not begun: it came by way of another node, or was here too soon.
            return began.is_set() and await forwarding
        finally:
            forwarding.cancel()
            await asyncio.wait({forwarding})

    async def _forward(self, layer: Descriptor, target: ProviderHandle, caller: Caller, began: asyncio.Event) -> bool:
        """Send a layer on that arrives; tell whether the target has it."""
        try:
            arriving = await self._arriving.follow(layer.digest)
            # Another's flight may bring it, from where this caller must not read: asked before a byte is handed on.
            for origin in sorted(arriving.origins):
                await self._unlazier.admit(layer, caller, origin)
            await ahit(FaultPoint.PUSH_UPLOAD_BEFORE)
            began.set()
            with self._moving(layer, caller) as moved:
                await self._target.forward_blob(
                    target, layer, lambda: _opened(arriving), caller.authorizer, moved, verified=arriving.verified
                )
        except ClusterError:
            return False  # whatever it was, what can be done about it is done by the upload that follows
        return True

    async def _mounted(self, target: ProviderHandle, digest: Digest, repository: str, caller: Caller) -> bool:
        try:
            return await self._target.mount_blob(target, digest, repository, caller.authorizer)
        except (RegistryError, UnavailableError):
            return False

    async def _config(self, config: Descriptor, target: ProviderHandle, caller: Caller) -> None:
        if await self._target.blob_exists(target, config.digest, caller.authorizer) is not None:
            return
        if not await self._upload(config, target, caller):
            raise BlobDamagedError(config.digest, "the image's config is not in the content store")
        await self._tell(caller, config, LayerPhase.DONE, "uploaded")

    async def _upload(self, descriptor: Descriptor, target: ProviderHandle, caller: Caller) -> bool:
        """Upload a blob from the content store; False where it isn't there (any more), or damaged."""
        (blob,) = await self._refs.blobs([descriptor.digest])
        if blob is None:
            return False
        try:
            with self._moving(descriptor, caller) as moved:
                await self._target.upload_blob(
                    target, descriptor, lambda: self._blobs.stream(blob), caller.authorizer, moved
                )
        except (BlobNotFoundError, BlobDamagedError) as exc:
            await self._refs.mark_absent(blob, str(exc))
            return False
        return True

    @contextlib.contextmanager
    def _moving(self, descriptor: Descriptor, caller: Caller) -> Iterator[Callable[[int], None]]:
        """Lend what tells of an upload's progress."""
        is_over = False

        async def tell_moved(done: int) -> None:
            if not is_over:  # an item that has ended must not move again
                await self._tell(caller, descriptor, LayerPhase.FETCHING, "uploading", done)

        def moved(done: int) -> None:
            self._spawn(tell_moved(done))

        try:
            yield moved
        finally:
            is_over = True

    async def _read(self, digest: Digest) -> bytes:
        (blob,) = await self._refs.blobs([digest])
        if blob is None:
            raise BlobDamagedError(digest, "the image's manifest is not in the content store")
        try:
            return await self._blobs.read(blob)
        except BlobDamagedError as exc:
            await self._refs.mark_absent(blob, exc.reason)
            raise

    async def _tell(
        self, caller: Caller, layer: Descriptor, phase: LayerPhase, detail: str, current_bytes: int | None = None
    ) -> None:
        if streams := caller.streams(layer.digest):
            item = ProgressItem(
                item=f"push:{layer.digest}",
                phase=phase,
                current_bytes=layer.size_bytes if current_bytes is None else current_bytes,
                total_bytes=layer.size_bytes,
                detail=detail,
            )
            await self._progress.publish(streams, item)


@contextlib.contextmanager
def _opened(blob: LocalBlob) -> Iterator[ByteStream]:
    stream = blob.open()
    try:
        yield stream
    finally:
        close = getattr(stream, "close", None)
        if close is not None:
            close()
