"""Writing a tree into a directory."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.digest import Digest
from cluster.errors import DigestMismatchError, NodeDiskError
from cluster.tree import MTIME_S, EntryKind, Tree, TreeEntry

_MTIME_NS = MTIME_S * 1_000_000_000


class TreeWriter:
    """Writes one tree: :meth:`begin`, :meth:`write` for each content in any order and from any threads, :meth:`end`.

    A tree has no entry under a symlink, and nothing that is there is opened for writing: nothing outside of the
    directory is touched.
    """

    def __init__(self, tree: Tree, directory: str | os.PathLike[str]) -> None:
        self._tree = tree
        self._directory = Path(directory)
        self._files: dict[Digest, list[TreeEntry]] = {}
        for entry in tree.entries:
            if entry.digest is not None:
                self._files.setdefault(entry.digest, []).append(entry)
        self._is_root = os.geteuid() == 0

    def begin(self) -> None:
        """Make the directories and symlinks."""
        for entry in self._tree.entries:
            path = self._directory / entry.path
            with _writing(path):
                if entry.kind is EntryKind.DIRECTORY:
                    path.mkdir(mode=0o700)
                elif entry.kind is EntryKind.SYMLINK:
                    path.symlink_to(entry.link_target)

    def write(self, digest: Digest, chunks: Iterable[memoryview]) -> None:
        """Write the files of a content.

        Raises:
            DigestMismatchError: the chunks are not that content.
            NodeDiskError: a file can't be written.
        """
        first, *others = self._files[digest]
        path = self._directory / first.path
        hashed = hashlib.sha256()
        with _writing(path), path.open("xb", buffering=0) as file:
            for chunk in chunks:
                hashed.update(chunk)
                _write_all(file.fileno(), chunk)
        if (actual := f"sha256:{hashed.hexdigest()}") != digest:
            raise DigestMismatchError(digest, actual, "the content store")
        for other in others:
            copy = self._directory / other.path
            with _writing(copy), path.open("rb") as source, copy.open("xb") as target:
                shutil.copyfileobj(source, target)

    def end(self) -> None:
        """Give everything its owner, mode and time, what is in a directory before the directory.

        Of the directory that all is written into, which the tree says nothing of, only the time is set.
        """
        for entry in reversed(self._tree.entries):
            path = self._directory / entry.path
            with _writing(path):
                if self._is_root:  # a directory may give its group to what is made in it
                    os.chown(path, 0, 0, follow_symlinks=False)
                if entry.kind is not EntryKind.SYMLINK:
                    path.chmod(entry.mode)
                os.utime(path, ns=(_MTIME_NS, _MTIME_NS), follow_symlinks=False)
        with _writing(self._directory):
            os.utime(self._directory, ns=(_MTIME_NS, _MTIME_NS))


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise NodeDiskError(f"writing {path}", exc.strerror or str(exc)) from exc
