"""A driver's directory as a tree: scanned, filtered and hashed where the driver runs."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.digest import Digest, digest_of
from cluster.errors import ScanError
from cluster.patterns import ROOT, Match, PatternMatcher
from cluster.tree import EntryKind, Tree, TreeEntry, encode_tree


@dataclass(frozen=True, slots=True, kw_only=True)
class ScannedTree:
    """A directory as it was when it was scanned."""

    root: Path
    tree: Tree
    #: Digest of the tree's manifest.
    digest: Digest
    #: Where each content can be read, by digest: one of the files that have it.
    paths: dict[Digest, Path] = field(repr=False)
    #: Sockets, pipes and devices, which are left out: their paths, relative.
    left_out: tuple[str, ...] = ()


def scan(directory: str | os.PathLike[str], include: Iterable[str] = (), exclude: Iterable[str] = ()) -> ScannedTree:
    """Read and hash what is in *directory*.

    Symlinks are taken as such, never followed, but for *directory* itself. A directory that is left out stays in the
    tree where something in it is taken.

    Args:
        directory: What to scan.
        include: Patterns as in ``.dockerignore``; where there are any, only what they match is taken.
        exclude: Patterns likewise; what they match is left out.

    Raises:
        ScanError: no directory, or something in it can't be read, or has a name that is not UTF-8.
        InvalidPatternError: a pattern is malformed.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ScanError(str(root), "it is not a directory" if root.exists() else "there is no such directory")
    walk = _Walk(root, PatternMatcher(include), PatternMatcher(exclude))
    tree = Tree(tuple(walk.entries()))
    return ScannedTree(
        root=root,
        tree=tree,
        digest=digest_of(encode_tree(tree)),
        paths=walk.paths,
        left_out=tuple(walk.left_out),
    )


@dataclass(frozen=True, slots=True)
class _Open:
    """A directory that a walk is in."""

    path: str
    rest: Iterator[os.DirEntry[str]]
    included: Match
    excluded: Match


class _Walk:
    """One walk through a directory."""

    def __init__(self, root: Path, include: PatternMatcher, exclude: PatternMatcher) -> None:
        self._root = root
        self._include = include
        self._exclude = exclude
        self.paths: dict[Digest, Path] = {}
        self.left_out: list[str] = []

    def entries(self) -> Iterator[TreeEntry]:
        """Yield what is taken, in the order of trees; without recursion, as directories may be deep."""
        open_ = [_Open("", self._listed(""), ROOT, ROOT)]
        # Directories that the walk is in and that are taken only if something in them is.
        waiting: list[TreeEntry] = []
        while open_:
            directory = open_[-1]
            found = next(directory.rest, None)
            if found is None:
                open_.pop()
                if waiting and waiting[-1].path == directory.path:
                    waiting.pop()
                continue
            path = f"{directory.path}/{found.name}" if directory.path else found.name
            included = self._include.step(path, directory.included)
            excluded = self._exclude.step(path, directory.excluded)
            is_taken = (included.is_match or not self._include) and not excluded.is_match
            if found.is_dir(follow_symlinks=False):
                if not is_taken and not self._may_take_below(path, included, excluded):
                    continue
                open_.append(_Open(path, self._listed(path), included, excluded))
                waiting.append(TreeEntry(path, EntryKind.DIRECTORY, self._mode(path, found)))
            elif is_taken and (entry := self._entry(path, found)) is not None:
                waiting.append(entry)
            else:
                continue
            if is_taken:
                yield from waiting
                waiting.clear()

    def _may_take_below(self, path: str, included: Match, excluded: Match) -> bool:
        is_included = not self._include or included.is_match or self._include.may_differ_below(path, included)
        return is_included and (not excluded.is_match or self._exclude.may_differ_below(path, excluded))

    def _listed(self, directory: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(self._root / directory) as found:
                listed = sorted(found, key=lambda entry: entry.name)
        except OSError as exc:
            raise self._fault(directory, exc) from exc
        for entry in listed:
            if not _is_text(entry.name):
                raise ScanError(repr(entry.path), "its name is not UTF-8")
        return iter(listed)

    def _entry(self, path: str, found: os.DirEntry[str]) -> TreeEntry | None:
        try:
            status = found.stat(follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                target = os.readlink(found.path)  # noqa: PTH115 - Path would normalise the target
                if not _is_text(target):
                    raise ScanError(found.path, "what it links to is not UTF-8")
                return TreeEntry(path, EntryKind.SYMLINK, 0o777, link_target=target)
            if not stat.S_ISREG(status.st_mode):
                self.left_out.append(path)
                return None
            with open(found.path, "rb", opener=_open_no_follow) as file:
                digest = Digest("sha256:" + hashlib.file_digest(file, "sha256").hexdigest())
                size_bytes = file.tell()
        except OSError as exc:
            raise self._fault(path, exc) from exc
        self.paths.setdefault(digest, Path(found.path))
        return TreeEntry(path, EntryKind.FILE, stat.S_IMODE(status.st_mode), size_bytes, digest)

    def _mode(self, path: str, found: os.DirEntry[str]) -> int:
        try:
            return stat.S_IMODE(found.stat(follow_symlinks=False).st_mode)
        except OSError as exc:
            raise self._fault(path, exc) from exc

    def _fault(self, path: str, exc: OSError) -> ScanError:
        return ScanError(str(self._root / path), exc.strerror or str(exc))


def _open_no_follow(path: str, flags: int) -> int:
    # A file that has become a symlink or a pipe since it was listed is not followed, and doesn't block.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
