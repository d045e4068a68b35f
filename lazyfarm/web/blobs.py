"""The content store's blobs as the page lists them: each once, whatever stands on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.collect.stock import Stock, Usage
from cluster.digest import Digest
from cluster.provider import ProviderHandle
from cluster.ref import BlobRecord, RefId


@dataclass(slots=True, kw_only=True)
class BlobUse:
    """One blob, and what it is for."""

    digest: Digest
    size_bytes: int
    #: ``layer``, ``manifest``, ``config``; ``none``: nothing that is known has it.
    kind: str
    #: Where it is in the content store; None: it is lazy.
    present: BlobRecord | None
    media_type: str = ""
    #: The refs that have it as their layer.
    refs: list[RefId] = field(default_factory=list)
    #: The images that it is a part of.
    images: dict[str, None] = field(default_factory=dict)
    #: Who could give it.
    providers: tuple[ProviderHandle, ...] = ()
    #: A live lease holds what has it.
    is_in_use: bool = False

    @property
    def state(self) -> str:
        """Return ``present`` or ``lazy``."""
        return "lazy" if self.present is None else "present"

    @property
    def source(self) -> str:
        """Return where it came from, or would come from; "" where that is unknown."""
        if self.present is not None:
            return self.present.source
        return self.providers[0].source if self.providers else ""


def blobs_of(stock: Stock, usage: Usage) -> dict[Digest, BlobUse]:
    """Return every blob that is present, or that a ref has: the biggest first."""
    present = {blob.digest: blob for blob in stock.blobs}
    found: dict[Digest, BlobUse] = {}
    images = _images_by_ref(stock)
    for use in usage.refs:
        state = stock.states[use.id]
        blob = found.get(use.digest)
        if blob is None:
            blob = found[use.digest] = BlobUse(
                digest=use.digest,
                size_bytes=state.record.blob.size_bytes,
                kind="layer",
                present=state.present,
                media_type=state.record.blob.media_type,
                providers=state.providers,
            )
        blob.refs.append(use.id)
        blob.images |= images.get(use.id, {})
        blob.is_in_use |= use.is_in_use
    _add_documents(found, stock, usage, present)
    for digest, record in present.items():
        if digest not in found:
            found[digest] = BlobUse(digest=digest, size_bytes=record.size_bytes, kind="none", present=record)
    return dict(sorted(found.items(), key=lambda item: (-item[1].size_bytes, item[0])))


def _images_by_ref(stock: Stock) -> dict[RefId, dict[str, None]]:
    """Return the names of the images that each ref is a part of."""
    found: dict[RefId, dict[str, None]] = {}
    for image in stock.images:
        at = image.ref
        while at is not None and (state := stock.states.get(at)) is not None:
            found.setdefault(at, {})[image.name] = None
            at = state.record.parent
    return found


def _add_documents(
    found: dict[Digest, BlobUse], stock: Stock, usage: Usage, present: Mapping[Digest, BlobRecord]
) -> None:
    """Add the images' manifests and configs: these are there, or nothing is known of them."""
    held = {image.name for image in usage.images if image.is_in_use}
    for image in (*stock.images, *stock.resolved):
        for kind, document in (("manifest", image.manifest), ("config", image.config)):
            if document.digest not in present:
                continue
            blob = found.setdefault(
                document.digest,
                BlobUse(
                    digest=document.digest,
                    size_bytes=document.size_bytes,
                    kind=kind,
                    present=present[document.digest],
                    media_type=document.media_type,
                ),
            )
            blob.images[image.name] = None
            blob.is_in_use |= image.name in held
