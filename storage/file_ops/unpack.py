"""Archives unpacked by a copy (``ADD``): tar, plain or compressed by gzip, bzip2, xz or zstd, told by content.

What an entry meets is replaced, but for a directory by a directory: these are merged, as Docker does. Names and
links are resolved within the root, so that no entry leaves it.
"""

# Names of files are bytes here, which pathlib can't hold.

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import stat
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final, Protocol, assert_never, cast

import zstandard

from cluster.descriptor import Compression
from storage.containers.users import Owner
from storage.file_ops.copy import new_directory
from storage.file_ops.faults import BadArchiveError
from storage.file_ops.paths import Target, find, inside
from storage.snapshots import tar
from storage.snapshots.attributes import OVERLAY_XATTR, Attributes
from storage.snapshots.copy import make_special
from storage.snapshots.inflate import DamagedStreamError, LayerStream
from storage.snapshots.names import join, parent_of, shown, split
from storage.snapshots.store import remove_tree
from storage.snapshots.tree import Node

_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MAGIC_BYTES: Final = 6
_TYPE: Final = {
    tar.REGULAR: stat.S_IFREG,
    tar.SYMLINK: stat.S_IFLNK,
    tar.CHARACTER: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
    tar.DIRECTORY: stat.S_IFDIR,
    tar.FIFO: stat.S_IFIFO,
}


def try_unpack(
    archive: Node, target: Target, destination: str, *, owner: Owner | None, checkpoint: Callable[[], None]
) -> bool:
    """Unpack *archive*, a regular file, into the directory *destination*; False if it is no archive.

    Args:
        archive: The file.
        target: The tree that is changed.
        destination: A path from its root; made, with those above it, where it is missing.
        owner: Of everything, instead of the archive's; None keeps that.
        checkpoint: Called before each entry; raises to stop.

    Raises:
        BadArchiveError: it begins as one and is damaged, or an entry must not be made; what came before it is there.
        OSError: the destination is no directory, or the disk refused.
    """
    if not _starts_as_archive(archive):
        return False
    stream, compression = _open(archive)
    try:
        with LayerStream(stream, compression) as source:
            reader = tar.TarReader(source.next)
            entry = reader.next()
            found = find(target.tree, destination)
            target.make_directories(found, new_directory(owner))
            unpacker = _Unpacker(target, found.relative, owner)
            while entry is not None:
                checkpoint()
                unpacker.add(entry, reader)
                entry = reader.next()
            unpacker.finish()
    except tar.TarError as exc:
        raise BadArchiveError(f"{exc.reason} at entry {shown(exc.entry)!r}") from exc
    except DamagedStreamError as exc:
        raise BadArchiveError(f"damaged {compression.value} stream: {exc}") from exc
    finally:
        stream.close()
    return True


class _File(Protocol):
    """What is used of a file."""

    @property
    def closed(self) -> bool: ...

    def readinto(self, buffer: memoryview, /) -> int: ...

    def close(self) -> None: ...


class _ArchiveStream:
    """A file's bytes for the thread that inflates; it may be closed while that still reads."""

    def __init__(self, file: _File, below: _File | None = None) -> None:
        self._file = file
        #: The compressed file, which the decompressing one doesn't close.
        self._below = below
        self._lock = threading.Lock()

    def readinto(self, buffer: memoryview, /) -> int:
        """Read into *buffer*; 0 at the end, and once it is closed."""
        with self._lock:
            if self._file.closed:
                return 0
            try:
                return self._file.readinto(buffer)
            except (EOFError, lzma.LZMAError) as exc:
                raise DamagedStreamError(str(exc)) from exc
            except OSError as exc:
                if exc.errno is None:  # bz2's way to say it
                    raise DamagedStreamError(str(exc)) from exc
                raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()
            if self._below is not None:
                self._below.close()


def _starts_as_archive(archive: Node) -> bool:
    """Tell whether a file begins, decompressed, with the header of a tar entry."""
    stream, compression = _open(archive)
    try:
        block = _first_block(stream, compression)
    except (DamagedStreamError, EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError):
        return False
    finally:
        stream.close()
    digits = block[148:156].strip(b" \0")
    if len(block) < tar.BLOCK or not digits.isdigit():
        return False
    return _octal(digits) == sum(block[:148]) + 8 * ord(" ") + sum(block[156:])


def _octal(digits: bytes) -> int:
    try:
        return int(digits, 8)
    except ValueError:
        return -1


def _first_block(stream: _ArchiveStream, compression: Compression) -> bytes:
    """Return the first 512 bytes of a stream, decompressed; fewer at its end."""
    raw = cast("BinaryIO", _RawStream(stream))
    match compression:
        case Compression.NONE:
            return io.BufferedReader(cast("io.RawIOBase", raw)).read(tar.BLOCK)
        case Compression.GZIP:
            with gzip.GzipFile(fileobj=io.BufferedReader(cast("io.RawIOBase", raw))) as file:
                return file.read(tar.BLOCK)
        case Compression.ZSTD:
            with zstandard.ZstdDecompressor().stream_reader(raw) as reader:
                return reader.read(tar.BLOCK)
        case _:
            assert_never(compression)


class _RawStream(io.RawIOBase):
    """A stream as the file that decompressors want."""

    def __init__(self, stream: _ArchiveStream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # ours is always a buffer of bytes
        return self._stream.readinto(memoryview(buffer).cast("B"))


def _open(archive: Node) -> tuple[_ArchiveStream, Compression]:
    """Open a file; tell what :class:`LayerStream` has to inflate of it."""
    fd = os.open(archive.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    magic = os.pread(fd, _MAGIC_BYTES, 0)
    file = cast("_File", io.FileIO(fd))
    if magic.startswith(b"BZh"):
        return _ArchiveStream(bz2.BZ2File(cast("io.FileIO", file)), file), Compression.NONE
    if magic == b"\xfd7zXZ\0":
        return _ArchiveStream(lzma.LZMAFile(cast("io.FileIO", file)), file), Compression.NONE
    if magic.startswith(b"\x1f\x8b"):
        return _ArchiveStream(file), Compression.GZIP
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return _ArchiveStream(file), Compression.ZSTD
    return _ArchiveStream(file), Compression.NONE


class _Unpacker:
    """Puts an archive's entries below *base*."""

    def __init__(self, target: Target, base: bytes, owner: Owner | None) -> None:
        self._target = target
        self._base = base
        self._owner = owner
        #: Directories as written in names → where they are. Emptied when a link or a removal may change that.
        self._resolved: dict[bytes, bytes] = {}
        #: What the archive's directories are to have.
        self._directories: dict[bytes, Attributes] = {}

    def add(self, entry: tar.Entry, reader: tar.TarReader) -> None:
        """Make *entry*; *reader* is at its data."""
        parts = split(entry.name)
        if parts is None:
            raise BadArchiveError(f"entry {shown(entry.name)!r} leads out of the destination")
        if reason := tar.impossible(entry):
            raise BadArchiveError(f"entry {shown(entry.name)!r} has {reason}")
        if not parts:
            return
        above = self._directory(parts[:-1])
        name = parts[-1]
        at = join(above, name)
        with self._target.changing(above) as fd:
            is_there = self._make_way(entry, at, fd, name)
            if entry.kind == tar.DIRECTORY:
                if not is_there:
                    os.mkdir(name, 0o700, dir_fd=fd)
                self._directories[at] = self._attributes(entry)
            elif entry.kind == tar.HARD_LINK:
                self._link(entry, at, fd, name)
            else:
                self._file(entry, reader, at, fd, name)

    def finish(self) -> None:
        """Give the directories their attributes: making files in one changes its time, and may need its mode."""
        for at, attributes in reversed(self._directories.items()):
            with self._target.directory(at) as fd:
                self._target.writer.write(fd, at, attributes)

    def _directory(self, parts: list[bytes]) -> bytes:
        """Return the directory that *parts*, below the base, leads to; make it where it is missing."""
        written = b"/".join(parts)
        relative = self._resolved.get(written)
        if relative is None:
            found = find(self._target.tree, join(self._base, written) if written else self._base)
            self._target.make_directories(found, new_directory(self._owner))
            relative = self._resolved[written] = found.relative
        return relative

    def _make_way(self, entry: tar.Entry, at: bytes, fd: int, name: bytes) -> bool:
        """Remove what *entry* replaces; tell whether there is a directory that it merges with."""
        try:
            mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
        except FileNotFoundError:
            self._forget(at)
            return False
        if stat.S_ISDIR(mode):
            if entry.kind == tar.DIRECTORY:
                return True
            remove_tree(Path(os.fsdecode(self._target.path + b"/" + at)))
        else:
            os.unlink(name, dir_fd=fd)
        self._forget(at)
        self._resolved.clear()
        return False

    def _forget(self, at: bytes) -> None:
        """Forget what was known of *at* and of what was in it."""
        for path in [path for path in self._directories if path == at or path.startswith(at + b"/")]:
            del self._directories[path]
        ledger = self._target.writer.ledger
        for path in ledger or ():
            if ledger is not None and (path == at or path.startswith(at + b"/")):
                ledger.discard(path)

    def _link(self, entry: tar.Entry, at: bytes, fd: int, name: bytes) -> None:
        parts = split(entry.link)
        if not parts:
            raise BadArchiveError(f"entry {shown(entry.name)!r} is a hard link to {shown(entry.link)!r}")
        found = find(self._target.tree, join(self._base, b"/".join(parts)), follow_last=False)
        if found.node is None or found.node.is_dir:
            raise BadArchiveError(f"entry {shown(entry.name)!r} is a hard link to {shown(entry.link)!r}, no file")
        first = found.relative
        with self._target.directory(parent_of(first)) as above:
            os.link(first.rpartition(b"/")[2], name, src_dir_fd=above, dst_dir_fd=fd, follow_symlinks=False)
        ledger = self._target.writer.ledger
        if ledger is not None and (recorded := ledger.get(first)) is not None:
            ledger.put(at, recorded)

    def _file(self, entry: tar.Entry, reader: tar.TarReader, at: bytes, fd: int, name: bytes) -> None:
        attributes = self._attributes(entry)
        writer = self._target.writer
        if entry.kind == tar.REGULAR:
            out = os.open(name, _NEW_FILE, 0o600, dir_fd=fd)
            try:
                _write_content(out, entry, reader)
                writer.write(out, at, attributes)
            finally:
                os.close(out)
        elif entry.kind == tar.SYMLINK:
            if not entry.link:
                raise BadArchiveError(f"entry {shown(entry.name)!r} is a symlink to nothing")
            os.symlink(entry.link, name, dir_fd=fd)
            writer.write(inside(fd, name), at, attributes)
            self._resolved.clear()
        else:
            make_special(inside(fd, name), at, attributes, writer)

    def _attributes(self, entry: tar.Entry) -> Attributes:
        if any(name.startswith(OVERLAY_XATTR) for name in entry.xattrs):
            raise BadArchiveError(f"entry {shown(entry.name)!r} has an xattr that would direct overlayfs")
        is_node = entry.kind in (tar.CHARACTER, tar.BLOCK_DEVICE)
        attributes = Attributes(
            mode=_TYPE[entry.kind] | entry.mode,
            uid=entry.uid,
            gid=entry.gid,
            mtime_ns=entry.mtime_ns,
            atime_ns=entry.atime_ns,
            rdev=os.makedev(entry.major, entry.minor) if is_node else 0,
            xattrs=entry.xattrs,
        )
        return attributes if self._owner is None else replace(attributes, uid=self._owner.uid, gid=self._owner.gid)


def _write_content(fd: int, entry: tar.Entry, reader: tar.TarReader) -> None:
    """Write a file's data: one after the other, or where a sparse file's map says."""
    offset = 0
    extents = [(extent.offset, extent.length) for extent in entry.extents or () if extent.length]
    if entry.extents is None:
        extents = [(0, entry.size)]
    else:
        os.ftruncate(fd, entry.size)
    left = 0
    while (piece := reader.read()) is not None:
        while piece:
            if not left:
                if not extents:
                    raise OSError(errno.EINVAL, "a sparse map that does not match its data")
                offset, left = extents.pop(0)
            written = os.pwrite(fd, piece[:left], offset)
            piece = piece[written:]
            offset, left = offset + written, left - written
