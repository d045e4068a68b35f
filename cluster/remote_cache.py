"""Remote caches: what vertices came to, by their keys, as chains of layers. Pure; who moves them is no matter.

A cache of its own is an OCI image manifest with all its layers, each once; its config says of which layers each
result consists. Results that are built upon each other share what they have in common, so that a cache of a deep
graph is as large as the graph. A cache within an image (*inline*) is a field of the image's config: results that
are the image's own lowest layers, by how many these are.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from cluster.cache_options import CacheMode
from cluster.descriptor import ANNOTATION_DIFF_ID, MANIFEST_OCI, Compression, Descriptor
from cluster.digest import Digest, blob_chain_id, digest_of, is_digest
from cluster.errors import CacheTooLargeError, MalformedCacheError, MalformedManifestError, NotACacheError
from cluster.image import MAX_MANIFEST_BYTES, Manifest, parse_config
from cluster.ref import RefId

T = TypeVar("T")

#: Media type of a cache's config.
CACHE_CONFIG = "application/vnd.lazyfarm.cache.config.v1+json"
#: Field of an image's config under which its inline cache is.
INLINE_KEY = "lazyfarm.cache.v1"
#: Caches whose configs are larger are neither written nor read: some 25,000 results with four keys each.
MAX_CACHE_CONFIG_BYTES = 8 * 1024**2
#: The version written, and the only one read.
VERSION = 1


# -- values -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """What a vertex came to."""

    #: Under which it is found.
    keys: tuple[Digest, ...]
    #: Lowest first, each with its diff ID; none: an empty filesystem.
    layers: tuple[Descriptor, ...]
    #: Image config (JSON) that an image came with.
    config: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheNode:
    """One layer on top of a chain."""

    #: Index into the cache's layers.
    layer: int
    #: Index of the node below, which stands earlier, so that no chain bites its tail; None: nothing is below.
    parent: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedNode:
    """An entry, by the top of its chain."""

    keys: tuple[Digest, ...]
    #: Index into the cache's nodes; None: an empty filesystem.
    node: int | None
    #: As :attr:`CacheEntry.config`.
    config: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteCache:
    """What a cache holds. As large as the graph that it is of: chains are spelled out only when they are asked for.

    Raises:
        MalformedCacheError: it refers to what it doesn't hold, or a layer has no diff ID, or a key is none.
    """

    #: Each once, in any order, with diff IDs.
    layers: tuple[Descriptor, ...] = ()
    nodes: tuple[CacheNode, ...] = ()
    entries: tuple[CachedNode, ...] = ()

    def __post_init__(self) -> None:
        for layer in self.layers:
            if layer.diff_id is None:
                raise MalformedCacheError("", f"layer {layer.digest} has no diff ID")
        for number, node in enumerate(self.nodes):
            if not 0 <= node.layer < len(self.layers):
                raise MalformedCacheError("", f"node {number} is of layer {node.layer} of {len(self.layers)}")
            if node.parent is not None and not 0 <= node.parent < number:
                raise MalformedCacheError("", f"node {number} is on top of node {node.parent}")
        for entry in self.entries:
            if entry.node is not None and not 0 <= entry.node < len(self.nodes):
                raise MalformedCacheError("", f"an entry is node {entry.node} of {len(self.nodes)}")
            if bad := [key for key in entry.keys if not is_digest(key)]:
                raise MalformedCacheError("", f"{bad[0]!r} is no cache key")

    @classmethod
    def of(cls, entries: Iterable[CacheEntry]) -> RemoteCache:
        """Return the cache that holds *entries*."""
        builder = CacheBuilder()
        for entry in entries:
            node: int | None = None
            for layer in entry.layers:
                node = builder.node(layer, node)
            builder.add(entry.keys, node, entry.config)
        return builder.build()

    def chain(self, node: int | None) -> tuple[Descriptor, ...]:
        """Return the layers up to a node, lowest first."""
        layers = []
        while node is not None:
            layers.append(self.layers[self.nodes[node].layer])
            node = self.nodes[node].parent
        return tuple(reversed(layers))

    def entry(self, number: int) -> CacheEntry:
        """Return an entry with its layers."""
        found = self.entries[number]
        return CacheEntry(keys=found.keys, layers=self.chain(found.node), config=found.config)

    def ref_ids(self) -> list[RefId]:
        """Return the ID of the ref that each node is, whether or not there is one."""
        found: list[RefId] = []
        for node in self.nodes:
            layer = self.layers[node.layer]
            if layer.diff_id is None:
                raise MalformedCacheError("", f"layer {layer.digest} has no diff ID")
            below = None if node.parent is None else Digest(found[node.parent])
            found.append(RefId(blob_chain_id(below, layer.digest, layer.diff_id)))
        return found


class CacheBuilder:
    """Puts a cache together: layers, nodes and entries that are equal become one."""

    def __init__(self) -> None:
        self._layers: dict[tuple[Digest, Digest | None], Descriptor] = {}
        self._numbers: dict[tuple[Digest, Digest | None], int] = {}
        self._nodes: dict[tuple[int, int | None], int] = {}
        self._entries: dict[tuple[int | None, bytes | None], dict[Digest, None]] = {}

    def node(self, layer: Descriptor, parent: int | None) -> int:
        """Return the node of *layer* on top of *parent*."""
        name = (layer.digest, layer.diff_id)
        self._layers.setdefault(name, layer)
        number = self._numbers.setdefault(name, len(self._numbers))
        return self._nodes.setdefault((number, parent), len(self._nodes))

    def add(self, keys: Iterable[Digest], node: int | None, config: bytes | None) -> None:
        """Add an entry; one without keys can't be found, so it is none."""
        if found := dict.fromkeys(keys):
            self._entries.setdefault((node, config), {}).update(found)

    def build(self) -> RemoteCache:
        """Return the cache."""
        return RemoteCache(
            layers=tuple(self._layers.values()),
            nodes=tuple(CacheNode(layer=layer, parent=parent) for layer, parent in self._nodes),
            entries=tuple(
                CachedNode(keys=tuple(keys), node=node, config=config) for (node, config), keys in self._entries.items()
            ),
        )


# -- what is exported -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportCandidate:
    """A vertex of a job, with what it came to, as whoever exports it is told."""

    keys: tuple[Digest, ...]
    #: Top of its chain; None: an empty filesystem.
    ref: RefId | None
    #: As :attr:`CacheEntry.config`.
    config: bytes | None = None
    #: Its result was asked for, and is not only what another's is made of.
    is_target: bool = False


def select(candidates: Iterable[ExportCandidate], mode: CacheMode, passed: Collection[RefId]) -> list[ExportCandidate]:
    """Return what is exported.

    Args:
        candidates: Every vertex that has a result.
        mode: ``max``: all of them; ``min``: targets, and those whose layers targets have anyway.
        passed: The refs of the targets' chains.
    """
    return [
        found
        for found in candidates
        if found.keys and (mode is CacheMode.MAX or found.is_target or (found.ref is not None and found.ref in passed))
    ]


# -- a cache of its own -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedCache:
    """A cache as it is stored: besides its layers, these two."""

    manifest: bytes
    config: bytes

    @property
    def config_descriptor(self) -> Descriptor:
        """Return the config's descriptor."""
        return Descriptor(media_type=CACHE_CONFIG, digest=digest_of(self.config), size_bytes=len(self.config))

    @property
    def manifest_descriptor(self) -> Descriptor:
        """Return the manifest's descriptor."""
        return Descriptor(media_type=MANIFEST_OCI, digest=digest_of(self.manifest), size_bytes=len(self.manifest))


class _Entry(msgspec.Struct):
    keys: list[str]
    node: int | None = None
    config: int | None = None


class _Config(msgspec.Struct):
    """A cache's config; nodes are (layer, parent)."""

    version: int
    nodes: list[tuple[int, int | None]]
    entries: list[_Entry]
    configs: list[bytes]


class _Versioned(msgspec.Struct):
    version: int


def encode(cache: RemoteCache, reference: str) -> EncodedCache:
    """Return *cache* as an OCI manifest and its config. One cache has one encoding.

    Raises:
        CacheTooLargeError: it has more layers or results than a registry, or a reader, takes.
    """
    configs = _Numbered()
    document = _Config(
        version=VERSION,
        nodes=[(node.layer, node.parent) for node in cache.nodes],
        entries=[_Entry(keys=list(e.keys), node=e.node, config=configs.number(e.config)) for e in cache.entries],
        configs=configs.values,
    )
    config = msgspec.json.encode(document)
    _check_size(config, MAX_CACHE_CONFIG_BYTES, reference)
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_OCI,
            "config": {"mediaType": CACHE_CONFIG, "digest": digest_of(config), "size": len(config)},
            "layers": [_layer_document(layer) for layer in cache.layers],
        }
    )
    _check_size(manifest, MAX_MANIFEST_BYTES, reference)
    return EncodedCache(manifest=manifest, config=config)


def decode(manifest: Manifest, config: bytes, reference: str) -> RemoteCache:
    """Return the cache that a manifest and its config are.

    Raises:
        NotACacheError: the manifest is of something else, or of another version.
        MalformedCacheError: they contradict themselves or each other.
    """
    if manifest.config.media_type != CACHE_CONFIG:
        raise NotACacheError(reference, f"its config is a {manifest.config.media_type}")
    document = _parse(config, _Config, reference)
    configs = document.configs
    try:
        return RemoteCache(
            layers=tuple(_with_diff_id(layer, reference) for layer in manifest.layers),
            nodes=tuple(CacheNode(layer=layer, parent=parent) for layer, parent in document.nodes),
            entries=tuple(
                CachedNode(
                    keys=tuple(Digest(key) for key in entry.keys),
                    node=entry.node,
                    config=_config_of(entry.config, configs, reference),
                )
                for entry in document.entries
            ),
        )
    except MalformedCacheError as exc:
        raise MalformedCacheError(reference, exc.reason) from exc


# -- a cache within an image ------------------------------------------------------------------------------------


class _InlineEntry(msgspec.Struct):
    """As :class:`_Entry`; its result is the image's *layers* lowest layers."""

    keys: list[str]
    layers: int
    config: int | None = None


class _Inline(msgspec.Struct):
    version: int
    entries: list[_InlineEntry]
    configs: list[bytes]


def embed(config: bytes, layers: Sequence[Descriptor], entries: Iterable[CacheEntry]) -> bytes:
    """Return an image's config with a cache in it, in the place of one that it was derived with.

    Args:
        config: Image config (JSON).
        layers: The image's, lowest first.
        entries: Those that aren't the image's lowest layers, or all of them, are left out.

    Raises:
        MalformedManifestError: *config* is no JSON object.
        CacheTooLargeError: with the cache, it would be larger than a registry takes.
    """
    document = _document(config)
    document.pop(INLINE_KEY, None)
    names = [(layer.digest, layer.diff_id) for layer in layers]
    configs = _Numbered()
    found = [
        _InlineEntry(
            keys=list(entry.keys),
            layers=len(entry.layers),
            config=configs.number(None if entry.config is None else _without_cache(entry.config)),
        )
        for entry in entries
        if entry.keys and [(layer.digest, layer.diff_id) for layer in entry.layers] == names[: len(entry.layers)]
    ]
    if found:
        inline = _Inline(version=VERSION, entries=found, configs=configs.values)
        # Opaque to other tools, which may write numbers and keys of what they don't know in another way.
        document[INLINE_KEY] = base64.b64encode(msgspec.json.encode(inline)).decode()
    data = _json(document)
    _check_size(data, MAX_MANIFEST_BYTES, "the image's config")
    return data


def extract(config: bytes, layers: Sequence[Descriptor], reference: str) -> RemoteCache:
    """Return the cache within an image's config.

    Args:
        config: As it was read.
        layers: The image's, lowest first, with diff IDs.
        reference: For messages.

    Raises:
        NotACacheError: there is none, or of another version.
        MalformedCacheError: it speaks of layers that the image doesn't have, or is no cache.
    """
    told = _document(config).get(INLINE_KEY)
    if told is None:
        raise NotACacheError(reference, "it is an image without an inline cache")
    try:
        data = base64.b64decode(told, validate=True)
    except (TypeError, ValueError, binascii.Error) as exc:
        raise MalformedCacheError(reference, f"{INLINE_KEY} is not base64") from exc
    document = _parse(data, _Inline, reference)
    builder, tops = CacheBuilder(), list[int]()
    for layer in layers:
        tops.append(builder.node(layer, tops[-1] if tops else None))
    for entry in document.entries:
        if not 0 <= entry.layers <= len(tops):
            raise MalformedCacheError(reference, f"an entry is {entry.layers} of the image's {len(tops)} layers")
        builder.add(
            [Digest(key) for key in entry.keys],
            tops[entry.layers - 1] if entry.layers else None,
            _config_of(entry.config, document.configs, reference),
        )
    try:
        return builder.build()
    except MalformedCacheError as exc:
        raise MalformedCacheError(reference, exc.reason) from exc


def read_cache(manifest: Manifest, config: bytes, reference: str) -> RemoteCache:
    """Return the cache that a manifest is, or that is within the image that it is.

    Raises:
        NotACacheError, MalformedCacheError: see :func:`decode` and :func:`extract`.
        MalformedManifestError: it is an image whose config doesn't fit.
    """
    if manifest.config.media_type == CACHE_CONFIG:
        return decode(manifest, config, reference)
    if INLINE_KEY not in _document(config):
        raise NotACacheError(reference, "it is an image without an inline cache")
    diff_ids = parse_config(config, reference).diff_ids
    if len(diff_ids) != len(manifest.layers):
        raise MalformedManifestError(
            reference, f"its manifest has {len(manifest.layers)} layers, its config {len(diff_ids)} diff IDs"
        )
    layers = [replace(layer, diff_id=diff_id) for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)]
    return extract(config, layers, reference)


# -- the parts of a document ------------------------------------------------------------------------------------


class _Numbered:
    """Values by number, each once."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def number(self, value: bytes | None) -> int | None:
        return None if value is None else self._numbers.setdefault(value, len(self._numbers))

    @property
    def values(self) -> list[bytes]:
        return list(self._numbers)


def _parse(data: bytes, type_: type[T], reference: str) -> T:
    """Parse a versioned document, checking its shape while it is read: nothing that doesn't fit is ever built."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).version
        if version != VERSION:
            raise NotACacheError(reference, f"it is of version {version} of the format, and {VERSION} is known")
        return msgspec.json.decode(data, type=type_)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise MalformedCacheError(reference, str(exc)) from exc


def _config_of(number: int | None, configs: Sequence[bytes], reference: str) -> bytes | None:
    if number is None:
        return None
    if not 0 <= number < len(configs):
        raise MalformedCacheError(reference, f"an entry has config {number} of {len(configs)}")
    return configs[number]


def _check_size(data: bytes, limit_bytes: int, reference: str) -> None:
    if len(data) > limit_bytes:
        raise CacheTooLargeError(reference, len(data), limit_bytes)


def _document(config: bytes) -> dict[str, Any]:
    try:
        document = json.loads(config)
    except (ValueError, RecursionError) as exc:
        raise MalformedManifestError("the image's config", "it is not JSON") from exc
    if not isinstance(document, dict):
        raise MalformedManifestError("the image's config", "it is not a JSON object")
    return document


def _without_cache(config: bytes) -> bytes:
    """Return a base image's config without its own cache: each build upon it would carry all earlier ones along."""
    document = _document(config)
    return config if document.pop(INLINE_KEY, None) is None else _json(document)


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


_SUFFIXES = {Compression.NONE: "", Compression.GZIP: "+gzip", Compression.ZSTD: "+zstd"}


def _layer_document(layer: Descriptor) -> dict[str, Any]:
    """Return a layer as an OCI manifest has it; Docker's media types become OCI's, of the same meaning."""
    kind = "layer.nondistributable" if layer.is_foreign else "layer"
    return {
        "mediaType": f"application/vnd.oci.image.{kind}.v1.tar{_SUFFIXES[layer.compression]}",
        "digest": layer.digest,
        "size": layer.size_bytes,
        "annotations": {**layer.annotations, ANNOTATION_DIFF_ID: layer.diff_id},
        **({"urls": list(layer.urls)} if layer.urls else {}),
    }


def _with_diff_id(layer: Descriptor, reference: str) -> Descriptor:
    annotations = dict(layer.annotations)
    diff_id = annotations.pop(ANNOTATION_DIFF_ID, "")
    if not is_digest(diff_id):
        raise MalformedCacheError(reference, f"layer {layer.digest} has no diff ID")
    return replace(layer, diff_id=Digest(diff_id), annotations=annotations)
