"""What in the bucket may be a stray: an object, or an unfinished upload, that no record names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cluster.digest import Digest

#: Where damaged objects are moved to, under their own key.
QUARANTINE_PREFIX = "quarantine/"
#: Where all lies that the farm makes and the sweeper judges, sorted.
SWEPT_PREFIXES = ("blobs/", "doctor/", "local/", QUARANTINE_PREFIX)
#: Seconds for which a damaged object is kept.
QUARANTINE_S = 7 * 24 * 3600.0

#: What no digest is known of: a record names it by its key alone, or nothing does.
NAMELESS = Digest("-")

_FETCHED = re.compile(r"blobs/sha256/([0-9a-f]{64})/[0-9a-f]{16}")
_BUILT = re.compile(r"blobs/built/[0-9a-f]{32}")
_OTHER = re.compile(r"local/packs/[0-9a-f]{32}|local/trees/[0-9a-f]{64}/[0-9a-f]{32}|doctor/probe-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Suspect:
    """An object or an unfinished upload that is there."""

    #: Of the blob that it is, or would be; NAMELESS where that can't be told.
    digest: Digest
    key: str
    #: Empty: a whole object.
    upload_id: str = ""

    @property
    def is_quarantined(self) -> bool:
        """Tell whether it was put aside, to be kept for :data:`QUARANTINE_S`."""
        return self.key.startswith(QUARANTINE_PREFIX)


def suspect(key: str, upload_id: str = "", *, built: Mapping[str, Digest] = MappingProxyType({})) -> Suspect | None:
    """Return what a key may be a stray of, or None where the farm makes no such key: it is somebody else's.

    Args:
        key: Of the object.
        upload_id: Of an unfinished upload.
        built: Digests of the blobs that are recorded under keys which don't say them.
    """
    if found := _FETCHED.fullmatch(key):
        return Suspect(Digest(f"sha256:{found[1]}"), key, upload_id)
    if _BUILT.fullmatch(key):
        return Suspect(built.get(key, NAMELESS), key, upload_id)
    if _OTHER.fullmatch(key) or (
        key.startswith(QUARANTINE_PREFIX) and suspect(key.removeprefix(QUARANTINE_PREFIX)) is not None
    ):
        return Suspect(NAMELESS, key, upload_id)
    return None
