"""Where remote caches are written to and read from, as people write it: ``--cache-to`` and ``--cache-from``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from cluster.errors import CacheOptionError, InvalidReferenceError
from cluster.reference import ImageReference, parse_reference

E = TypeVar("E", bound=Enum)

_TO, _FROM = "--cache-to", "--cache-from"


class CacheKind(Enum):
    """Where a cache is."""

    #: A manifest of its own in a registry; to read from, also an image with an inline cache.
    REGISTRY = "registry"
    #: Within the config of the image that is built.
    INLINE = "inline"


class CacheMode(Enum):
    """What of a build is exported."""

    #: What was asked for, and what that consists of.
    MIN = "min"
    #: Every vertex that has a result.
    MAX = "max"


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
    #: Where the export fails, that is a warning.
    ignores_error: bool = False
    #: The caller allows plain HTTP.
    plain_http: bool = False

    def __post_init__(self) -> None:
        if self.kind is CacheKind.REGISTRY and _reference(_TO, self.ref, self.ref).digest is not None:
            raise CacheOptionError(_TO, self.ref, "a cache is written under a tag, not under a digest")

    @property
    def name(self) -> str:
        """Return where it is, for people."""
        return self.ref or self.kind.value


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSource:
    """Where a cache comes from.

    Raises:
        CacheOptionError: what its kind needs is missing.
    """

    kind: CacheKind
    #: Of kind ``registry``: normalised reference.
    ref: str = ""
    #: The caller allows plain HTTP.
    plain_http: bool = False

    def __post_init__(self) -> None:
        if self.kind is CacheKind.INLINE:
            raise CacheOptionError(_FROM, self.kind.value, "read an image's inline cache with type=registry,ref=IMAGE")
        if self.kind is CacheKind.REGISTRY:
            _reference(_FROM, self.ref, self.ref)

    @property
    def name(self) -> str:
        """Return where it is, for people."""
        return self.ref


def parse_cache_target(text: str) -> CacheTarget:
    """Parse ``type=registry,ref=HOST/REPOSITORY[:TAG][,mode=min|max][,ignore-error=true]``, ``type=inline``, or a name.

    Raises:
        CacheOptionError: with what is wrong.
    """
    fields = _fields(_TO, text)
    kind = _choice(_TO, text, fields, "type", CacheKind)
    if kind is CacheKind.INLINE:
        _allow(_TO, text, fields, {"type"})
        return CacheTarget(kind=kind)
    _allow(_TO, text, fields, {"type", "ref", "mode", "ignore-error"})
    reference = _reference(_TO, text, _needed(_TO, text, fields, "ref"))
    if reference.digest is not None:
        raise CacheOptionError(_TO, text, "a cache is written under a tag, not under a digest")
    return CacheTarget(
        kind=kind,
        mode=_choice(_TO, text, fields, "mode", CacheMode) if "mode" in fields else CacheMode.MIN,
        ref=reference.name,
        ignores_error=_is_true(text, fields, "ignore-error"),
    )


def parse_cache_source(text: str) -> CacheSource:
    """Parse ``type=registry,ref=HOST/REPOSITORY[:TAG|@DIGEST]``, or the name alone.

    Raises:
        CacheOptionError: with what is wrong.
    """
    fields = _fields(_FROM, text)
    kind = _choice(_FROM, text, fields, "type", CacheKind)
    if kind is CacheKind.INLINE:
        raise CacheOptionError(_FROM, text, "read an image's inline cache with type=registry,ref=IMAGE")
    _allow(_FROM, text, fields, {"type", "ref"})
    return CacheSource(kind=kind, ref=_reference(_FROM, text, _needed(_FROM, text, fields, "ref")).name)


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


def _reference(option: str, text: str, ref: str) -> ImageReference:
    try:
        return parse_reference(ref)
    except InvalidReferenceError as exc:
        raise CacheOptionError(option, text, f"ref: {exc.reason}") from exc
