"""Trees: what a driver's directory holds, as a manifest that has a digest.

A manifest lists files by path, with type, permission bits, and digest or link target. Owners and times are left out:
everything belongs to root, and was last changed at :data:`MTIME_S`. So one content has one digest, whoever checked it
out and when. A manifest with 100,000 files is some 15 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import msgspec

from cluster import wire
from cluster.digest import Digest, digest_of, is_digest
from cluster.errors import InvalidTreeError

#: When everything in a tree was last changed, in seconds: 1980-01-02, as ZIP archives (so Python's wheels) can't hold
#: times before 1980, in no time zone.
MTIME_S = 315_619_200

_KIND = "tree"
_MAX_MODE = 0o7777


class EntryKind(Enum):
    """What a path of a tree is."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """One path of a tree."""

    #: Relative, with slashes.
    path: str
    kind: EntryKind
    #: Permission bits, with set-user-ID, set-group-ID and sticky; 0o777 for symlinks.
    mode: int
    #: Length; 0 for what is no file.
    size_bytes: int = 0
    #: Of a file's content.
    digest: Digest | None = None
    #: Of a symlink, as it was written.
    link_target: str = ""


@dataclass(frozen=True, slots=True)
class Tree:
    """The entries of a directory, itself left out: in the order of paths compared by component, checked.

    Raises:
        InvalidTreeError: an entry out of order, twice, in no directory of the tree, with a path that leads out of it,
            or with what its kind doesn't have.
    """

    entries: tuple[TreeEntry, ...]

    def __post_init__(self) -> None:
        directories = {""}
        before: list[str] = []
        for entry in self.entries:
            parts = entry.path.split("/")
            _check(entry, parts)
            if parts <= before:
                raise InvalidTreeError(entry.path, "it is not in its place in the order")
            if entry.path.rpartition("/")[0] not in directories:
                raise InvalidTreeError(entry.path, "it is in no directory of the tree")
            if entry.kind is EntryKind.DIRECTORY:
                directories.add(entry.path)
            before = parts

    def __repr__(self) -> str:
        return f"Tree({len(self.entries)} entries, {self.size_bytes} bytes)"

    @property
    def size_bytes(self) -> int:
        """Return the length of all files."""
        return sum(entry.size_bytes for entry in self.entries)

    @property
    def files(self) -> dict[Digest, int]:
        """Return the length of each content, by digest."""
        return {entry.digest: entry.size_bytes for entry in self.entries if entry.digest is not None}


def _check(entry: TreeEntry, parts: list[str]) -> None:
    if not {"", ".", ".."}.isdisjoint(parts) or "\0" in entry.path:
        raise InvalidTreeError(entry.path, "it is no path within the tree")
    if not 0 <= entry.mode <= _MAX_MODE:
        raise InvalidTreeError(entry.path, f"{entry.mode:#o} are no permission bits")
    if (entry.kind is EntryKind.FILE) != (entry.digest is not None) or not is_digest(entry.digest or digest_of(b"")):
        raise InvalidTreeError(entry.path, f"a {entry.kind.value} with digest {entry.digest}")
    if (entry.kind is EntryKind.SYMLINK) != bool(entry.link_target) or "\0" in entry.link_target:
        raise InvalidTreeError(entry.path, f"a {entry.kind.value} with link target {entry.link_target!r}")
    if entry.size_bytes < 0 or (entry.size_bytes and entry.kind is not EntryKind.FILE):
        raise InvalidTreeError(entry.path, f"a {entry.kind.value} of {entry.size_bytes} bytes")


class _Body(msgspec.Struct):
    """The body of a tree's payload."""

    #: As the fields of :class:`TreeEntry`.
    entries: list[tuple[str, EntryKind, int, int, Digest | None, str]]


def encode_tree(tree: Tree) -> bytes:
    """Return a tree's manifest as a payload; the digest of that is the digest of the tree."""
    rows = [(e.path, e.kind, e.mode, e.size_bytes, e.digest, e.link_target) for e in tree.entries]
    return wire.encode(_KIND, _Body(entries=rows))


def decode_tree(data: bytes) -> Tree:
    """Return the tree of a manifest.

    Raises:
        UnknownVersionError: another release wrote it, in a form that is unknown here.
        MalformedPayloadError: it is truncated or no manifest.
        InvalidTreeError: as :class:`Tree`.
    """
    return Tree(tuple(TreeEntry(*row) for row in wire.decode(_KIND, _Body, data).entries))
