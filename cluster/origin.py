"""What layers that builds made were made of: who may have that may have them. Told in docs/decisions/0014."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import msgspec

from cluster.digest import Digest
from cluster.errors import MalformedPayloadError
from cluster.provider import ProviderHandle

#: Of a layer that was made of nothing but what its own chain shows.
OPEN: Final = ""
#: Origins that are kept of one ref; the oldest one goes. Who needs that one has a miss, and makes the layer again.
MAX_ORIGINS: Final = 16
#: Places kept of a blob that something was made of.
_MAX_PROVIDERS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """A pulled blob that something was made of: who wants that must be shown this blob by a registry."""

    digest: Digest
    size_bytes: int
    #: Where it was known to be. Kept here, as its own ref may be long collected.
    providers: tuple[ProviderHandle, ...]
    #: ``registry/repository`` that its bytes came from; empty where it isn't known.
    came_from: str


#: All that one layer was made of beyond its own chain, by digest. A layer that was made in several ways, to the
#: same bytes, has several: any of them will do.
Origin = tuple[Needed, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Blobs that were known to be in the same places: layers of one image, mostly."""

    came_from: str
    providers: tuple[ProviderHandle, ...]
    blobs: tuple[tuple[Digest, int], ...]


_decoder = msgspec.json.Decoder(tuple[_Place, ...])


def encode_origin(needs: Iterable[Needed]) -> str:
    """Return the one text of an origin: it is kept and compared by scripts of Redis, which don't look into it."""
    by_digest = {need.digest: need for need in needs}
    places: dict[tuple[str, tuple[ProviderHandle, ...]], list[tuple[Digest, int]]] = {}
    for _, need in sorted(by_digest.items()):
        # Where the bytes came from is kept whatever else is: its manifests may be believed.
        known = sorted(dict.fromkeys(need.providers), key=lambda handle: (handle.source != need.came_from, handle))
        key = (need.came_from, tuple(known[:_MAX_PROVIDERS]))
        places.setdefault(key, []).append((need.digest, need.size_bytes))
    if not places:
        return OPEN
    told = [
        _Place(came_from=came_from, providers=providers, blobs=tuple(blobs))
        for (came_from, providers), blobs in sorted(places.items())
    ]
    return msgspec.json.encode(told).decode()


@lru_cache(maxsize=4096)
def decode_origin(text: str) -> Origin:
    """Return the origin of that text.

    Raises:
        MalformedPayloadError: it is none.
    """
    if text == OPEN:
        return ()
    try:
        places = _decoder.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise MalformedPayloadError("origin", str(exc)) from exc
    return tuple(
        Needed(digest=digest, size_bytes=size_bytes, providers=place.providers, came_from=place.came_from)
        for place in places
        for digest, size_bytes in place.blobs
    )


def merge_origins(stored: Sequence[str], added: Sequence[str]) -> tuple[str, ...]:
    """Return what is kept of a ref's origins once *added* come: those first, each once, :data:`OPEN` alone.

    ``storage/lua/lib/ref.lua`` has the same rule.
    """
    merged = tuple(dict.fromkeys((*added, *stored)))
    return (OPEN,) if OPEN in merged else merged[:MAX_ORIGINS]
