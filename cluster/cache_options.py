"""Where remote caches are written to and read from, as people write it: ``--cache-to`` and ``--cache-from``."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from cluster.errors import CacheOptionError, InvalidReferenceError
from cluster.provider import S3_KIND, ProviderHandle
from cluster.reference import ImageReference, parse_reference

E = TypeVar("E", bound=Enum)

_TO, _FROM, _S3 = "--cache-to", "--cache-from", "type=s3"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
_PREFIX = re.compile(r"(?=.{1,512}\Z)[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*\Z")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\Z")
#: Where farms keep objects in their buckets.
_FARMS_OWN = frozenset({"blobs", "local", "doctor"})
_WORDS = "letters, digits, '.', '_' and '-', and does not start with '.'"


class CacheKind(Enum):
    """Where a cache is."""

    #: A manifest of its own in a registry; to read from, also an image with an inline cache.
    REGISTRY = "registry"
    #: Within the config of the image that is built.
    INLINE = "inline"
    #: In a bucket at the farm's S3 endpoint, with the farm's own credentials.
    S3 = "s3"


class CacheMode(Enum):
    """What of a build is exported."""

    #: What was asked for, and what that consists of.
    MIN = "min"
    #: Every vertex that has a result.
    MAX = "max"


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketCache:
    """A cache in an S3 bucket: blobs as ``PREFIX/blobs/sha256/HEX``, its manifest as ``PREFIX/manifests/NAME``.

    Raises:
        CacheOptionError: one of the three can't be a part of an object's address.
    """

    bucket: str
    #: Shared by any number of caches, which share their blobs then.
    prefix: str
    name: str

    def __post_init__(self) -> None:
        if _BUCKET.match(self.bucket) is None:
            raise CacheOptionError(_S3, self.bucket, "a bucket has 3 to 63 lower-case letters, digits, '.' and '-'")
        if _PREFIX.match(self.prefix) is None:
            raise CacheOptionError(_S3, self.prefix, f"a prefix has {_WORDS}, in parts joined by '/'")
        if self.prefix.partition("/")[0] in _FARMS_OWN:
            raise CacheOptionError(_S3, self.prefix, "a farm keeps its own objects there, and removes all others")
        if _NAME.match(self.name) is None:
            raise CacheOptionError(_S3, self.name, f"a name has {_WORDS}")

    @property
    def url(self) -> str:
        """Return where its manifest is, for people."""
        return f"s3://{self.bucket}/{self.prefix}/manifests/{self.name}"

    @property
    def handle(self) -> ProviderHandle:
        """Return the provider handle of its blobs."""
        return ProviderHandle(kind=S3_KIND, registry=S3_KIND, repository=f"{self.bucket}/{self.prefix}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTarget:
    """Where a build's cache goes, and what of it.

    Raises:
        CacheOptionError: what its kind needs is missing.
    """

    kind: CacheKind
    mode: CacheMode = CacheMode.MIN
    #: Of kind ``registry``: normalised reference, with a tag.
    ref: str = ""
    #: Of kind ``s3``.
    bucket: BucketCache | None = None
    #: Where the export fails, that is a warning.
    ignores_error: bool = False
    #: The caller allows plain HTTP.
    plain_http: bool = False

    def __post_init__(self) -> None:
        if self.kind is CacheKind.REGISTRY and _reference(_TO, self.ref, self.ref).digest is not None:
            raise CacheOptionError(_TO, self.ref, "a cache is written under a tag, not under a digest")
        if self.kind is CacheKind.S3 and self.bucket is None:
            raise CacheOptionError(_TO, self.kind.value, "it has no bucket")

    @property
    def name(self) -> str:
        """Return where it is, for people."""
        return self.bucket.url if self.bucket is not None else self.ref or self.kind.value


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSource:
    """Where a cache comes from.

    Raises:
        CacheOptionError: what its kind needs is missing.
    """

    kind: CacheKind
    #: Of kind ``registry``: normalised reference.
    ref: str = ""
    #: Of kind ``s3``.
    bucket: BucketCache | None = None
    #: The caller allows plain HTTP.
    plain_http: bool = False

    def __post_init__(self) -> None:
        if self.kind is CacheKind.INLINE:
            raise CacheOptionError(_FROM, self.kind.value, "read an image's inline cache with type=registry,ref=IMAGE")
        if self.kind is CacheKind.REGISTRY:
            _reference(_FROM, self.ref, self.ref)
        if self.kind is CacheKind.S3 and self.bucket is None:
            raise CacheOptionError(_FROM, self.kind.value, "it has no bucket")

    @property
    def name(self) -> str:
        """Return where it is, for people."""
        return self.bucket.url if self.bucket is not None else self.ref


def parse_cache_target(text: str) -> CacheTarget:
    """Parse what ``--cache-to`` is given.

    ``type=registry,ref=HOST/REPOSITORY[:TAG]`` or that name alone, ``type=s3,bucket=BUCKET,prefix=PREFIX,name=NAME``,
    both with ``[,mode=min|max][,ignore-error=true]``; or ``type=inline``.

    Raises:
        CacheOptionError: with what is wrong.
    """
    fields = _fields(_TO, text)
    kind = _choice(_TO, text, fields, "type", CacheKind)
    if kind is CacheKind.INLINE:
        _allow(_TO, text, fields, {"type"})
        return CacheTarget(kind=kind)
    _allow(_TO, text, fields, {*_PLACES[kind], "mode", "ignore-error"})
    mode = _choice(_TO, text, fields, "mode", CacheMode) if "mode" in fields else CacheMode.MIN
    ignores_error = _is_true(text, fields, "ignore-error")
    if kind is CacheKind.S3:
        return CacheTarget(kind=kind, mode=mode, bucket=_bucket(_TO, text, fields), ignores_error=ignores_error)
    reference = _reference(_TO, text, _needed(_TO, text, fields, "ref"))
    if reference.digest is not None:
        raise CacheOptionError(_TO, text, "a cache is written under a tag, not under a digest")
    return CacheTarget(kind=kind, mode=mode, ref=reference.name, ignores_error=ignores_error)


def parse_cache_source(text: str) -> CacheSource:
    """Parse what ``--cache-from`` is given.

    ``type=registry,ref=HOST/REPOSITORY[:TAG|@DIGEST]`` or that name alone, or
    ``type=s3,bucket=BUCKET,prefix=PREFIX,name=NAME``.

    Raises:
        CacheOptionError: with what is wrong.
    """
    fields = _fields(_FROM, text)
    kind = _choice(_FROM, text, fields, "type", CacheKind)
    if kind is CacheKind.INLINE:
        raise CacheOptionError(_FROM, text, "read an image's inline cache with type=registry,ref=IMAGE")
    _allow(_FROM, text, fields, _PLACES[kind])
    if kind is CacheKind.S3:
        return CacheSource(kind=kind, bucket=_bucket(_FROM, text, fields))
    return CacheSource(kind=kind, ref=_reference(_FROM, text, _needed(_FROM, text, fields, "ref")).name)


_PLACES = {CacheKind.REGISTRY: ("type", "ref"), CacheKind.S3: ("type", "bucket", "prefix", "name")}


# -- the parts of an option -------------------------------------------------------------------------------------


def _fields(option: str, text: str) -> dict[str, str]:
    """Split an option into its fields; a name alone is a registry's."""
    if "=" not in text and "," not in text:
        return {"type": CacheKind.REGISTRY.value, "ref": text.strip()}
    fields: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise CacheOptionError(option, text, f"{part!r} is not KEY=VALUE")
        if key in fields:
            raise CacheOptionError(option, text, f"{key} is given twice")
        fields[key] = value
    return fields


def _allow(option: str, text: str, fields: Collection[str], known: Collection[str]) -> None:
    for key in fields:
        if key not in known:
            raise CacheOptionError(option, text, f"there is no {key} here; known: {', '.join(sorted(known))}")


def _needed(option: str, text: str, fields: dict[str, str], key: str) -> str:
    if not (value := fields.get(key, "")):
        raise CacheOptionError(option, text, f"it has no {key}")
    return value


def _choice(option: str, text: str, fields: dict[str, str], key: str, type_: type[E]) -> E:
    value = _needed(option, text, fields, key)
    for choice in type_:
        if choice.value == value:
            return choice
    known = ", ".join(choice.value for choice in type_)
    raise CacheOptionError(option, text, f"{key} is {value!r} and must be one of {known}")


def _is_true(text: str, fields: dict[str, str], key: str) -> bool:
    value = fields.get(key, "false")
    if value not in ("true", "false"):
        raise CacheOptionError(_TO, text, f"{key} is {value!r} and must be true or false")
    return value == "true"


def _bucket(option: str, text: str, fields: dict[str, str]) -> BucketCache:
    bucket, prefix, name = (_needed(option, text, fields, key) for key in ("bucket", "prefix", "name"))
    try:
        return BucketCache(bucket=bucket, prefix=prefix, name=name)
    except CacheOptionError as exc:
        raise CacheOptionError(option, text, exc.reason) from exc


def _reference(option: str, text: str, ref: str) -> ImageReference:
    try:
        return parse_reference(ref)
    except InvalidReferenceError as exc:
        raise CacheOptionError(option, text, f"ref: {exc.reason}") from exc
