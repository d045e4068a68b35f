"""Assemble: an image's manifest and config, of a chain of layers and what a build says of it. Pure.

Follows the OCI image-spec v1.1 (``manifest.md``, ``config.md``); how history and layers are reconciled, and times
filled in, BuildKit's ``exporter/containerimage/writer.go``. Equal arguments give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from cluster.descriptor import ANNOTATION_DIFF_ID, CONFIG_OCI, MANIFEST_OCI, Descriptor
from cluster.digest import digest_of
from cluster.errors import InvalidArgumentError, MalformedManifestError
from cluster.image import MAX_MANIFEST_BYTES
from cluster.ref import RefState
from cluster.reference import Platform

_OCI_LAYER = "application/vnd.oci.image.layer"
#: Docker's layer media types by the OCI ones for the same bytes: one manifest has one kind.
_AS_OCI = {
    "application/vnd.docker.image.rootfs.diff.tar": f"{_OCI_LAYER}.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": f"{_OCI_LAYER}.v1.tar+gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": f"{_OCI_LAYER}.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar": f"{_OCI_LAYER}.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": f"{_OCI_LAYER}.nondistributable.v1.tar+gzip",
}
#: Annotations of layers that are notes of a builder's to itself.
_INTERNAL_ANNOTATIONS = (ANNOTATION_DIFF_ID, "containerd.io/distribution.source.", "buildkit/")
#: Says in a history entry who wrote it, where nobody else did.
_COMMENT = "lazyfarm"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class AssembledImage:
    """An image's two documents, and what they describe."""

    manifest: Descriptor
    manifest_bytes: bytes
    config: Descriptor
    config_bytes: bytes
    platform: Platform
    #: Lowest first, of OCI media types, each with its diff ID.
    layers: tuple[Descriptor, ...]


def assemble_image(
    name: str, chain: Sequence[RefState], config: bytes, *, created_s: int | None, platform: Platform
) -> AssembledImage:
    """Make manifest and config of *chain*.

    Args:
        name: What is being made; for messages.
        chain: Its layers, lowest first; none is legal.
        config: Image config (JSON) as a build left it: its rootfs is replaced, its history made to fit the layers,
            missing times are filled in. Empty: the least that is valid.
        created_s: Seconds since 1970 for the missing times, and no time is later; None: when the top layer was
            recorded, which a rebuild that is cached doesn't change, and times stay as they are.
        platform: For a config that names none.

    Raises:
        MalformedManifestError: *config* is no image config, or what came of it is larger than registries take.
        InvalidArgumentError: *created_s* is no time.
    """
    what = f"config of {name}"
    document = _object(config, what) if config else {"config": {}}
    layers = tuple(_as_oci(state.record.blob) for state in chain)
    time = _text(_time_of(created_s, chain))
    latest = time if created_s is not None else None
    if not _words(document, "os", "architecture"):
        document |= {"os": platform.os, "architecture": platform.architecture}
        document.pop("variant", None)
        if platform.variant:
            document["variant"] = platform.variant
    document["rootfs"] = {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}
    document["created"] = _filled(document.get("created"), time, latest)
    document["history"] = [
        {**entry, "created": _filled(entry.get("created"), time, latest)}
        for entry in _reconciled(_history(document, what), chain)
    ]
    config_bytes = _encode(document, what)
    described = Descriptor(media_type=CONFIG_OCI, digest=digest_of(config_bytes), size_bytes=len(config_bytes))
    manifest_bytes = _encode(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_OCI,
            "config": _described(described),
            "layers": [_described(layer) for layer in layers],
        },
        name,
    )
    return AssembledImage(
        manifest=Descriptor(media_type=MANIFEST_OCI, digest=digest_of(manifest_bytes), size_bytes=len(manifest_bytes)),
        manifest_bytes=manifest_bytes,
        config=described,
        config_bytes=config_bytes,
        platform=Platform.of(
            document["os"], document["architecture"], document["variant"] if _words(document, "variant") else ""
        ),
        layers=layers,
    )


# -- layers ------------------------------------------------------------------------------------------------


def _as_oci(layer: Descriptor) -> Descriptor:
    return replace(
        layer,
        media_type=_AS_OCI.get(layer.media_type, layer.media_type),
        annotations={
            key: value for key, value in layer.annotations.items() if not key.startswith(_INTERNAL_ANNOTATIONS)
        },
    )


def _described(blob: Descriptor) -> dict[str, Any]:
    described: dict[str, Any] = {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size_bytes}
    if blob.urls:
        described["urls"] = list(blob.urls)
    if blob.annotations:
        described["annotations"] = blob.annotations
    return described


# -- history -------------------------------------------------------------------------------------------------


def _history(document: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    history = document.get("history") or []
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise MalformedManifestError(what, "its history is not a list of objects")
    return [dict(entry) for entry in history]


def _reconciled(history: Sequence[dict[str, Any]], chain: Sequence[RefState]) -> list[dict[str, Any]]:
    """Return the history with one entry for each layer, the lowest layer's first, among those without one.

    A step that changed nothing has left no layer: entries too many are the last ones, as nobody knows which.
    """
    told = 0
    entries: list[dict[str, Any]] = []
    for entry in history:
        has_layer = not entry.get("empty_layer") and told < len(chain)
        told += has_layer
        entries.append(entry if has_layer else {**entry, "empty_layer": True})
    for state in chain[told:]:
        said = {"created_by": state.record.description} if state.record.description else {}
        entries.append({**said, "comment": _COMMENT})
    return entries


# -- times ---------------------------------------------------------------------------------------------------


def _time_of(created_s: int | None, chain: Sequence[RefState]) -> datetime:
    if created_s is None:
        created_s = int(chain[-1].record.created_wall_s) if chain else 0
    try:
        return _EPOCH + timedelta(seconds=created_s)
    except OverflowError as exc:
        raise InvalidArgumentError("created_s", str(created_s), "it is no time of a year from 1 to 9999") from exc


def _text(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


def _filled(said: object, time: str, latest: str | None) -> str:
    """Return what a document says, or *time* where that is no time, or later than *latest*."""
    try:
        known = datetime.fromisoformat(said) if isinstance(said, str) else None
    except ValueError:
        known = None
    if not isinstance(said, str) or known is None or known.tzinfo is None:
        return time
    return said if latest is None or known <= datetime.fromisoformat(latest) else latest


# -- JSON ----------------------------------------------------------------------------------------------------


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        document = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as exc:
        raise MalformedManifestError(what, "it is not JSON") from exc
    if not isinstance(document, dict):
        raise MalformedManifestError(what, "it is not a JSON object")
    return document


def _refuse(constant: str) -> NoReturn:
    """Refuse what only Python takes for JSON: others couldn't read what is made of it."""
    raise ValueError(constant)


def _words(document: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(document.get(key), str) and document[key] for key in keys)


def _encode(document: Mapping[str, Any], what: str) -> bytes:
    data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    if len(data) > MAX_MANIFEST_BYTES:
        raise MalformedManifestError(what, f"it is larger than {MAX_MANIFEST_BYTES} bytes")
    return data
