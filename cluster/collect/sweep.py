"""What in the bucket may be a stray: an object, or an unfinished upload, of a layer that no record names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.digest import Digest

#: Where blobs lie; only keys of uploads' own are judged (``blobs/sha256/HEX/NONCE``).
SWEPT_PREFIX = "blobs/sha256/"
#: Where damaged objects are moved to, under their own key.
QUARANTINE_PREFIX = "quarantine/"
_KEY = re.compile(r"blobs/sha256/([0-9a-f]{64})/[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Suspect:
    """An object or an unfinished upload that is there."""

    digest: Digest
    key: str
    #: Empty: a whole object.
    upload_id: str = ""


def suspect(key: str, upload_id: str = "") -> Suspect | None:
    """Return what a key may be a stray of, or None where the farm makes no such key: it is somebody else's."""
    found = _KEY.fullmatch(key)
    return None if found is None else Suspect(Digest(f"sha256:{found[1]}"), key, upload_id)
