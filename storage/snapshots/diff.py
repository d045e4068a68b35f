"""Layer tars out of snapshots: what one tree changes of another, written so that one tree gives one tar."""

# Names of files are bytes here, which pathlib can't hold.
# ruff: noqa: PTH115, PTH123

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from cluster.digest import Digest
from storage.snapshots.attributes import Attributes, Ledger
from storage.snapshots.names import OPAQUE, WHITEOUT, join, parent_of
from storage.snapshots.tree import Node, Tree, is_opaque, is_whiteout

_COPY_BYTES = 1 << 20
_BLOCK = 512
_XATTR = "SCHILY.xattr."
_TYPE = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


@dataclass(slots=True)
class Changes:
    """What a tree changes of the one below it."""

    #: New and changed files by path, and the directories that lead to them.
    nodes: dict[bytes, Node] = field(default_factory=dict)
    #: Paths that are deleted.
    deleted: set[bytes] = field(default_factory=set)
    #: Directories that hide what is below.
    opaque: set[bytes] = field(default_factory=set)
    #: Paths that are hard links to an unchanged file, by path.
    links: dict[bytes, bytes] = field(default_factory=dict)


def read_upper(upper: bytes, tree: Tree, lower: Tree | None) -> Changes:
    """Return the changes that an overlay layer's own directory *upper* has in it.

    Args:
        upper: The layer's directory.
        tree: Of the snapshot that has it on top.
        lower: What the snapshot stands on.
    """
    changes = Changes()
    pending = [b""]
    while pending:
        directory = pending.pop()
        with os.scandir(upper + b"/" + directory) as listing:
            for item in listing:
                path = join(directory, item.name)
                status = item.stat(follow_symlinks=False)
                if is_whiteout(status):
                    changes.deleted.add(path)
                    continue
                places = (item.path,)
                changes.nodes[path] = Node(path, places, status, None)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(path)
                    if is_opaque(item.path):
                        changes.opaque.add(path)
    _compare_roots(changes, tree.root, None if lower is None else lower.root)
    return changes


def compare(upper: Tree | None, lower: Tree | None) -> Changes:
    """Return what makes *upper* out of *lower*, by comparing both, contents included; None is the empty tree."""
    comparison = _Comparison()
    root = None if upper is None else upper.root
    below = None if lower is None else lower.root
    if root is not None:
        comparison.run(root, below)
        comparison.settle_links()
        _add_ancestors(comparison.changes, root)
        _compare_roots(comparison.changes, root, below)
    elif below is not None:
        comparison.changes.deleted = {child.relative for child in below.children()}
    return comparison.changes


class _Comparison:
    """One walk through two trees."""

    def __init__(self) -> None:
        self.changes = Changes()
        #: Files that both trees have alike: above and below.
        self._alike: dict[bytes, tuple[Node, Node]] = {}
        #: The paths of each file that has several.
        self._groups: dict[tuple[int, int], list[bytes]] = {}

    def run(self, root: Node, below: Node | None) -> None:
        """Compare everything but the attributes of the two roots."""
        pending: list[tuple[Node, Node | None]] = [(root, below)]
        while pending:
            new, old = pending.pop()
            if new.inode is not None:
                self._groups.setdefault(new.inode, []).append(new.relative)
            is_alike = old is not None and are_alike(new, old)
            if new.relative and not is_alike:
                self.changes.nodes[new.relative] = new
            if new.is_dir:
                pending.extend(self._children(new, old))
            elif old is not None and is_alike:
                self._alike[new.relative] = (new, old)

    def _children(self, new: Node, old: Node | None) -> list[tuple[Node, Node | None]]:
        below = {child.relative: child for child in old.children()} if old is not None and old.is_dir else {}
        pairs = [(child, below.pop(child.relative, None)) for child in new.children()]
        self.changes.deleted |= below.keys()
        return pairs

    def settle_links(self) -> None:
        """Say which files are links to which, where that changed.

        A link to an unchanged file is written as such. Anything more involved (links that were parted, joined
        or added to) is written out whole, since a link into the layers below copies its target up alone.
        """
        together: dict[tuple[int, int], set[bytes]] = {}
        for path, (_, old) in self._alike.items():
            if old.inode is not None:
                together.setdefault(old.inode, set()).add(path)
        for path, (new, old) in self._alike.items():
            group = set(self._groups[new.inode]) if new.inode is not None else {path}
            unchanged = {member for member in group if member in self._alike}
            was_with = together[old.inode] if old.inode is not None else {path}
            if unchanged == was_with and (unchanged == group or len(unchanged) == 1):
                for member in group - unchanged:
                    self.changes.links[member] = path
            else:
                for member in unchanged:
                    self.changes.nodes[member] = self._alike[member][0]


def _compare_roots(changes: Changes, new: Node, old: Node | None) -> None:
    if old is None or not are_alike(new, old):
        changes.nodes[b""] = new


def _add_ancestors(changes: Changes, root: Node) -> None:
    """Add the directories on the way to each change: with them, a layer needs nobody's help to be unpacked."""
    wanted = {b""}
    for path in (*changes.nodes, *changes.deleted):
        directory = parent_of(path)
        while directory not in wanted:
            wanted.add(directory)
            directory = parent_of(directory)
    for path in sorted(wanted - {b""}):
        if path not in changes.nodes:
            node: Node | None = root
            for part in path.split(b"/"):
                node = None if node is None else node.child(part)
            if node is not None:
                changes.nodes[path] = node


def are_alike(new: Node, old: Node) -> bool:
    """Tell whether two files are the same in all but access time and, for directories, what is in them."""
    if stat.S_IFMT(new.mode) != stat.S_IFMT(old.mode):
        return False
    if new.path and new.path == old.path and not new.is_dir:
        return True
    mine, theirs = new.attributes(), old.attributes()
    if replace(mine, atime_ns=0) != replace(theirs, atime_ns=0):
        return False
    if stat.S_ISLNK(mine.mode):
        return os.readlink(new.path) == os.readlink(old.path)
    if stat.S_ISREG(mine.mode):
        return new.size == old.size and _same_content(new.path, old.path)
    return True


def _same_content(one: bytes, other: bytes) -> bool:
    """Compare two files byte by byte: reproducible builds give changed files of one size the same times."""
    with open(one, "rb", buffering=0) as a, open(other, "rb", buffering=0) as b:
        while True:
            piece = a.read(_COPY_BYTES)
            if piece != b.read(_COPY_BYTES):
                return False
            if not piece:
                return True


class _HashingWriter:
    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._out.write(data)

    @property
    def digest(self) -> Digest:
        return Digest(f"sha256:{self._hash.hexdigest()}")


def write_layer(changes: Changes, out: BinaryIO, *, latest_ns: int | None = None) -> Digest:
    """Write the layer tar of *changes*, in the order of paths compared by component; return its diff ID.

    Args:
        changes: What to write.
        out: Where to.
        latest_ns: Modification times are clamped to this, in nanoseconds since the epoch; None: to nothing.
    """
    writer = _HashingWriter(out)
    #: Inode → the path that it was written under.
    written: dict[tuple[int, int], bytes] = {}
    for key, node in sorted(_entries(changes), key=lambda entry: entry[0]):
        if node is None:
            writer.write(_header(b"/".join(key), Attributes(mode=stat.S_IFREG | 0o600)))
            continue
        attributes = node.attributes()
        attributes = replace(attributes, mtime_ns=layer_time(attributes.mtime_ns, latest_ns))
        inode = node.inode
        target = changes.links.get(node.relative)
        if target is None and inode is not None:
            target = written.get(inode)
        if target is not None:
            writer.write(_header(node.relative, attributes, link=target))
            continue
        if inode is not None:
            written[inode] = node.relative
        if stat.S_ISREG(attributes.mode):
            _write_file(writer, node, attributes)
        elif stat.S_ISLNK(attributes.mode):
            writer.write(_header(node.relative, attributes, symlink=os.readlink(node.path)))
        else:
            writer.write(_header(node.relative, attributes))
    writer.write(bytes(2 * _BLOCK))
    return writer.digest


def layer_time(mtime_ns: int, latest_ns: int | None) -> int:
    """Return the modification time that a layer gives a file: not before the epoch, which no reader takes."""
    return max(0, mtime_ns if latest_ns is None else min(mtime_ns, latest_ns))


def clamp_times(changes: Changes, latest_ns: int | None, ledger: Ledger | None) -> None:
    """Give the files of *changes* on disk the times that :func:`write_layer` writes of them."""
    for path, node in changes.nodes.items():
        attributes = node.attributes()
        mtime_ns = layer_time(attributes.mtime_ns, latest_ns)
        # A link to an unchanged file is that file: it keeps its time.
        if mtime_ns == attributes.mtime_ns or path in changes.links:
            continue
        if node.path:
            os.utime(node.path, ns=(mtime_ns, mtime_ns), follow_symlinks=False)
        elif ledger is not None:
            ledger.put(path, replace(attributes, mtime_ns=mtime_ns))


def _entries(changes: Changes) -> list[tuple[tuple[bytes, ...], Node | None]]:
    """Return every entry by the components of its name; None stands for a whiteout or an opaque marker."""
    found: list[tuple[tuple[bytes, ...], Node | None]] = [
        (tuple(path.split(b"/")) if path else (), node) for path, node in changes.nodes.items()
    ]
    for path in changes.deleted:
        directory, _, base = path.rpartition(b"/")
        found.append((tuple(join(directory, WHITEOUT + base).split(b"/")), None))
    found.extend((tuple(join(path, OPAQUE).split(b"/")), None) for path in changes.opaque)
    return found


def _write_file(writer: _HashingWriter, node: Node, attributes: Attributes) -> None:
    with open(node.path, "rb", buffering=0) as source:
        size = os.fstat(source.fileno()).st_size
        writer.write(_header(node.relative, attributes, size=size))
        buffer = memoryview(bytearray(_COPY_BYTES))
        left = size
        while left:
            count = source.readinto(buffer[: min(left, _COPY_BYTES)])
            if not count:
                raise OSError(0, "a file became shorter while it was read")
            writer.write(buffer[:count])
            left -= count
    writer.write(bytes(-size % _BLOCK))


def _header(
    path: bytes, attributes: Attributes, *, size: int = 0, link: bytes | None = None, symlink: bytes = b""
) -> bytes:
    """Return the header blocks of an entry: ustar, with pax records for what that can't say."""
    info = tarfile.TarInfo(os.fsdecode(path or b"."))
    info.type = _TYPE[stat.S_IFMT(attributes.mode)] if link is None else tarfile.LNKTYPE
    info.mode = attributes.mode & 0o7777
    info.uid, info.gid = attributes.uid, attributes.gid
    info.size = size
    info.linkname = os.fsdecode(symlink if link is None else link)
    seconds, fraction = divmod(attributes.mtime_ns, 1_000_000_000)
    info.mtime = seconds
    records: dict[str, str] = {}
    if fraction:
        records["mtime"] = f"{seconds}.{fraction:09d}"
    if attributes.rdev:
        info.devmajor, info.devminor = os.major(attributes.rdev), os.minor(attributes.rdev)
    if link is None:
        for name, value in sorted(attributes.xattrs.items()):
            records[_XATTR + name] = value.decode("utf-8", "surrogateescape")
    info.pax_headers = records
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
