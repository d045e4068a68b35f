"""Builders of layer tars, streams of them, and a way to say what a tree on disk is."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from cluster.descriptor import Compression, Descriptor
from cluster.digest import Digest, chain_id, digest_of
from cluster.ports import AppliedLayer, Snapshotter

MTIME = 1_600_000_000

_MEDIA_TYPE = {
    Compression.NONE: "application/vnd.oci.image.layer.v1.tar",
    Compression.GZIP: "application/vnd.oci.image.layer.v1.tar+gzip",
    Compression.ZSTD: "application/vnd.oci.image.layer.v1.tar+zstd",
}


@dataclass(frozen=True)
class Item:
    """One entry of a layer tar."""

    name: str
    kind: bytes = tarfile.REGTYPE
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: float = MTIME
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)
    pax: dict[str, str] = field(default_factory=dict)


def file(name: str, data: bytes = b"", **more) -> Item:
    return Item(name, data=data, **more)


def directory(name: str, mode: int = 0o755, **more) -> Item:
    return Item(name, tarfile.DIRTYPE, mode=mode, **more)


def symlink(name: str, target: str, **more) -> Item:
    return Item(name, tarfile.SYMTYPE, link=target, mode=0o777, **more)


def hard_link(name: str, target: str, **more) -> Item:
    return Item(name, tarfile.LNKTYPE, link=target, **more)


def character(name: str, major: int, minor: int, **more) -> Item:
    return Item(name, tarfile.CHRTYPE, device=(major, minor), **more)


def fifo(name: str, **more) -> Item:
    return Item(name, tarfile.FIFOTYPE, **more)


def whiteout(name: str) -> Item:
    head, _, base = name.rpartition("/")
    return Item(f"{head}/.wh.{base}" if head else f".wh.{base}", mode=0o600)


def opaque(name: str) -> Item:
    return Item(f"{name}/.wh..wh..opq" if name else ".wh..wh..opq", mode=0o600)


def layer_tar(*items: Item, form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return the tar of *items*, in their order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for item in items:
            info = tarfile.TarInfo(item.name)
            info.type, info.mode, info.uid, info.gid = item.kind, item.mode, item.uid, item.gid
            info.mtime, info.linkname, info.size = item.mtime, item.link, len(item.data)
            info.devmajor, info.devminor = item.device
            info.pax_headers = dict(item.pax) | {
                f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape") for name, value in item.xattrs.items()
            }
            archive.addfile(info, io.BytesIO(item.data))
    return out.getvalue()


def compress(tar: bytes, compression: Compression, *, members: int = 1) -> bytes:
    """Compress *tar*, as several gzip members or zstd frames if asked."""
    if compression is Compression.NONE:
        return tar
    one: Callable[[bytes], bytes] = (
        (lambda data: gzip.compress(data, 6, mtime=0))
        if compression is Compression.GZIP
        else zstandard.ZstdCompressor(write_checksum=True).compress
    )
    size = -(-len(tar) // members)
    return b"".join(one(tar[at : at + size]) for at in range(0, len(tar), size))


class Bytes:
    """A stream of *data* in pieces of at most *piece* bytes, ending with *error* if there is one."""

    def __init__(self, data: bytes, *, piece: int = 1 << 16, error: Exception | None = None) -> None:
        self._data = memoryview(data)
        self._piece = piece
        self._error = error

    def readinto(self, buffer: memoryview) -> int:
        count = min(len(buffer), len(self._data), self._piece)
        if not count and self._error is not None:
            raise self._error
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count


@dataclass(frozen=True)
class Layer:
    """A layer as stored, and its descriptor."""

    tar: bytes
    blob: bytes
    descriptor: Descriptor

    @property
    def diff_id(self) -> Digest:
        return digest_of(self.tar)


def layer(
    *items: Item, compression: Compression = Compression.GZIP, form: int = tarfile.PAX_FORMAT, members: int = 1
) -> Layer:
    return layer_of(layer_tar(*items, form=form), compression, members=members)


def layer_of(tar: bytes, compression: Compression = Compression.GZIP, *, members: int = 1) -> Layer:
    blob = compress(tar, compression, members=members)
    return Layer(
        tar,
        blob,
        Descriptor(
            media_type=_MEDIA_TYPE[compression], digest=digest_of(blob), size_bytes=len(blob), diff_id=digest_of(tar)
        ),
    )


def apply(snapshotter: Snapshotter, parent: Digest | None, what: Layer) -> Digest:
    """Apply one layer on *parent*; return its chain ID."""
    chain = chain_id(parent, what.diff_id)
    apply_as(snapshotter, chain, parent, what)
    return chain


def apply_as(snapshotter: Snapshotter, chain: Digest, parent: Digest | None, what: Layer) -> AppliedLayer:
    return snapshotter.apply(
        chain=chain, parent=parent, layer=what.descriptor, stream=Bytes(what.blob), await_parent=lambda: None
    )


def apply_all(snapshotter: Snapshotter, *layers: Layer) -> Digest:
    """Apply layers, lowest first; return the chain ID of the whole."""
    chain: Digest | None = None
    for each in layers:
        chain = apply(snapshotter, chain, each)
    assert chain is not None
    return chain


@dataclass(frozen=True)
class Fact:
    """All that is to be seen of a file."""

    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    #: Content, link target or device number.
    what: bytes | str | int
    xattrs: tuple[tuple[str, bytes], ...] = ()
    #: The first path of this same file.
    first: str = ""


_KIND = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
}


def facts(root: Path) -> dict[str, Fact]:
    """Return what is at and under *root*, by relative path, the root being ``.``."""
    found: dict[str, Fact] = {}
    inodes: dict[int, str] = {}
    paths = [root, *sorted(Path(where) / name for where, dirs, files in os.walk(root) for name in dirs + files)]
    for path in paths:
        status = path.lstat()
        name = str(path.relative_to(root))
        kind = _KIND[stat.S_IFMT(status.st_mode)]
        what: bytes | str | int = 0
        first = name
        if kind == "file":
            what = path.read_bytes()
        elif kind == "symlink":
            what = os.readlink(path)  # noqa: PTH115  # pathlib would take it apart and clean it
        elif kind in ("character", "block"):
            what = status.st_rdev
        if kind != "directory":
            first = inodes.setdefault(status.st_ino, name)
        xattrs = tuple(
            (key, os.getxattr(path, key, follow_symlinks=False))
            for key in sorted(os.listxattr(path, follow_symlinks=False))
        )
        found[name] = Fact(
            kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, what, xattrs, first
        )
    return found


def sketch(root: Path) -> dict[str, object]:
    """Return what is under *root* in short: content, ``-> target`` or the kind, by relative path."""
    return {
        name: fact.what if fact.kind == "file" else f"-> {fact.what}" if fact.kind == "symlink" else fact.kind
        for name, fact in facts(root).items()
        if name != "."
    }
