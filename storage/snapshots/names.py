"""Names of tar entries, taken apart. Paths here are bytes, relative to the root, ``b""`` being the root."""

from __future__ import annotations

from typing import Final

#: Longest resolved path. Below Linux's 4096, so that it can still be used with the snapshot's own path before it.
MAX_PATH_BYTES: Final = 3072

WHITEOUT: Final = b".wh."
#: aufs kept books under this prefix; only the opaque marker means anything in a layer.
WHITEOUT_META: Final = b".wh..wh."
OPAQUE: Final = b".wh..wh..opq"


def split(name: bytes) -> list[bytes] | None:
    """Return the components of a name, cleaned as Go's ``filepath.Clean`` does; None if it leads out of the root.

    An absolute name is relative to the root. ``a/../b`` is ``b``, whatever ``a`` is.
    """
    parts = [part for part in name.split(b"/") if part and part != b"."]
    if b".." not in parts:
        return parts
    cleaned: list[bytes] = []
    for part in parts:
        if part != b"..":
            cleaned.append(part)
        elif cleaned:
            cleaned.pop()
        elif not name.startswith(b"/"):
            return None
    return cleaned


def join(directory: bytes, base: bytes) -> bytes:
    """Return the path of *base* in *directory*."""
    return directory + b"/" + base if directory else base


def parent_of(path: bytes) -> bytes:
    """Return the directory that *path* is in; the root is in itself."""
    return path.rpartition(b"/")[0]


def shown(name: bytes) -> str:
    """Return a name for people: whatever is no UTF-8 is escaped."""
    return name.decode("utf-8", "backslashreplace")
