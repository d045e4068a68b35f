"""Manifests, indexes and image configs: what their bytes say. Pure parsing; who fetched them is no matter.

Follows the OCI image-spec v1.1 (``manifest.md``, ``image-index.md``, ``config.md``) and Docker's image
manifest V2 schema 2. Schema 1 is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.descriptor import (
    INDEX_DOCKER,
    INDEX_OCI,
    MANIFEST_DOCKER,
    MANIFEST_OCI,
    SCHEMA1,
    Descriptor,
)
from cluster.digest import Digest, digest_of, is_digest
from cluster.errors import (
    DigestMismatchError,
    InvalidDescriptorError,
    MalformedManifestError,
    PlatformNotFoundError,
    SizeMismatchError,
    UnsupportedManifestError,
)
from cluster.reference import ImageReference, Platform

#: Manifests, indexes and configs larger than this are refused (the distribution-spec's recommended limit).
MAX_MANIFEST_BYTES = 4 * 1024**2
#: Images of more layers are refused: a manifest has room for 20,000, each a record and a bomb of its own. Docker makes
#: none of more than 127, and Linux mounts none of more than 500 (``OVL_MAX_STACK``).
MAX_LAYERS = 1000
#: What a registry is asked for, in the ``Accept`` header.
ACCEPTED_MANIFESTS = (MANIFEST_OCI, INDEX_OCI, MANIFEST_DOCKER, INDEX_DOCKER)

_MANIFESTS = frozenset({MANIFEST_OCI, MANIFEST_DOCKER})
_INDEXES = frozenset({INDEX_OCI, INDEX_DOCKER})


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexEntry:
    """One manifest of an index."""

    manifest: Descriptor
    #: None where the index doesn't say.
    platform: Platform | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """An index: the same image for several platforms."""

    descriptor: Descriptor
    entries: tuple[IndexEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One platform's image: a config and layers, lowest first, whose diff IDs only the config knows."""

    descriptor: Descriptor
    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What of an image's config the cache needs."""

    #: None where the config doesn't say.
    platform: Platform | None
    #: Lowest first.
    diff_ids: tuple[Digest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedImage:
    """An image whose manifest and config were read and whose layers are known, none of them fetched."""

    reference: ImageReference
    #: The platform's manifest, never an index.
    manifest: Descriptor
    manifest_bytes: bytes
    config: Descriptor
    config_bytes: bytes
    platform: Platform
    #: Lowest first, each with its diff ID.
    layers: tuple[Descriptor, ...]


def verify(data: bytes, expected: str | None, source: str) -> Digest:
    """Return the digest of *data*, which must be *expected* where that is given.

    Raises:
        DigestMismatchError: it is another.
    """
    actual = digest_of(data)
    if expected is not None and actual != expected:
        raise DigestMismatchError(expected, actual, source)
    return actual


def verify_descriptor(data: bytes, descriptor: Descriptor, source: str) -> None:
    """Check *data* against a descriptor's size and digest.

    Raises:
        SizeMismatchError: it is longer or shorter.
        DigestMismatchError: it hashes to another digest.
    """
    if len(data) != descriptor.size_bytes:
        raise SizeMismatchError(descriptor.digest, descriptor.size_bytes, len(data), source)
    verify(data, descriptor.digest, source)


def parse_manifest(data: bytes, content_type: str, reference: str) -> Manifest | Index:
    """Parse what a registry returned for a tag or a manifest digest.

    Args:
        data: The bytes.
        content_type: The registry's ``Content-Type``, parameters included; used where the document
            doesn't name its own media type.
        reference: For messages.

    Raises:
        UnsupportedManifestError: schema 1, not an image, or a layer of an unknown kind.
        MalformedManifestError: it is no manifest, too large, or contradicts itself.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise MalformedManifestError(reference, f"it is larger than {MAX_MANIFEST_BYTES} bytes")
    document = _object(data, reference)
    media_type = _media_type(document, content_type, reference)
    own = Descriptor(media_type=media_type, digest=digest_of(data), size_bytes=len(data))
    if media_type in _INDEXES:
        entries = tuple(_entry(item, reference) for item in _list(document, "manifests", reference))
        return Index(descriptor=own, entries=entries)
    config = _descriptor(document.get("config"), reference, "config")
    layers = tuple(_layer(item, reference) for item in _list(document, "layers", reference))
    return Manifest(descriptor=own, config=config, layers=layers)


def choose(index: Index, wanted: Platform, reference: str) -> IndexEntry:
    """Return the first entry for *wanted*, or for the newest older variant that runs there.

    Raises:
        PlatformNotFoundError: with the platforms that there are.
    """
    for platform in wanted.also_runs:
        for entry in index.entries:
            if entry.platform == platform:
                return entry
    # Attestations are listed under unknown/unknown: nothing that a person could choose.
    known = {str(entry.platform) for entry in index.entries if entry.platform and entry.platform.os != "unknown"}
    raise PlatformNotFoundError(reference, str(wanted), tuple(sorted(known)))


def parse_config(data: bytes, reference: str) -> ImageConfig:
    """Parse an image config.

    Raises:
        MalformedManifestError: it is no image config.
    """
    what = f"config of {reference}"
    document = _object(data, what)
    rootfs = document.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if diff_ids is None and isinstance(rootfs, dict):
        diff_ids = []  # Go writes an image without layers as null.
    if not isinstance(diff_ids, list) or not all(isinstance(item, str) and is_digest(item) for item in diff_ids):
        raise MalformedManifestError(what, "rootfs.diff_ids is not a list of sha256 digests")
    return ImageConfig(platform=_platform(document), diff_ids=tuple(Digest(item) for item in diff_ids))


def assemble(
    reference: ImageReference,
    manifest: Manifest,
    *,
    manifest_bytes: bytes,
    config_bytes: bytes,
    wanted: Platform,
    listed: Platform | None,
) -> ResolvedImage:
    """Put a platform's manifest and config together: every layer gets its diff ID.

    Args:
        reference: What was asked for.
        manifest: The parsed manifest.
        manifest_bytes: It as it was read.
        config_bytes: Its config as it was read; verified already.
        wanted: The platform asked for.
        listed: The platform under which an index listed the manifest; None where there was no index, and
            the config alone says.

    Raises:
        MalformedManifestError: the config is none, or has another number of layers than the manifest, or that is
            too many.
        PlatformNotFoundError: there was no index, and the config is for another platform.
    """
    config = parse_config(config_bytes, reference.name)
    if len(manifest.layers) > MAX_LAYERS:
        raise MalformedManifestError(reference.name, f"it has {len(manifest.layers)} layers, more than {MAX_LAYERS}")
    if len(config.diff_ids) != len(manifest.layers):
        raise MalformedManifestError(
            reference.name,
            f"its manifest has {len(manifest.layers)} layers, its config {len(config.diff_ids)} diff IDs",
        )
    platform = listed or config.platform or wanted
    # Variants are not compared here: without an index there is nothing to choose, and configs leave them out.
    if listed is None and (platform.os, platform.architecture) != (wanted.os, wanted.architecture):
        raise PlatformNotFoundError(reference.name, str(wanted), (str(platform),))
    return ResolvedImage(
        reference=reference,
        manifest=manifest.descriptor,
        manifest_bytes=manifest_bytes,
        config=manifest.config,
        config_bytes=config_bytes,
        platform=platform,
        layers=tuple(
            replace(layer, diff_id=diff_id) for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True)
        ),
    )


# -- the parts of a document ----------------------------------------------------------------------------


def _object(data: bytes, reference: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise MalformedManifestError(reference, "it is not JSON") from exc
    if not isinstance(document, dict):
        raise MalformedManifestError(reference, "it is not a JSON object")
    return document


def _media_type(document: dict[str, Any], content_type: str, reference: str) -> str:
    served = content_type.partition(";")[0].strip().lower()
    own = document.get("mediaType")
    if own is not None and not isinstance(own, str):
        raise MalformedManifestError(reference, "its mediaType is not text")
    named = own or served
    if named in SCHEMA1 or document.get("schemaVersion") == 1:
        raise UnsupportedManifestError(reference, named, "Docker schema 1 is not supported")
    is_index, is_manifest = "manifests" in document, "layers" in document or "config" in document
    if is_index and is_manifest:
        # CVE-2021-41190: one digest that two clients take for two different things.
        raise MalformedManifestError(reference, "it could be read as an index and as a manifest")
    if named not in _MANIFESTS | _INDEXES:
        if own:
            raise UnsupportedManifestError(reference, own, "not an image")
        # OCI lets mediaType out, and some registries serve application/json: the shape decides.
        named = INDEX_OCI if is_index else MANIFEST_OCI
    if (named in _INDEXES) != is_index:
        raise MalformedManifestError(reference, f"its contents are not those of {named}")
    if own and served in _MANIFESTS | _INDEXES and served != own:
        raise MalformedManifestError(reference, f"it was served as {served} and calls itself {own}")
    return named


def _list(document: dict[str, Any], key: str, reference: str) -> Sequence[Any]:
    items = document.get(key)
    if items is None and key == "layers":
        return ()
    if not isinstance(items, list):
        raise MalformedManifestError(reference, f"{key} is not a list")
    return items


def _descriptor(item: object, reference: str, role: str) -> Descriptor:
    if not isinstance(item, dict):
        raise MalformedManifestError(reference, f"its {role} is not a descriptor")
    media_type, digest, size = item.get("mediaType"), item.get("digest"), item.get("size")
    annotations, urls = item.get("annotations") or {}, item.get("urls") or []
    if not isinstance(media_type, str) or not isinstance(digest, str) or type(size) is not int:
        raise MalformedManifestError(reference, f"the descriptor of its {role} lacks mediaType, digest or size")
    if not isinstance(annotations, dict) or not all(isinstance(value, str) for value in annotations.values()):
        raise MalformedManifestError(reference, f"the annotations of its {role} are not text")
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise MalformedManifestError(reference, f"the urls of its {role} are not text")
    try:
        return Descriptor(
            media_type=media_type,
            digest=Digest(digest),
            size_bytes=size,
            annotations=dict(annotations),
            urls=tuple(urls),
        )
    except InvalidDescriptorError as exc:
        raise MalformedManifestError(reference, f"its {role}: {exc}") from exc


def _layer(item: object, reference: str) -> Descriptor:
    layer = _descriptor(item, reference, "layer")
    if not layer.is_layer:
        raise UnsupportedManifestError(reference, layer.media_type, f"layer {layer.digest} is of an unknown kind")
    return layer


def _entry(item: object, reference: str) -> IndexEntry:
    manifest = _descriptor(item, reference, "manifest")
    platform = item.get("platform") if isinstance(item, dict) else None
    return IndexEntry(manifest=manifest, platform=_platform(platform) if isinstance(platform, dict) else None)


def _platform(document: dict[str, Any]) -> Platform | None:
    os, architecture, variant = (document.get(key) or "" for key in ("os", "architecture", "variant"))
    if not all(isinstance(word, str) for word in (os, architecture, variant)) or not (os and architecture):
        return None
    return Platform.of(os, architecture, variant)
