"""What makes a vertex another one than it was: the changes between two build graphs, from a vertex of each down."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.digest import Digest
from cluster.graph import Definition, LocalOp, Vertex
from cluster.tree import Tree

#: Characters of a value that a change shows.
_MAX_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that differs."""

    #: The vertex of the newer graph.
    vertex: Digest
    #: What people call it; may be empty.
    name: str
    #: Which part of its op: ``args[1]``, ``actions[0].sources``, ``op``, ``inputs``.
    what: str
    before: str
    now: str
    #: Of a driver's directory, both trees; None for anything else.
    trees: tuple[Digest, Digest] | None = None


def changes(old: Definition, was: Digest, new: Definition, now: Digest) -> list[Change]:
    """Return what makes vertex *now* of one graph another one than *was* of another; empty where they are the same.

    Only what differs by itself: a vertex that only stands on something else is not told of. The lowest ones come
    first, as they may be the reason for all that is above them.
    """
    found: dict[tuple[Digest, Digest], list[Change]] = {}
    open_pairs = [(was, now)]
    while open_pairs:
        before, after = open_pairs.pop()
        if before == after or (before, after) in found:
            continue
        one, other = old.vertices[before], new.vertices[after]
        found[before, after] = list(_own(one, other, new.name(after)))
        if one.kind == other.kind and len(one.inputs) == len(other.inputs):
            below = zip(one.inputs, other.inputs, strict=True)
            open_pairs += [(a, b) for a, b in below if a is not None and b is not None]
    places = {digest: place for place, digest in enumerate(new.order)}
    lowest_first = sorted(found, key=lambda pair: places[pair[1]])
    return [change for pair in lowest_first for change in found[pair]]


def file_changes(old: Tree, new: Tree) -> list[str]:
    """Return which paths of a tree are new, gone or others than they were: ``+ a``, ``- b``, ``~ c``."""
    before = {entry.path: entry for entry in old.entries}
    now = {entry.path: entry for entry in new.entries}
    marks = [("-", path) for path in before.keys() - now.keys()] + [("+", path) for path in now.keys() - before.keys()]
    marks += [("~", path) for path in before.keys() & now.keys() if before[path] != now[path]]
    return [f"{mark} {path}" for mark, path in sorted(marks, key=lambda pair: pair[1])]


def _own(old: Vertex, new: Vertex, name: str) -> Iterator[Change]:
    if old.kind != new.kind:
        yield Change(vertex=new.digest, name=name, what="op", before=old.kind, now=new.kind)
        return
    if isinstance(old.op, LocalOp) and isinstance(new.op, LocalOp):
        if old.op != new.op:
            trees = (old.op.tree, new.op.tree)
            yield Change(vertex=new.digest, name=name, what="content", before=trees[0], now=trees[1], trees=trees)
        return
    for what, before, now in _fields("", old.op, new.op):
        yield Change(vertex=new.digest, name=name, what=what, before=_shown(before), now=_shown(now))
    if len(old.inputs) != len(new.inputs):
        before, now = f"{len(old.inputs)} of them", f"{len(new.inputs)} of them"
        yield Change(vertex=new.digest, name=name, what="inputs", before=before, now=now)
        return
    for index, (was, is_now) in enumerate(zip(old.inputs, new.inputs, strict=True)):
        if (was is None) != (is_now is None):
            before, now = was or "nothing", is_now or "nothing"
            yield Change(vertex=new.digest, name=name, what=f"inputs[{index}]", before=before, now=now)


def _fields(path: str, old: object, new: object) -> Iterator[tuple[str, object, object]]:
    """Yield the smallest parts that differ, with their paths."""
    if old == new:
        return
    if type(old) is type(new) and dataclasses.is_dataclass(old) and not isinstance(old, type):
        for each in dataclasses.fields(old):
            below = f"{path}.{each.name}" if path else each.name
            yield from _fields(below, getattr(old, each.name), getattr(new, each.name))
    elif isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        for index, (before, now) in enumerate(zip(old, new, strict=True)):
            yield from _fields(f"{path}[{index}]", before, now)
    else:
        yield path, old, new


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}… ({len(text)} characters)"
