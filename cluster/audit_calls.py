"""What the audit stream should know of calls of a fetch worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from cluster.audit import AuditEntry, Operation, handle_of
from cluster.digest import Digest
from cluster.messages import LayerPush, PullRequest, ResolveRequest, SessionInfo
from cluster.ref import ImageRecord
from cluster.reference import ImageReference


def call_entry(operation: str, session: SessionInfo, *, ref: str = "", image: str = "", **_rest: str) -> AuditEntry:
    """Return the entry of a call of a session, as far as every call has it."""
    return AuditEntry(operation=operation, who=session.tenant, job=session.job, ref=ref, image=image)


def read_entry(
    operation: Operation,
    request: PullRequest | ResolveRequest,
    reference: ImageReference,
    image: ImageRecord,
    identity: str,
) -> AuditEntry:
    """Return the entry of an image whose manifest was read, by somebody who has that *identity* at its registry."""
    return replace(
        call_entry(operation, request.session, ref=image.ref or "", image=reference.name),
        credential=handle_of(identity),
        digest=image.manifest.digest,
        source=reference.handle(plain_http=request.plain_http).source,
        size_bytes=sum(layer.size_bytes for layer in image.layers),
    )


def push_entries(entry: AuditEntry, layers: Sequence[LayerPush], sizes: Mapping[Digest, int]) -> Iterator[AuditEntry]:
    """Yield the entry of each layer of a push, which *entry* is of; *sizes* are the layers' bytes, where known."""
    for layer in layers:
        yield replace(
            entry,
            operation=Operation.PUSH_LAYER,
            outcome=layer.how,
            digest=layer.digest,
            size_bytes=sizes.get(layer.digest, 0),
            moved_bytes=layer.bytes,
        )
