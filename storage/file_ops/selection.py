"""Which files of a tree a copy means: one reading of sources, for copying them and for digests of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.graph import CopyAction
from cluster.patterns import ROOT, PatternMatcher, has_wildcards, name_pattern, unescaped
from storage.file_ops.paths import components, find
from storage.snapshots.names import join
from storage.snapshots.tree import Node, Tree


@dataclass(frozen=True, slots=True)
class Source:
    """A file or directory that a source's path or pattern means."""

    #: Path from the root as it was written or matched: its last component is the name in the destination.
    path: bytes
    node: Node

    @property
    def name(self) -> bytes:
        """Return its name; empty for the root."""
        return self.path.rpartition(b"/")[2]


def sources_of(action: CopyAction, tree: Tree) -> list[Source]:
    """Return what *action*'s sources mean in *tree*, in their order; each pattern's matches by name.

    Directories above the first component with a wildcard are found through symlinks; wildcards match
    what is really in a directory. After BuildKit's ``fsutil/copy.ResolveWildcards``.

    Raises:
        FileNotFoundError: a source means nothing, unless *action* allows that.
        OSError: a source's path can't be followed.
        InvalidPatternError: a pattern is malformed.
    """
    found: list[Source] = []
    for written in action.sources:
        matches = _matches(action, tree, written)
        if not matches and not action.allow_missing:
            raise FileNotFoundError(errno.ENOENT, "no such file or directory", written)
        found += matches
    return found


def _matches(action: CopyAction, tree: Tree, written: str) -> list[Source]:
    parts = [os.fsdecode(part) for part in components(written)]
    if not action.wildcards or not any(map(has_wildcards, parts)):
        path = b"/".join(components("/".join(map(unescaped, parts)) if action.wildcards else written))
        node = find(tree, path, follow_last=action.follow_symlinks).node
        return [] if node is None else [Source(path, node)]
    fixed = next(index for index, part in enumerate(parts) if has_wildcards(part))
    path = b"/".join(components("/".join(map(unescaped, parts[:fixed]))))
    above = find(tree, path).node
    matches = [] if above is None or not above.is_dir else [Source(path, above)]
    for part in parts[fixed:]:
        pattern = name_pattern(part)
        matches = [
            Source(join(match.path, _name(child)), child)
            for match in matches
            if match.node.is_dir
            for child in match.node.children()
            if pattern.match(os.fsdecode(_name(child)))
        ]
    if action.follow_symlinks:
        # A match may itself be a link, found under the name that it has.
        followed = ((match.path, find(tree, match.node.relative).node) for match in matches)
        return [Source(path, node) for path, node in followed if node is not None]
    return matches


def walk(source: Node, left_out: PatternMatcher) -> Iterator[tuple[bytes, Node]]:
    """Yield *source* and what is in it, by path from it; a directory before what is in it, names in order.

    A directory that is left out comes only if an exception brings back something in it.
    """
    pending = [(b"", source, ROOT)]
    #: Directories above that are left out, and not brought back yet.
    withheld: list[tuple[bytes, Node]] = []
    while pending:
        path, node, above = pending.pop()
        while withheld and not path.startswith(withheld[-1][0] + b"/"):
            withheld.pop()
        match = ROOT if not path else left_out.step(os.fsdecode(path), above)
        if match.is_match:
            if not node.is_dir or not left_out.may_differ_below(os.fsdecode(path), match):
                continue
            withheld.append((path, node))
        else:
            yield from withheld
            withheld.clear()
            yield path, node
        if node.is_dir:
            children = node.children()
            pending += [(join(path, _name(child)), child, match) for child in reversed(children)]


def _name(node: Node) -> bytes:
    return node.relative.rpartition(b"/")[2]
