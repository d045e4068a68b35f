"""What a file is beside its content: read from disk, written to disk, and recorded where that fails.

Without root the owner, setuid bits, ``trusted.*`` and some other xattrs can't be set, and device nodes
can't be made. A :class:`Ledger` records them beside the snapshot; what reads a snapshot through it
sees the tree as it should be.
"""

# Names of files are bytes here, which pathlib can't hold.
# ruff: noqa: PTH101

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import msgspec

from storage.snapshots.names import parent_of

#: Overlayfs's own marks: never a part of a tree.
OVERLAY_XATTR: Final = "trusted.overlay."
#: Not a part of a tree either: labels are the node's policy (umoci leaves it out likewise).
_LABEL_XATTR: Final = "security.selinux"
#: What Linux has xattrs in. Others (a Mac's ``com.apple.*``) can't be set on any file, and containerd leaves them out.
_NAMESPACES: Final = ("user.", "trusted.", "security.", "system.")
#: Linux's own limits, in bytes. A file system may have narrower ones.
_XATTR_NAME_MAX: Final = 255
_XATTR_SIZE_MAX: Final = 65536
#: More than any xattr takes: with so much room it is not the disk that is full.
_ROOM_BYTES: Final = 1024**2

_CANNOT: Final = frozenset((errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTSUP))


@dataclass(slots=True, kw_only=True)
class Attributes:
    """A file's inode, as it should be."""

    #: Type and permission bits, as in ``st_mode``.
    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    atime_ns: int = 0
    #: Device number; 0 for what is no device.
    rdev: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)


class _Record(msgspec.Struct, array_like=True, frozen=True):
    path: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    rdev: int
    xattrs: dict[str, bytes]


class _Book(msgspec.Struct, frozen=True):
    version: int
    owner_is_root: bool
    records: list[_Record]


class Ledger:
    """What of a tree could not be made, by path.

    Almost everything in a layer belongs to root. So where nothing could be chowned, an entry without a
    record is owned by 0:0, and only the others are recorded.
    """

    def __init__(self, *, owner_is_root: bool) -> None:
        self.owner_is_root = owner_is_root
        self._records: dict[bytes, Attributes] = {}
        self._absent: dict[bytes, set[bytes]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self._records))

    def get(self, path: bytes) -> Attributes | None:
        """Return what is recorded of *path*."""
        return self._records.get(path)

    def put(self, path: bytes, attributes: Attributes) -> None:
        """Record that *path* should have these attributes."""
        self.discard(path)
        self._records[path] = attributes
        if is_device(attributes.mode):
            self._absent.setdefault(parent_of(path), set()).add(path)

    def discard(self, path: bytes) -> None:
        """Forget *path*: it was replaced or removed."""
        if self._records.pop(path, None) is not None:
            self._absent.get(parent_of(path), set()).discard(path)

    def absent_in(self, directory: bytes) -> set[bytes]:
        """Return the paths of the devices that should be in *directory*."""
        return self._absent.get(directory, set())

    def save(self, path: Path) -> None:
        """Write the ledger."""
        records = [
            _Record(name, a.mode, a.uid, a.gid, a.mtime_ns, a.rdev, a.xattrs)
            for name, a in sorted(self._records.items())
        ]
        path.write_bytes(msgspec.msgpack.encode(_Book(1, self.owner_is_root, records)))

    @classmethod
    def load(cls, path: Path) -> Ledger | None:
        """Read a ledger; None where there is none: the tree is as it should be."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        book = msgspec.msgpack.decode(data, type=_Book)
        ledger = cls(owner_is_root=book.owner_is_root)
        for record in book.records:
            ledger.put(
                record.path,
                Attributes(
                    mode=record.mode,
                    uid=record.uid,
                    gid=record.gid,
                    mtime_ns=record.mtime_ns,
                    atime_ns=record.mtime_ns,
                    rdev=record.rdev,
                    xattrs=record.xattrs,
                ),
            )
        return ledger


def is_device(mode: int) -> bool:
    """Tell whether *mode* is that of a device node."""
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def read_xattrs(path: bytes) -> dict[str, bytes]:
    """Return the xattrs of a file itself, without overlayfs's marks."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as exc:
        if exc.errno == errno.ENOTSUP:
            return {}
        raise
    return {
        name: os.getxattr(path, name, follow_symlinks=False)
        for name in names
        if not name.startswith(OVERLAY_XATTR) and name != _LABEL_XATTR
    }


def read_attributes(path: bytes, status: os.stat_result, relative: bytes, ledger: Ledger | None) -> Attributes:
    """Return the attributes that the file at *path* should have: from disk, corrected by the ledger."""
    actual = Attributes(
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        atime_ns=status.st_atime_ns,
        rdev=status.st_rdev if is_device(status.st_mode) else 0,
        xattrs=read_xattrs(path),
    )
    if ledger is None:
        return actual
    recorded = ledger.get(relative)
    if recorded is not None:
        return replace(recorded, mtime_ns=actual.mtime_ns, atime_ns=actual.atime_ns)
    return replace(actual, uid=0, gid=0) if ledger.owner_is_root else actual


class AttributeWriter:
    """Gives files their attributes, and records in *ledger* what it can't.

    Args:
        ledger: None: everything must be made, and an OSError says what can't.
    """

    def __init__(self, ledger: Ledger | None) -> None:
        self.ledger = ledger
        self._uid = os.geteuid()
        self._gid = os.getegid()
        #: Whether trying to chown is worth its call.
        self._may_chown = ledger is None or not ledger.owner_is_root

    def write(self, target: int | bytes, relative: bytes, wanted: Attributes, *, is_new: bool = True) -> None:
        """Set owner, mode, xattrs and times, in the order in which none undoes another.

        Args:
            target: An open file, or a path that isn't followed.
            relative: Its path in the tree, for the ledger.
            wanted: What it should have.
            is_new: False where it may have xattrs that must go.

        Raises:
            OSError: the disk refused, or (without a ledger) the privilege is lacking.
        """
        mode = wanted.mode
        is_link = stat.S_ISLNK(mode)
        is_whole = self._own(target, wanted.uid, wanted.gid)
        permissions = mode & 0o7777
        if not is_whole:
            # Set on a file of another owner, these would lend that owner's rights, ours, to whoever runs it.
            permissions &= 0o1777
        if self._uid:
            # We must be able to read what we keep, and to empty it, without the privilege to do so anyway.
            permissions |= 0o700 if stat.S_ISDIR(mode) else 0o600
        if not is_link:
            os.chmod(target, permissions)
        is_exact = is_link or permissions == mode & 0o7777
        if not is_new:
            for name in set(read_xattrs(_path(target))) - set(wanted.xattrs):
                os.removexattr(target, name, follow_symlinks=isinstance(target, int))
        for name, value in wanted.xattrs.items():
            is_exact &= self._set_xattr(target, name, value)
        os.utime(target, ns=(wanted.atime_ns, wanted.mtime_ns), follow_symlinks=isinstance(target, int))
        if self.ledger is None:
            return
        owner_is_implied = self.ledger.owner_is_root and wanted.uid == wanted.gid == 0
        if is_exact and (owner_is_implied or (is_whole and not self.ledger.owner_is_root)):
            self.ledger.discard(relative)
        else:
            self.ledger.put(relative, wanted)

    def _own(self, target: int | bytes, uid: int, gid: int) -> bool:
        """Set the owner; tell whether it is the wanted one now."""
        if not self._may_chown:
            return uid == self._uid and gid == self._gid
        try:
            os.chown(target, uid, gid, follow_symlinks=isinstance(target, int))
        except OSError as exc:
            if self.ledger is None or exc.errno not in _CANNOT:
                raise
            return False
        return True

    def _set_xattr(self, target: int | bytes, name: str, value: bytes) -> bool:
        if name == _LABEL_XATTR or not name.startswith(_NAMESPACES):
            return True
        try:
            os.setxattr(target, name, value, follow_symlinks=isinstance(target, int))
        except OSError as exc:
            if exc.errno == errno.ENOSPC and _has_room(target):
                # What ext4 says of an xattr that outgrows a file's one block for them.
                raise OSError(errno.E2BIG, f"xattr {name} of {len(value)} bytes is too big here") from exc
            if self.ledger is None or exc.errno not in _CANNOT:
                raise
            return False
        return True


def impossible_xattr(name: str, value: bytes) -> str:
    """Return what of an xattr that is to be set no file of Linux can have; empty where there is nothing."""
    if not name.startswith(_NAMESPACES):
        return ""
    if "\0" in name:
        return "a zero byte in an xattr's name"
    if (length := len(os.fsencode(name))) > _XATTR_NAME_MAX:
        return f"an xattr's name of {length} bytes"
    if len(value) > _XATTR_SIZE_MAX:
        return f"an xattr of {len(value)} bytes"
    return ""


def _has_room(target: int | bytes) -> bool:
    disk = os.statvfs(target if isinstance(target, int) else os.path.dirname(target))  # noqa: PTH120
    return disk.f_bavail * disk.f_frsize >= _ROOM_BYTES


def _path(target: int | bytes) -> bytes:
    return target if isinstance(target, bytes) else b"/proc/self/fd/%d" % target
